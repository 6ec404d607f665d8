//! Known work in a cgroup of our own is counted exactly.

#[macro_use]
mod support;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use support::{Cgroup, fork_exec, window};

#[test]
fn writes_and_reads_are_counted_exactly() {
    let mut sensor = sensor_or_leave!("writes_and_reads_are_counted_exactly");
    need_probe!("writes_and_reads_are_counted_exactly", sensor, "file-bytes");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let status = cgroup.run(|| {
        let buffer = [7u8; 512];
        // SAFETY: system calls on a constant path and our own stack.
        unsafe {
            let fd = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
            for _ in 0..1000 {
                libc::write(fd, buffer.as_ptr().cast(), buffer.len());
            }
            // Never reaches a file, and is therefore no write.
            libc::write(-1, buffer.as_ptr().cast(), 1);
        }
        0
    });
    assert_eq!(status, 0);
    let counts = window(&mut sensor).counts;
    assert_eq!((counts.writes, counts.write_bytes), (1000, 512_000));
    assert_eq!((counts.reads, counts.read_bytes), (1, 1), "the byte that let the child go");
    let again = window(&mut sensor).counts;
    assert_eq!(again, Default::default(), "a second window begins where the first ended");
}

#[test]
fn execs_forks_and_exits_are_counted_exactly() {
    let mut sensor = sensor_or_leave!("execs_forks_and_exits_are_counted_exactly");
    need_probe!("execs_forks_and_exits_are_counted_exactly", sensor, "exec", "fork", "exit");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let status = cgroup.run(|| (0..20).map(|_| fork_exec(c"/bin/true")).sum());
    assert_eq!(status, 0);
    let counts = window(&mut sensor).counts;
    assert_eq!((counts.execs, counts.forks, counts.exits), (20, 20, 21), "20 programs, and the child itself ends");
}

#[test]
fn what_happens_below_a_watched_cgroup_belongs_to_it_unless_watched_itself() {
    let mut sensor = sensor_or_leave!("what_happens_below_a_watched_cgroup_belongs_to_it_unless_watched_itself");
    let outer = Cgroup::new();
    let inner = outer.child("inner");
    let deep = inner.child("deep");
    sensor.watch(outer.id).expect("watch");
    let one = || 0;
    deep.run(one);
    let counts = window(&mut sensor).counts;
    assert_eq!(counts.reads, 1, "the byte that let it go, two levels below: {counts:?}");
    sensor.watch(inner.id).expect("watch");
    deep.run(one);
    let windows = sensor.windows();
    let of = |id| windows.iter().find(|w| w.cgroup == id).expect("watched").counts.reads;
    assert_eq!((of(outer.id), of(inner.id)), (0, 1), "the deepest watched one wins");
    sensor.unwatch(inner.id);
    deep.run(one);
    assert_eq!(window(&mut sensor).counts.reads, 1, "and gives way again");
    drop(deep);
    drop(inner);
}

#[test]
fn a_slot_given_to_another_cgroup_starts_at_zero() {
    let config = warmswap_sensor::SensorConfig { watched_max: 1, ..Default::default() };
    let mut sensor = sensor_or_leave!("a_slot_given_to_another_cgroup_starts_at_zero", config);
    let (first, second) = (Cgroup::new(), Cgroup::new());
    sensor.watch(first.id).expect("watch");
    assert!(sensor.watch(second.id).is_err(), "one place only");
    first.run(|| 0);
    assert!(sensor.is_full());
    let last = sensor.unwatch(first.id).expect("was watched");
    assert_eq!(last.cgroup, first.id);
    assert_ne!(last.counts, Default::default(), "what it did last is told");
    assert!(sensor.windows().is_empty() && sensor.unwatch(first.id).is_none() && !sensor.is_full());
    sensor.watch(second.id).expect("watch");
    first.run(|| 0);
    assert_eq!(window(&mut sensor).counts, Default::default());
}

