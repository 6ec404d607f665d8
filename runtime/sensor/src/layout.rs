//! Fills the probes' layout table from BTF, and says which entries a probe cannot do without.

use warmswap_events::{ARG_MISSING, Layout, OFFSET_MISSING, SYSCALL_TABLE, SyscallKind};

use crate::btf::Btf;

/// Everything the probes may ask for, on this kernel.
pub(crate) fn layout_of(btf: &Btf) -> Layout {
    let field = |structure: &str, path: &str| btf.field(structure, path).unwrap_or(OFFSET_MISSING);
    let argument =
        |tracepoint: &str, structure: &str, nth: usize| btf.argument(tracepoint, structure, nth).unwrap_or(ARG_MISSING);
    let regs = |name: &str| if cfg!(target_arch = "x86_64") { field("pt_regs", name) } else { OFFSET_MISSING };
    Layout {
        task_pid: field("task_struct", "pid"),
        task_tgid: field("task_struct", "tgid"),
        task_exit_code: field("task_struct", "exit_code"),
        task_cgroups: field("task_struct", "cgroups"),
        task_files: field("task_struct", "files"),
        task_signal: field("task_struct", "signal"),
        task_mm: field("task_struct", "mm"),
        mm_arg_start: field("mm_struct", "arg_start"),
        task_start_time: field("task_struct", "start_time"),
        task_flags: field("task_struct", "flags"),
        task_leader: field("task_struct", "group_leader"),
        task_run_time: field("task_struct", "se.sum_exec_runtime"),
        task_run_delay: field("task_struct", "sched_info.run_delay"),
        task_minor_faults: field("task_struct", "min_flt"),
        task_major_faults: field("task_struct", "maj_flt"),
        task_reads: field("task_struct", "ioac.syscr"),
        task_writes: field("task_struct", "ioac.syscw"),
        task_read_bytes: field("task_struct", "ioac.rchar"),
        task_write_bytes: field("task_struct", "ioac.wchar"),
        task_cred: field("task_struct", "cred"),
        cred_uid: field("cred", "uid"),
        signal_tty: field("signal_struct", "tty"),
        css_set_dfl_cgrp: field("css_set", "dfl_cgrp"),
        cgroup_kn: field("cgroup", "kn"),
        cgroup_parent_css: field("cgroup", "self.parent"),
        css_cgroup: field("cgroup_subsys_state", "cgroup"),
        kernfs_id: field("kernfs_node", "id"),
        files_fdt: field("files_struct", "fdt"),
        fdtable_max_fds: field("fdtable", "max_fds"),
        fdtable_fd: field("fdtable", "fd"),
        file_inode: field("file", "f_inode"),
        file_private: field("file", "private_data"),
        inode_mode: field("inode", "i_mode"),
        inode_rdev: field("inode", "i_rdev"),
        sock_state: field("sock", "__sk_common.skc_state"),
        sock_port_local: field("sock", "__sk_common.skc_num"),
        sock_port_remote: field("sock", "__sk_common.skc_dport"),
        sock_protocol: field("sock", "sk_protocol"),
        sock_cgroup: field("sock", "sk_cgrp_data"),
        sock_uid: field("sock", "sk_uid"),
        sock_flags: field("sock", "__sk_common.skc_flags"),
        sock_hash: field("sock", "__sk_common.skc_hash"),
        sock_family: field("sock", "__sk_common.skc_family"),
        socket_sock: field("socket", "sk"),
        tcp_sent_next: field("tcp_sock", "snd_nxt"),
        tcp_bytes_received: field("tcp_sock", "bytes_received"),
        tcp_bytes_sent: field("tcp_sock", "bytes_sent"),
        tcp_segments_in: field("tcp_sock", "segs_in"),
        tcp_segments_out: field("tcp_sock", "segs_out"),
        tcp_round_trip: field("tcp_sock", "srtt_us"),
        tcp_first_sent: field("tcp_sock", "first_tx_mstamp"),
        tcp_header_length: field("tcp_sock", "tcp_header_len"),
        skb_sock: field("sk_buff", "sk"),
        skb_length: field("sk_buff", "len"),
        skb_data: field("sk_buff", "data"),
        skb_head: field("sk_buff", "head"),
        skb_end: field("sk_buff", "end"),
        shared_segments: field("skb_shared_info", "gso_segs"),
        request_queue: field("request", "q"),
        request_sector: field("request", "__sector"),
        request_length: field("request", "__data_len"),
        request_bio: field("request", "bio"),
        request_start: field("request", "start_time_ns"),
        bio_blkg: field("bio", "bi_blkg"),
        blkg_blkcg: field("blkcg_gq", "blkcg"),
        blkcg_cgroup: field("blkcg", "css.cgroup"),
        binprm_filename: field("linux_binprm", "filename"),
        regs_syscall: regs("orig_ax"),
        regs_arg: [regs("di"), regs("si"), regs("dx"), regs("r10")],
        arg_fork_child: argument("sched_process_fork", "task_struct", 1),
        arg_exec_binprm: argument("sched_process_exec", "linux_binprm", 0),
        arg_gone_task: argument("sched_process_free", "task_struct", 0),
        arg_ending_task: argument("sched_process_exit", "task_struct", 0),
        arg_moved_task: argument("cgroup_attach_task", "task_struct", 0),
        arg_block_request: argument("block_rq_issue", "request", 0),
        arg_block_completed: argument("block_rq_complete", "request", 0),
        arg_state_sock: argument("inet_sock_set_state", "sock", 0),
        arg_send_reset_sock: argument("tcp_send_reset", "sock", 0),
        arg_receive_reset_sock: argument("tcp_receive_reset", "sock", 0),
        arg_retransmit_sock: argument("tcp_retransmit_skb", "sock", 0),
        arg_segment_sock: argument("tcp_probe", "sock", 0),
        arg_segment_skb: argument("tcp_probe", "sk_buff", 0),
        arg_oom_task: argument("mark_victim", "task_struct", 0),
    }
}

