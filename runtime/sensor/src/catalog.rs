//! The list of probes: what each is for, where it attaches, what it needs of the kernel.

use serde::Serialize;
use warmswap_events::Layout;

use crate::layout::Need;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    /// A raw tracepoint, by name.
    Tracepoint(&'static str),
    /// A function of the kernel, by name, as it is called.
    Function(&'static str),
    /// Every task, when the sensor wants to know, and what happens to them meanwhile; see [`crate::load`].
    Tasks,
    /// Every connection, when the sensor wants to know.
    Connections,
    /// A program of a service that binds a port. No probe, but loaded and reported like one.
    Bind,
    /// Every segment of TCP, by a raw tracepoint; a share of the time when there are very many; see [`crate::sampling`].
    Segments(&'static str),
    /// The end of every system call, as long as somebody can read input; see [`crate::at_exit`], which knows the programs.
    WhileInputIsRead,
    /// The first of several that this kernel allows; see [`crate::load`].
    Marks,
    /// No program of its own: a part of another one, switched off by itself when the kernel lacks a field.
    PartOf(&'static str),
}

pub(crate) struct Probe {
    /// What users read.
    pub(crate) name: &'static str,
    /// The program in the object, where it depends on the kernel which one.
    pub(crate) program: fn(&Layout) -> &'static str,
    /// The same for a tracepoint whose arguments the verifier knows by type: cheaper, tried first.
    pub(crate) typed: Option<&'static str>,
    pub(crate) class: &'static str,
    pub(crate) hook: Hook,
    pub(crate) needs: fn(&Layout) -> Vec<Need>,
}

fn none(_: &Layout) -> Vec<Need> {
    Vec::new()
}

fn cgroup_of_task(l: &Layout) -> Vec<Need> {
    vec![
        Need::field("task_struct.cgroups", l.task_cgroups),
        Need::field("css_set.dfl_cgrp", l.css_set_dfl_cgrp),
        Need::field("cgroup.kn", l.cgroup_kn),
        Need::field("kernfs_node.id", l.kernfs_id),
    ]
}

fn cgroup_of_sock(l: &Layout) -> Vec<Need> {
    vec![
        Need::field("sock.sk_cgrp_data", l.sock_cgroup),
        Need::field("cgroup.kn", l.cgroup_kn),
        Need::field("kernfs_node.id", l.kernfs_id),
        Need::field("sock.skc_num", l.sock_port_local),
        Need::field("sock.skc_dport", l.sock_port_remote),
        Need::field("sock.skc_state", l.sock_state),
    ]
}

fn of_datagram(l: &Layout) -> Vec<Need> {
    vec![
        Need::field("sock.sk_protocol", l.sock_protocol),
        Need::field("sk_buff.sk", l.skb_sock),
        Need::field("sk_buff.len", l.skb_length),
        Need::field("sk_buff.head", l.skb_head),
        Need::field("sk_buff.end", l.skb_end),
        Need::field("skb_shared_info.gso_segs", l.shared_segments),
    ]
}

fn with(mut needs: Vec<Need>, more: Vec<Need>) -> Vec<Need> {
    needs.extend(more);
    needs
}

/// What handover marks need where the kernel gives the registers of the call, and not its arguments.
pub(crate) fn marks_by_registers(l: &Layout) -> Vec<Need> {
    vec![
        Need::field("pt_regs.orig_ax", l.regs_syscall),
        Need::field("pt_regs.di", l.regs_arg[0]),
        Need::field("pt_regs.si", l.regs_arg[1]),
        Need::field("pt_regs.dx", l.regs_arg[2]),
        Need::field("pt_regs.r10", l.regs_arg[3]),
    ]
}

/// In the order in which they attach; parts after their whole.
pub(crate) const PROBES: &[Probe] = &[
    Probe {
        name: "exec",
        program: |_| "process_exec",
        typed: None,
        class: "processes",
        hook: Hook::Tracepoint("sched_process_exec"),
        needs: none,
    },
    Probe {
        name: "exec-name",
        program: |_| "process_exec",
        typed: None,
        class: "processes",
        hook: Hook::PartOf("exec"),
        needs: |l| vec![Need::field("task_struct.mm", l.task_mm), Need::field("mm_struct.arg_start", l.mm_arg_start)],
    },
    Probe {
        name: "fork",
        program: |_| "process_fork",
        typed: None,
        class: "processes",
        hook: Hook::Tracepoint("sched_process_fork"),
        needs: |l| {
            vec![
                Need::field("task_struct.pid", l.task_pid),
                Need::field("task_struct.tgid", l.task_tgid),
                Need::argument("the child of sched_process_fork", l.arg_fork_child, &[1]),
            ]
        },
    },
    Probe {
        name: "exit",
        program: |_| "process_exit",
        typed: None,
        class: "processes",
        hook: Hook::Tracepoint("sched_process_exit"),
        needs: none,
    },
    Probe {
        name: "run-time",
        program: |_| "walk",
        typed: None,
        class: "cpu",
        hook: Hook::Tasks,
        needs: |l| {
            let of_task = vec![
                Need::argument("the task of sched_process_exit", l.arg_ending_task, &[0]),
                Need::argument("the task of sched_process_free", l.arg_gone_task, &[0]),
                Need::argument("the task of cgroup_attach_task", l.arg_moved_task, &[2]),
                Need::field("task_struct.pid", l.task_pid),
                Need::field("task_struct.tgid", l.task_tgid),
                Need::field("task_struct.start_time", l.task_start_time),
                Need::field("task_struct.flags", l.task_flags),
                Need::field("task_struct.se.sum_exec_runtime", l.task_run_time),
            ];
            with(cgroup_of_task(l), of_task)
        },
    },
    Probe {
        name: "run-delay",
        program: |_| "walk",
        typed: None,
        class: "cpu",
        hook: Hook::PartOf("run-time"),
        needs: |l| vec![Need::field("task_struct.sched_info.run_delay", l.task_run_delay)],
    },
    Probe {
        name: "file-bytes",
        program: |_| "walk",
        typed: None,
        class: "disk",
        hook: Hook::PartOf("run-time"),
        needs: |l| {
            vec![
                Need::field("task_struct.ioac.syscr", l.task_reads),
                Need::field("task_struct.ioac.syscw", l.task_writes),
                Need::field("task_struct.ioac.rchar", l.task_read_bytes),
                Need::field("task_struct.ioac.wchar", l.task_write_bytes),
            ]
        },
    },
    Probe {
        name: "page-faults",
        program: |_| "walk",
        typed: None,
        class: "memory",
        hook: Hook::PartOf("run-time"),
        needs: |l| {
            vec![
                Need::field("task_struct.min_flt", l.task_minor_faults),
                Need::field("task_struct.maj_flt", l.task_major_faults),
            ]
        },
    },
    Probe {
        name: "major-faults",
        program: |_| "walk",
        typed: None,
        class: "memory",
        hook: Hook::PartOf("run-time"),
        needs: |l| vec![Need::field("task_struct.maj_flt", l.task_major_faults)],
    },
    Probe {
        name: "out-of-memory",
        program: |_| "out_of_memory",
        typed: None,
        class: "memory",
        hook: Hook::Tracepoint("mark_victim"),
        needs: |l| with(cgroup_of_task(l), vec![Need::field("task_struct.tgid", l.task_tgid)]),
    },
    Probe {
        name: "block-io",
        program: |l| if l.arg_block_request == 0 { "block_issue" } else { "block_issue_queue_first" },
        typed: None,
        class: "disk",
        hook: Hook::Tracepoint("block_rq_issue"),
        needs: |l| {
            vec![
                Need::argument("the request of block_rq_issue", l.arg_block_request, &[0, 1]),
                Need::field("request.q", l.request_queue),
                Need::field("request.__sector", l.request_sector),
                Need::field("request.__data_len", l.request_length),
            ]
        },
    },
    Probe {
        name: "block-io-owner",
        program: |_| "block_issue",
        typed: None,
        class: "disk",
        hook: Hook::PartOf("block-io"),
        needs: |l| {
            vec![
                Need::field("request.bio", l.request_bio),
                Need::field("bio.bi_blkg", l.bio_blkg),
                Need::field("blkcg_gq.blkcg", l.blkg_blkcg),
                Need::field("blkcg.css.cgroup", l.blkcg_cgroup),
            ]
        },
    },
    Probe {
        name: "block-latency",
        program: |_| "block_complete",
        typed: None,
        class: "disk",
        hook: Hook::Tracepoint("block_rq_complete"),
        needs: |l| {
            vec![
                Need::argument("the request of block_rq_complete", l.arg_block_completed, &[0]),
                Need::field("request.__data_len", l.request_length),
                Need::field("request.start_time_ns", l.request_start),
            ]
        },
    },
    Probe {
        name: "udp-in",
        program: |_| "datagram_in",
        typed: None,
        class: "network",
        hook: Hook::Function("__udp_enqueue_schedule_skb"),
        needs: |l| with(cgroup_of_sock(l), of_datagram(l)),
    },
    Probe {
        name: "udp-out-v4",
        program: |_| "datagram_out_v4",
        typed: None,
        class: "network",
        hook: Hook::Function("ip_send_skb"),
        needs: |l| with(cgroup_of_sock(l), of_datagram(l)),
    },
    Probe {
        name: "udp-out-v6",
        program: |_| "datagram_out_v6",
        typed: None,
        class: "network",
        hook: Hook::Function("ip6_send_skb"),
        needs: |l| with(cgroup_of_sock(l), of_datagram(l)),
    },
    Probe {
        name: "tcp-state",
        program: |_| "tcp_state",
        typed: None,
        class: "network",
        hook: Hook::Tracepoint("inet_sock_set_state"),
        needs: |l| {
            with(cgroup_of_sock(l), vec![Need::argument("the socket of inet_sock_set_state", l.arg_state_sock, &[0])])
        },
    },
    Probe {
        name: "accepts",
        program: |_| "tcp_state",
        typed: None,
        class: "network",
        hook: Hook::PartOf("tcp-state"),
        needs: none,
    },
    Probe {
        name: "tcp-traffic",
        program: |_| "sweep",
        typed: None,
        class: "network",
        hook: Hook::Connections,
        needs: |l| {
            let of_connection = vec![
                Need::field("tcp_sock.bytes_received", l.tcp_bytes_received),
                Need::field("tcp_sock.bytes_sent", l.tcp_bytes_sent),
                Need::field("tcp_sock.segs_in", l.tcp_segments_in),
                Need::field("tcp_sock.segs_out", l.tcp_segments_out),
                Need::field("tcp_sock.srtt_us", l.tcp_round_trip),
                Need::field("sock.skc_flags", l.sock_flags),
                Need::field("sock.skc_family", l.sock_family),
                Need::field("sock.sk_protocol", l.sock_protocol),
                Need::field("socket.sk", l.socket_sock),
                Need::field("file.private_data", l.file_private),
                Need::field("file.f_inode", l.file_inode),
                Need::field("inode.i_mode", l.inode_mode),
            ];
            with(cgroup_of_sock(l), of_connection)
        },
    },
    Probe {
        name: "request-latency",
        program: |_| "segment",
        typed: Some("segment_typed"),
        class: "network",
        hook: Hook::Segments("tcp_probe"),
        needs: |l| {
            let of_segment = vec![
                Need::argument("the socket of tcp_probe", l.arg_segment_sock, &[0]),
                Need::argument("the packet of tcp_probe", l.arg_segment_skb, &[1]),
                Need::field("sock.skc_hash", l.sock_hash),
                Need::field("tcp_sock.snd_nxt", l.tcp_sent_next),
                Need::field("tcp_sock.first_tx_mstamp", l.tcp_first_sent),
                Need::field("tcp_sock.tcp_header_len", l.tcp_header_length),
                Need::field("sk_buff.len", l.skb_length),
                Need::field("sk_buff.data", l.skb_data),
            ];
            with(cgroup_of_sock(l), of_segment)
        },
    },
    Probe {
        name: "tcp-resets-sent",
        program: |_| "tcp_reset_sent",
        typed: None,
        class: "network",
        hook: Hook::Tracepoint("tcp_send_reset"),
        needs: |l| {
            with(cgroup_of_sock(l), vec![Need::argument("the socket of tcp_send_reset", l.arg_send_reset_sock, &[0])])
        },
    },
    Probe {
        name: "tcp-resets-received",
        program: |_| "tcp_reset_received",
        typed: None,
        class: "network",
        hook: Hook::Tracepoint("tcp_receive_reset"),
        needs: |l| {
            let sock = Need::argument("the socket of tcp_receive_reset", l.arg_receive_reset_sock, &[0]);
            with(cgroup_of_sock(l), vec![sock])
        },
    },
    Probe {
        name: "tcp-retransmits",
        program: |_| "tcp_retransmitted",
        typed: None,
        class: "network",
        hook: Hook::Tracepoint("tcp_retransmit_skb"),
        needs: |l| {
            let sock = Need::argument("the socket of tcp_retransmit_skb", l.arg_retransmit_sock, &[0]);
            with(cgroup_of_sock(l), vec![sock])
        },
    },
    Probe {
        name: "input",
        program: |_| "system_call",
        typed: None,
        class: "input",
        hook: Hook::WhileInputIsRead,
        needs: |l| {
            vec![
                Need::field("pt_regs.orig_ax", l.regs_syscall),
                Need::field("pt_regs.di", l.regs_arg[0]),
                Need::field("task_struct.files", l.task_files),
                Need::field("task_struct.signal", l.task_signal),
                Need::field("signal_struct.tty", l.signal_tty),
                Need::field("files_struct.fdt", l.files_fdt),
                Need::field("fdtable.max_fds", l.fdtable_max_fds),
                Need::field("fdtable.fd", l.fdtable_fd),
                Need::field("file.f_inode", l.file_inode),
                Need::field("inode.i_mode", l.inode_mode),
                Need::field("inode.i_rdev", l.inode_rdev),
            ]
        },
    },
    Probe {
        name: "orientation",
        program: |_| "system_call",
        typed: None,
        class: "input",
        hook: Hook::PartOf("input"),
        needs: |l| vec![Need::field("pt_regs.si", l.regs_arg[1])],
    },
    // After input, whose program may have to see them.
    Probe {
        name: "marks",
        program: |_| "unknown_prctl",
        typed: None,
        class: "handover",
        hook: Hook::Marks,
        needs: none,
    },
    Probe {
        name: "ports-v4",
        program: |_| "share_port_v4",
        typed: None,
        class: "ports",
        hook: Hook::Bind,
        needs: none,
    },
    Probe {
        name: "ports-v6",
        program: |_| "share_port_v6",
        typed: None,
        class: "ports",
        hook: Hook::Bind,
        needs: none,
    },
];

/// A probe and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProbeStatus {
    pub name: &'static str,
    /// What it is about: processes, cpu, memory, disk, network, input, handover, ports.
    pub class: &'static str,
    /// Where it attaches, or what it is a part of.
    pub hook: String,
    /// Whether it works; one for input is attached only while somebody watched can read any.
    pub attached: bool,
    /// Why it is switched off.
    pub reason: Option<String>,
}