#[test]
fn run_time_is_charged_also_while_a_process_never_gives_up_its_cpu() {
    let mut sensor = sensor_or_leave!("run_time_is_charged_also_while_a_process_never_gives_up_its_cpu");
    need_probe!("run_time_is_charged_also_while_a_process_never_gives_up_its_cpu", sensor, "run-time");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let burn = |ms: i64| {
        let cpu_ms = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: our own stack.
            unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
            time.tv_sec * 1000 + time.tv_nsec / 1_000_000
        };
        let begin = cpu_ms();
        while cpu_ms() - begin < ms {}
        0
    };
    let child = cgroup.spawn(move || burn(400));
    let begin = Instant::now();
    let mut charged_while_running = 0;
    while charged_while_running == 0 && begin.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
        charged_while_running = window(&mut sensor).counts.run_ns;
    }
    assert_eq!(child.wait(), 0);
    let total_ms = (charged_while_running + window(&mut sensor).counts.run_ns) as f64 / 1e6;
    // The process's own clock leaves out stolen and interrupt time, which ours contains; in an emulated machine that
    // can be most of it. One thread cannot have run for longer than the time that has passed.
    let passed_ms = begin.elapsed().as_secs_f64() * 1e3 + 50.0;
    assert!((390.0..passed_ms).contains(&total_ms), "400 ms of CPU in {passed_ms:.0} were counted as {total_ms:.1} ms");
    assert!(charged_while_running > 0);
}

/// The kernel gives a thread that starts a program the number of its process, and its birthday.
#[test]
fn a_thread_that_starts_a_program_is_not_taken_for_its_process() {
    const TEST: &str = "a_thread_that_starts_a_program_is_not_taken_for_its_process";
    let mut sensor = sensor_or_leave!("a_thread_that_starts_a_program_is_not_taken_for_its_process");
    need_probe!("a_thread_that_starts_a_program_is_not_taken_for_its_process", sensor, "run-time", "file-bytes");
    extern "C" fn start(_: *mut libc::c_void) -> i32 {
        let pause = libc::timespec { tv_sec: 0, tv_nsec: 300_000_000 };
        // SAFETY: our own stack and constant texts; the last argument ends the list.
        unsafe {
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
            libc::execl(c"/bin/true".as_ptr(), c"true".as_ptr(), std::ptr::null::<libc::c_char>());
        }
        98
    }
    const STACK: usize = 64 * 1024;
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let begin = Instant::now();
    let child = cgroup.spawn(|| {
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(100) {
            std::hint::spin_loop();
        }
        // SAFETY: a new mapping for the thread's stack, which it has to itself; it uses nothing of this one's but what it is given.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let stack = libc::mmap(std::ptr::null_mut(), STACK, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            let shared = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND;
            let flags = shared | libc::CLONE_THREAD | libc::CLONE_SYSVSEM;
            if libc::clone(start, stack.cast::<u8>().add(STACK).cast(), flags, std::ptr::null_mut()) < 0 {
                return 97;
            }
            loop {
                libc::pause();
            }
        }
    });
    let (mut run_ns, mut reads, mut faults) = (0u64, 0u64, 0u64);
    let mut look = |sensor: &mut _| {
        let counts = window(sensor).counts;
        run_ns = run_ns.saturating_add(counts.run_ns);
        reads = reads.saturating_add(counts.reads);
        faults = faults.saturating_add(counts.page_faults);
    };
    // Both threads are known before the one becomes the other.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        look(&mut sensor);
    }
    assert_eq!(child.wait(), 0, "{TEST}");
    // What it ran for at the end is known when it is gone.
    std::thread::sleep(Duration::from_millis(200));
    look(&mut sensor);
    let passed_ns = begin.elapsed().as_nanos() as u64;
    assert!(run_ns > 10_000_000 && run_ns < passed_ns, "{run_ns} ns of CPU in {passed_ns}");
    assert!(reads < 10_000 && faults < 100_000, "{reads} reads, {faults} faults");
}