/// What a probe needs of the layout: a name for the reason, the value, and the values it can work with.
pub(crate) struct Need {
    pub(crate) what: &'static str,
    pub(crate) value: u32,
    /// Positions of an argument that the probe was written for; empty for an offset, where any will do.
    pub(crate) known: &'static [u32],
}

impl Need {
    pub(crate) const fn field(what: &'static str, value: u32) -> Self {
        Self { what, value, known: &[] }
    }

    pub(crate) const fn argument(what: &'static str, value: u32, known: &'static [u32]) -> Self {
        Self { what, value, known }
    }

    /// Why the need is not met, or `None`.
    pub(crate) fn unmet(&self) -> Option<String> {
        if self.value == OFFSET_MISSING {
            Some(format!("this kernel's BTF has no {}", self.what))
        } else if !self.known.is_empty() && !self.known.contains(&self.value) {
            Some(format!("{} is argument {} on this kernel, which the probe does not know", self.what, self.value))
        } else {
            None
        }
    }
}

/// From system-call number to what it means, with this architecture's numbers.
pub(crate) fn syscall_table() -> [u8; SYSCALL_TABLE] {
    let mut table = [SyscallKind::Other as u8; SYSCALL_TABLE];
    let reads = [libc::SYS_read, libc::SYS_pread64];
    let vector_reads = [libc::SYS_readv, libc::SYS_preadv, libc::SYS_preadv2];
    let mut set = |numbers: &[libc::c_long], kind: SyscallKind| {
        for number in numbers {
            if let Some(entry) = usize::try_from(*number).ok().and_then(|number| table.get_mut(number)) {
                *entry = kind as u8;
            }
        }
    };
    set(&reads, SyscallKind::Read);
    set(&vector_reads, SyscallKind::ReadVector);
    set(&[libc::SYS_prctl], SyscallKind::Prctl);
    table
}
