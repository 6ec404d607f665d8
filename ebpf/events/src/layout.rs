//! Where the fields of kernel structs and the arguments of tracepoints are on *this* kernel. Filled by the sensor from
//! the kernel's BTF before the probes are loaded; one binary therefore fits many kernels.

/// The field does not exist on this kernel, or not in a shape the probes know.
pub const OFFSET_MISSING: u32 = u32::MAX;
/// The tracepoint has no such argument.
pub const ARG_MISSING: u32 = u32::MAX;

/// Byte offsets (`struct_field`) and argument positions (`arg_tracepoint_what`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Layout {
    pub task_pid: u32,
    pub task_tgid: u32,
    pub task_exit_code: u32,
    pub task_cgroups: u32,
    pub task_files: u32,
    pub task_signal: u32,
    pub task_mm: u32,
    pub mm_arg_start: u32,
    pub task_start_time: u32,
    pub task_on_cpu: u32,
    pub task_run_time: u32,
    pub task_run_delay: u32,
    pub task_minor_faults: u32,
    pub task_major_faults: u32,
    pub task_reads: u32,
    pub task_writes: u32,
    pub task_read_bytes: u32,
    pub task_write_bytes: u32,
    pub task_cred: u32,
    pub cred_uid: u32,
    pub signal_tty: u32,
    pub css_set_dfl_cgrp: u32,
    pub cgroup_kn: u32,
    /// To the `cgroup_subsys_state` of the parent, and from such a state to its cgroup.
    pub cgroup_parent_css: u32,
    pub css_cgroup: u32,
    pub kernfs_id: u32,
    pub files_fdt: u32,
    pub fdtable_max_fds: u32,
    pub fdtable_fd: u32,
    pub file_inode: u32,
    pub inode_mode: u32,
    pub inode_rdev: u32,
    pub sock_state: u32,
    pub sock_port_local: u32,
    pub sock_port_remote: u32,
    pub sock_protocol: u32,
    pub sock_cgroup: u32,
    pub sock_uid: u32,
    pub request_queue: u32,
    pub request_sector: u32,
    pub request_length: u32,
    pub request_bio: u32,
    pub request_start: u32,
    pub bio_blkg: u32,
    pub blkg_blkcg: u32,
    pub blkcg_cgroup: u32,
    pub binprm_filename: u32,
    /// System-call number and the first four arguments in `struct pt_regs`.
    pub regs_syscall: u32,
    pub regs_arg: [u32; 4],
    pub arg_fork_child: u32,
    pub arg_exec_binprm: u32,
    pub arg_switch_next: u32,
    pub arg_block_request: u32,
    pub arg_block_completed: u32,
    pub arg_state_sock: u32,
    pub arg_send_reset_sock: u32,
    pub arg_receive_reset_sock: u32,
    pub arg_retransmit_sock: u32,
    /// Missing before 6.8 or so, where the tracepoint has only the victim's pid.
    pub arg_oom_task: u32,
}

impl Layout {
    /// Nothing known: every probe that needs a field or argument is switched off.
    pub const MISSING: Self = Self {
        task_pid: OFFSET_MISSING,
        task_tgid: OFFSET_MISSING,
        task_exit_code: OFFSET_MISSING,
        task_cgroups: OFFSET_MISSING,
        task_files: OFFSET_MISSING,
        task_signal: OFFSET_MISSING,
        task_mm: OFFSET_MISSING,
        mm_arg_start: OFFSET_MISSING,
        task_start_time: OFFSET_MISSING,
        task_on_cpu: OFFSET_MISSING,
        task_run_time: OFFSET_MISSING,
        task_run_delay: OFFSET_MISSING,
        task_minor_faults: OFFSET_MISSING,
        task_major_faults: OFFSET_MISSING,
        task_reads: OFFSET_MISSING,
        task_writes: OFFSET_MISSING,
        task_read_bytes: OFFSET_MISSING,
        task_write_bytes: OFFSET_MISSING,
        task_cred: OFFSET_MISSING,
        cred_uid: OFFSET_MISSING,
        signal_tty: OFFSET_MISSING,
        css_set_dfl_cgrp: OFFSET_MISSING,
        cgroup_kn: OFFSET_MISSING,
        cgroup_parent_css: OFFSET_MISSING,
        css_cgroup: OFFSET_MISSING,
        kernfs_id: OFFSET_MISSING,
        files_fdt: OFFSET_MISSING,
        fdtable_max_fds: OFFSET_MISSING,
        fdtable_fd: OFFSET_MISSING,
        file_inode: OFFSET_MISSING,
        inode_mode: OFFSET_MISSING,
        inode_rdev: OFFSET_MISSING,
        sock_state: OFFSET_MISSING,
        sock_port_local: OFFSET_MISSING,
        sock_port_remote: OFFSET_MISSING,
        sock_protocol: OFFSET_MISSING,
        sock_cgroup: OFFSET_MISSING,
        sock_uid: OFFSET_MISSING,
        request_queue: OFFSET_MISSING,
        request_sector: OFFSET_MISSING,
        request_length: OFFSET_MISSING,
        request_bio: OFFSET_MISSING,
        request_start: OFFSET_MISSING,
        bio_blkg: OFFSET_MISSING,
        blkg_blkcg: OFFSET_MISSING,
        blkcg_cgroup: OFFSET_MISSING,
        binprm_filename: OFFSET_MISSING,
        regs_syscall: OFFSET_MISSING,
        regs_arg: [OFFSET_MISSING; 4],
        arg_fork_child: ARG_MISSING,
        arg_exec_binprm: ARG_MISSING,
        arg_switch_next: ARG_MISSING,
        arg_block_request: ARG_MISSING,
        arg_block_completed: ARG_MISSING,
        arg_state_sock: ARG_MISSING,
        arg_send_reset_sock: ARG_MISSING,
        arg_receive_reset_sock: ARG_MISSING,
        arg_retransmit_sock: ARG_MISSING,
        arg_oom_task: ARG_MISSING,
    };
}

/// System-call numbers from here on mean nothing to the probes.
pub const SYSCALL_TABLE: usize = 512;

/// What a system call means to the probes; the table from number to kind is filled by the sensor, whose libc knows the
/// architecture's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SyscallKind {
    Other = 0,
    /// Returns bytes read from the descriptor in the first argument to the buffer in the second.
    Read = 1,
    /// Returns bytes read from the descriptor in the first argument to several buffers.
    ReadVector = 2,
    /// May be a handover mark.
    Prctl = 3,
}