/// It reads, writes and faults, and nothing makes it stop; what it did is known while it goes on.
#[test]
fn reads_and_faults_are_counted_also_while_a_process_never_gives_up_its_cpu() {
    const TEST: &str = "reads_and_faults_are_counted_also_while_a_process_never_gives_up_its_cpu";
    let mut sensor = sensor_or_leave!("reads_and_faults_are_counted_also_while_a_process_never_gives_up_its_cpu");
    need_probe!(
        "reads_and_faults_are_counted_also_while_a_process_never_gives_up_its_cpu",
        sensor,
        "file-bytes",
        "page-faults"
    );
    const ROUNDS: usize = 1000;
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let page = 4096;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, in which the two tell each other how far they are.
    let shared = unsafe { libc::mmap(std::ptr::null_mut(), page, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    let word = |at: usize| {
        // SAFETY: inside the page, which stays to the end of the test.
        unsafe { &*shared.cast::<std::sync::atomic::AtomicU64>().add(at) }
    };
    let child = cgroup.spawn(|| {
        // SAFETY: system calls on constant paths and our own mapping, written inside its bounds.
        unsafe {
            let (from, to) = (libc::open(c"/dev/zero".as_ptr(), 0), libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY));
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let length = ROUNDS * page;
            let base = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            libc::madvise(base, length, libc::MADV_NOHUGEPAGE);
            for round in 0..ROUNDS {
                // Each round touches a page for the first time.
                let buffer = base.cast::<u8>().add(round * page).cast();
                if libc::read(from, buffer, 16) != 16 || libc::write(to, buffer, 7) != 7 {
                    return 1;
                }
            }
        }
        word(0).store(1, std::sync::atomic::Ordering::SeqCst);
        while word(1).load(std::sync::atomic::Ordering::SeqCst) == 0 {
            std::hint::spin_loop();
        }
        0
    });
    let waits = Instant::now();
    while word(0).load(std::sync::atomic::Ordering::SeqCst) == 0 {
        assert!(waits.elapsed() < Duration::from_secs(60), "{TEST}: the child does not get on");
        std::hint::spin_loop();
    }
    // It spins now; whether it was switched away meanwhile or not, all of it is there.
    let counts = window(&mut sensor).counts;
    word(1).store(1, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(child.wait(), 0);
    let rounds = ROUNDS as u64;
    assert_eq!((counts.reads, counts.read_bytes), (rounds + 1, 16 * rounds + 1), "and the byte that let it go");
    assert_eq!((counts.writes, counts.write_bytes), (rounds, 7 * rounds));
    assert!((rounds..rounds + 100).contains(&counts.page_faults), "{counts:?}");
    let later = window(&mut sensor).counts;
    assert_eq!((later.reads, later.writes), (0, 0));
    // SAFETY: our own mapping, which nobody uses any more.
    unsafe { libc::munmap(shared, page) };
}

#[test]
fn touched_pages_are_faults() {
    let mut sensor = sensor_or_leave!("touched_pages_are_faults");
    need_probe!("touched_pages_are_faults", sensor, "page-faults");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    const PAGES: usize = 300;
    let touch = |pages: usize| {
        // SAFETY: a new mapping, written inside its bounds.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let length = PAGES * 4096;
            let base = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            libc::madvise(base, length, libc::MADV_NOHUGEPAGE);
            for page in 0..pages {
                base.cast::<u8>().add(page * 4096).write_volatile(1);
            }
        }
        0
    };
    cgroup.run(move || touch(0));
    let without = window(&mut sensor).counts.page_faults;
    cgroup.run(move || touch(PAGES));
    let with = window(&mut sensor).counts.page_faults;
    let more = with.saturating_sub(without);
    assert!((PAGES as u64 - 5..PAGES as u64 + 20).contains(&more), "{PAGES} pages made {more} faults more");
}

#[test]
fn direct_writes_are_block_requests_and_told_sequential() {
    const TEST: &str = "direct_writes_are_block_requests_and_told_sequential";
    let mut sensor = sensor_or_leave!("direct_writes_are_block_requests_and_told_sequential");
    need_probe!("direct_writes_are_block_requests_and_told_sequential", sensor, "block-io");
    let cgroup = Cgroup::new();
    // As containers are: in the folder of the same path, too, where block I/O is on a v1 hierarchy.
    let v1 = warmswap_sensor::CgroupMounts::of_host().expect("mountinfo").v1_block;
    let v1 = v1.map(|root| Cgroup::at(root.join(cgroup.path.file_name().expect("a name"))));
    sensor.watch(cgroup.id).expect("watch");
    let path = support::scratch().join(format!("warmswap-block-{}", std::process::id()));
    const BLOCKS: usize = 64;
    std::fs::write(&path, vec![1u8; BLOCKS * 4096]).expect("a scratch file");
    std::fs::File::open(&path).and_then(|file| file.sync_all()).expect("on the disk");
    let text = std::ffi::CString::new(path.to_str().expect("plain name")).expect("no zero inside");
    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| {
        let mut byte = 0u8;
        // SAFETY: our own descriptor and stack.
        unsafe { libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1) };
        #[repr(align(4096))]
        struct Block([u8; 4096]);
        let block = Block([2; 4096]);
        // SAFETY: our own path and stack.
        unsafe {
            let fd = libc::open(text.as_ptr(), libc::O_WRONLY | libc::O_DIRECT);
            if fd < 0 {
                return 3;
            }
            for _ in 0..BLOCKS {
                if libc::write(fd, block.0.as_ptr().cast(), 4096) != 4096 {
                    return 3;
                }
            }
        }
        0
    });
    if let Some(v1) = &v1 {
        std::fs::write(v1.path.join("cgroup.procs"), child.pid.to_string()).expect("joins the v1 group");
    }
    std::fs::File::from(write).write_all(b"x").expect("lets the child go");
    let status = child.wait();
    std::fs::remove_file(&path).expect("removed");
    if status == 3 {
        println!("LEFT OUT: {TEST}: the file system of the target folder knows no O_DIRECT");
        return;
    }
    let seen = window(&mut sensor);
    let (counts, latency) = (seen.counts, seen.durations.block_latency);
    if counts.block_requests == 0 && !std::path::Path::new("/sys/block").exists() {
        println!("LEFT OUT: {TEST}: no block devices here");
        return;
    }
    // Where the controller is off in the parent, a request that a kernel thread issues in the child's stead is lost.
    let least = if v1.is_some() { BLOCKS as u64 } else { BLOCKS as u64 - 8 };
    assert!(counts.block_requests >= least, "{counts:?}");
    assert!((least * 4096..BLOCKS as u64 * 4096 * 2).contains(&counts.block_bytes), "{counts:?}");
    // The last ones may be completed a moment later; a flush, which has no length, is a request like any other.
    let mut timed = latency.count();
    for _ in 0..100 {
        if timed >= counts.block_requests {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        timed += window(&mut sensor).durations.block_latency.count();
    }
    let timings_on = sensor.probes().iter().any(|probe| probe.name == "block-latency" && probe.attached);
    assert!(!timings_on || timed == counts.block_requests, "{timed} of {counts:?}");
    assert!(latency.quantile_ns(0.5).is_none_or(|ns| ns > 1_000 && ns < 10_000_000_000), "{latency:?}");
    assert!(
        counts.block_sequential >= BLOCKS as u64 / 2 && counts.block_sequential < counts.block_requests,
        "{counts:?}"
    );
}

#[test]
fn reads_from_a_terminal_are_input_and_reads_from_a_pipe_are_not() {
    let mut sensor = sensor_or_leave!("reads_from_a_terminal_are_input_and_reads_from_a_pipe_are_not");
    need_probe!("reads_from_a_terminal_are_input_and_reads_from_a_pipe_are_not", sensor, "input");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let (master, ours) = support::terminal();
    let slave = ours.as_raw_fd();
    for line in [&b"first\n"[..], b"second\n", b"third\n"] {
        support::type_in(&master, line);
    }
    let (go, let_go) = support::pipe();
    let from = go.as_raw_fd();
    let child = cgroup.spawn(move || {
        let mut buffer = [0u8; 100];
        // SAFETY: our own descriptors and stack.
        unsafe {
            libc::read(from, buffer.as_mut_ptr().cast(), 1);
            libc::dup2(slave, 0);
            let read = |fd| libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len());
            let mut read = read;
            let lines = [read(0), read(0)];
            // With a descriptor above 2 it takes the controlling terminal to look further.
            libc::setsid();
            libc::ioctl(slave, libc::TIOCSCTTY, 0);
            let third = libc::read(slave, [0u8; 10].as_mut_ptr().cast(), 10);
            i32::from(lines != [6, 7] || third != 6)
        }
    });
    // It has the terminal open, as everything has that this process has open.
    until_input_is_counted(&mut sensor);
    std::fs::File::from(let_go).write_all(b"x").expect("lets the child go");
    let status = child.wait();
    drop((master, ours));
    assert_eq!(status, 0);
    let counts = window(&mut sensor).counts;
    assert_eq!(counts.tty_inputs, 3);
    assert_eq!(counts.reads, 4, "three lines and the byte from the pipe");
}

#[test]
fn a_program_that_is_started_with_a_terminal_is_noticed_by_itself() {
    let mut sensor = sensor_or_leave!("a_program_that_is_started_with_a_terminal_is_noticed_by_itself");
    need_probe!("a_program_that_is_started_with_a_terminal_is_noticed_by_itself", sensor, "input", "exec");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let (master, ours) = support::terminal();
    let slave = ours.as_raw_fd();
    let child = cgroup.spawn(move || {
        // SAFETY: our own descriptors and constant texts; the last argument ends the list.
        unsafe {
            libc::dup2(slave, 0);
            libc::dup2(libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY), 1);
            libc::execl(c"/bin/cat".as_ptr(), c"cat".as_ptr(), std::ptr::null::<libc::c_char>());
        }
        98
    });
    until_input_is_counted(&mut sensor);
    support::type_in(&master, b"a line\n");
    let begin = Instant::now();
    while window(&mut sensor).counts.tty_inputs == 0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "it is not counted");
        std::thread::sleep(Duration::from_millis(10));
    }
    // The end of the input.
    support::type_in(&master, b"\x04");
    assert_eq!(child.wait(), 0);
    drop((master, ours));
    // And when nobody can read any more.
    let begin = Instant::now();
    while sensor.input_is_counted() {
        assert!(begin.elapsed() < Duration::from_secs(80), "system calls go on being looked at");
        window(&mut sensor);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A process of the watched cgroup has a terminal open; that is found out soon.
fn until_input_is_counted(sensor: &mut warmswap_sensor::Sensor) {
    let begin = Instant::now();
    while !sensor.input_is_counted() {
        assert!(begin.elapsed() < Duration::from_secs(10), "nobody notices the terminal");
        std::thread::sleep(Duration::from_millis(10));
        window(sensor);
    }
}

#[test]
fn what_the_probes_cost_is_measured_when_somebody_asks() {
    let mut sensor = sensor_or_leave!("what_the_probes_cost_is_measured_when_somebody_asks");
    need_probe!("what_the_probes_cost_is_measured_when_somebody_asks", sensor, "exec", "fork", "exit");
    assert_eq!(sensor.drain_cpu_time(), None);
    sensor.start().expect("a thread");
    assert!(sensor.drain_cpu_time().is_some());
    let statistics = match sensor.measure_runs() {
        Ok(statistics) => statistics,
        Err(error) => {
            println!("LEFT OUT: what_the_probes_cost_is_measured_when_somebody_asks: {error}");
            return;
        }
    };
    let empty_ns = statistics.empty_ns();
    // An emulated processor takes its time.
    assert!(empty_ns > 1.0 && empty_ns < 100_000.0, "{empty_ns} ns");
    let before = sensor.runs();
    let cgroup = Cgroup::new();
    assert_eq!(cgroup.run(|| (0..100).map(|_| fork_exec(c"/bin/true")).sum()), 0);
    let after = sensor.runs();
    assert!(after.count - before.count >= 300, "{before:?} {after:?}");
    assert!(statistics.net(before, after) <= after.time - before.time);
}

#[test]
fn windows_of_some_leave_the_others_as_they_are() {
    let mut sensor = sensor_or_leave!("windows_of_some_leave_the_others_as_they_are");
    need_probe!("windows_of_some_leave_the_others_as_they_are", sensor, "file-bytes");
    let (first, second) = (Cgroup::new(), Cgroup::new());
    sensor.watch(first.id).expect("watch");
    sensor.watch(second.id).expect("watch");
    second.run(|| 0);
    assert_eq!(sensor.windows_of(|cgroup| cgroup == first.id).len(), 1);
    let windows = sensor.windows_of(|cgroup| cgroup == second.id);
    assert_eq!((windows.len(), windows[0].counts.reads), (1, 1));
}
