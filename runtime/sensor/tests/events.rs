//! Events reach whoever wants them, and every record is accounted for.

#[macro_use]
mod support;

use std::time::Duration;

use support::{Cgroup, fork_exec, fork_exec_as, window};
use warmswap_sensor::{Accounting, Class, Classes, Detail, Event, Sensor, SensorConfig, Subscription, make_mark};

fn all(everywhere: bool) -> Subscription {
    Subscription { classes: Classes::ALL, everywhere, capacity: 10_000 }
}

/// emitted = consumed + discarded + dropped, once the rings are empty. Marks and out-of-memory kills come from the
/// whole host, so emptying may take more than one turn.
fn balanced(sensor: &mut Sensor) -> Accounting {
    for _ in 0..200 {
        sensor.flush().expect("runs");
        if sensor.accounting().classes.iter().all(|(_, totals)| totals.pending() == 0) {
            break;
        }
    }
    let accounting = sensor.accounting();
    assert_eq!(accounting.malformed, 0);
    for (class, t) in &accounting.classes {
        assert_eq!(t.emitted, t.consumed + t.discarded + t.dropped, "{class}: {t:?}");
    }
    accounting
}

#[test]
fn processes_are_told_in_order_with_path_and_exit_code() {
    let mut sensor = sensor_or_leave!("processes_are_told_in_order_with_path_and_exit_code");
    need_probe!("processes_are_told_in_order_with_path_and_exit_code", sensor, "exec", "fork", "exit");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let events = sensor.subscribe(all(false)).expect("starts");
    let status = cgroup.run(|| fork_exec(c"/bin/false"));
    assert_eq!(status, 1);
    sensor.flush().expect("runs");
    let events: Vec<Event> = events.receiver().try_iter().collect();
    assert!(events.iter().all(|event| event.cgroup == cgroup.id), "{events:?}");
    assert!(events.windows(2).all(|pair| pair[0].time_ns <= pair[1].time_ns), "{events:?}");
    let details: Vec<&Detail> = events.iter().map(|event| &event.detail).collect();
    let [
        Detail::Fork { child },
        Detail::Exec { path, .. },
        Detail::Exit { code: 1, signal: 0, .. },
        Detail::Exit { code: 1, .. },
    ] = details[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(path, "/bin/false");
    assert_eq!(events[1].pid, *child);
    assert_eq!(events[1].comm, "false");
    balanced(&mut sensor);
}

#[test]
fn launches_and_ends_are_told_with_name_user_and_age() {
    const TEST: &str = "launches_and_ends_are_told_with_name_user_and_age";
    let mut sensor = sensor_or_leave!("launches_and_ends_are_told_with_name_user_and_age");
    need_probe!("launches_and_ends_are_told_with_name_user_and_age", sensor, "exec", "exec-name", "fork", "exit");
    const USER: u32 = 4711;
    const SLEEP_MS: i64 = 60;
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let events = sensor.subscribe(all(false)).expect("starts");
    let status = cgroup.run(|| {
        // SAFETY: integers, then our own stack.
        unsafe {
            // The real user is the one that launches, whoever the effective one is.
            libc::setresuid(USER, 0, 0);
            let pause = libc::timespec { tv_sec: 0, tv_nsec: SLEEP_MS * 1_000_000 };
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
        }
        fork_exec_as(c"/bin/true", c"-true")
    });
    assert_eq!(status, 0, "{TEST}");
    sensor.flush().expect("runs");
    let events: Vec<Event> = events.receiver().try_iter().collect();
    assert!(events.iter().all(|event| event.uid == Some(USER)), "{events:?}");
    let launched = events.iter().find_map(|event| match &event.detail {
        Detail::Exec { path, name } => Some((path.as_str(), name.as_str())),
        _ => None,
    });
    assert_eq!(launched, Some(("/bin/true", "-true")), "{events:?}");
    let ages: Vec<u64> = events
        .iter()
        .filter_map(|event| if let Detail::Exit { age_ns, .. } = event.detail { Some(age_ns) } else { None })
        .collect();
    let [short, long] = ages[..] else { panic!("{events:?}") };
    assert!(long > SLEEP_MS as u64 * 1_000_000 && short > 0 && short < long - SLEEP_MS as u64 * 1_000_000, "{ages:?}");
}

#[test]
fn marks_arrive_with_kernel_time_from_any_cgroup() {
    let mut sensor = sensor_or_leave!("marks_arrive_with_kernel_time_from_any_cgroup");
    need_probe!("marks_arrive_with_kernel_time_from_any_cgroup", sensor, "marks");
    let marks = sensor.marks().expect("starts");
    let cgroup = Cgroup::new();
    let handover = 0xfeed_0000_0000 + u64::from(std::process::id());
    cgroup.run(|| {
        make_mark(1, handover, 4);
        make_mark(2, handover, 5);
        0
    });
    // Other tests of this program may make marks at the same time.
    let mut ours =
        std::iter::from_fn(|| marks.recv_timeout(Duration::from_secs(5)).ok()).filter(|mark| mark.handover == handover);
    let (first, second) = (ours.next().expect("the first mark"), ours.next().expect("the second mark"));
    assert_eq!((first.mark, first.generation, first.cgroup), (1, 4, cgroup.id));
    assert_eq!((second.mark, second.generation, second.cgroup), (2, 5, cgroup.id));
    assert!(second.time_ns > first.time_ns && second.pid == first.pid);
    let between = second.time_ns - first.time_ns;
    assert!(between < 50_000_000, "{between} ns between two system calls");
    let accounting = balanced(&mut sensor);
    assert!(accounting.of(Class::Mark).consumed >= 2 && accounting.of(Class::Mark).dropped == 0);
}

#[test]
fn overload_drops_events_as_numbers_and_counters_stay_exact() {
    let config =
        SensorConfig { bulk_ring_bytes: 4096, drain_interval: Duration::from_secs(3600), ..SensorConfig::default() };
    let mut sensor = sensor_or_leave!("overload_drops_events_as_numbers_and_counters_stay_exact", config);
    need_probe!("overload_drops_events_as_numbers_and_counters_stay_exact", sensor, "exec", "fork", "exit");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let events = sensor.subscribe(all(false)).expect("starts");
    const TIMES: u64 = 100;
    cgroup.run(|| (0..TIMES).map(|_| fork_exec(c"/bin/true")).sum());
    let before = sensor.accounting();
    assert_eq!(before.of(Class::Fork).emitted, TIMES);
    let accounting = balanced(&mut sensor);
    let dropped: u64 = accounting.classes.iter().map(|(_, t)| t.dropped).sum();
    let consumed: u64 = accounting.classes.iter().map(|(_, t)| t.consumed).sum();
    assert!(dropped > 0 && consumed > 0, "{accounting:?}");
    assert_eq!(events.receiver().try_iter().count() as u64, consumed);
    let counts = window(&mut sensor).counts;
    assert_eq!((counts.forks, counts.execs, counts.exits), (TIMES, TIMES, TIMES + 1));
}

#[test]
fn the_least_valuable_class_gives_way_first() {
    let config =
        SensorConfig { bulk_ring_bytes: 65_536, drain_interval: Duration::from_secs(3600), ..SensorConfig::default() };
    let mut sensor = sensor_or_leave!("the_least_valuable_class_gives_way_first", config);
    need_probe!("the_least_valuable_class_gives_way_first", sensor, "exec", "fork", "exit");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let events = sensor.subscribe(all(false)).expect("starts");
    // Some 340 bytes each: three times what the ring holds.
    cgroup.run(|| (0..600).map(|_| fork_exec(c"/bin/true")).sum());
    let accounting = balanced(&mut sensor);
    let [fork, exit, exec] = [Class::Fork, Class::Exit, Class::Exec].map(|class| accounting.of(class));
    assert!(fork.consumed < exit.consumed && exit.consumed < exec.consumed, "{fork:?} {exit:?} {exec:?}");
    assert_eq!((fork.shed, exit.shed, exec.shed), (fork.dropped, exit.dropped, 0), "only launches find the ring full");
    assert!(exec.dropped > 0, "{exec:?}");
    drop(events);
}

#[test]
fn a_slow_subscriber_loses_events_and_knows_how_many() {
    let mut sensor = sensor_or_leave!("a_slow_subscriber_loses_events_and_knows_how_many");
    need_probe!("a_slow_subscriber_loses_events_and_knows_how_many", sensor, "fork");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let wants = Subscription { classes: Classes::NONE.with(Class::Fork), everywhere: false, capacity: 3 };
    let events = sensor.subscribe(wants).expect("starts");
    cgroup.run(|| (0..10).map(|_| fork_exec(c"/bin/true")).sum());
    sensor.flush().expect("runs");
    assert_eq!((events.receiver().try_iter().count(), events.lost()), (3, 7));
    let accounting = sensor.accounting();
    let forks = accounting.of(Class::Fork);
    assert_eq!((forks.emitted, forks.consumed, forks.discarded), (10, 3, 7));
    assert_eq!(accounting.of(Class::Exec).emitted, 0, "a class nobody wants is not sent");
    balanced(&mut sensor);

    // A subscriber that is gone does not keep the class on, also when no event shows that it is.
    drop(events);
    std::thread::sleep(4 * warmswap_sensor::SensorConfig::default().drain_interval);
    cgroup.run(|| fork_exec(c"/bin/true"));
    sensor.flush().expect("runs");
    let forks = sensor.accounting().of(Class::Fork);
    assert_eq!((forks.emitted, forks.discarded), (10, 7));
}

#[test]
fn events_of_unwatched_cgroups_come_only_to_who_asks_and_never_our_own() {
    let mut sensor = sensor_or_leave!("events_of_unwatched_cgroups_come_only_to_who_asks_and_never_our_own");
    need_probe!("events_of_unwatched_cgroups_come_only_to_who_asks_and_never_our_own", sensor, "exec", "fork");
    let (watched, other) = (Cgroup::new(), Cgroup::new());
    sensor.watch(watched.id).expect("watch");
    let near = sensor.subscribe(all(false)).expect("starts");
    let far = sensor.subscribe(all(true)).expect("starts");
    other.run(|| fork_exec(c"/bin/true"));
    std::process::Command::new("/bin/true").status().expect("runs");
    sensor.flush().expect("runs");
    let near: Vec<Event> = near.receiver().try_iter().collect();
    let far: Vec<Event> = far.receiver().try_iter().collect();
    // OOM kills and marks come from everywhere, but not to a subscriber of watched cgroups.
    assert!(near.is_empty(), "{near:?}");
    assert!(
        far.iter()
            .any(|e| e.cgroup == other.id && matches!(&e.detail, Detail::Exec { path, .. } if path == "/bin/true"))
    );
    let own = std::process::id();
    assert!(far.iter().all(|event| event.pid != own), "{far:?}");
    balanced(&mut sensor);
}

#[test]
fn tcp_states_are_told_with_ports() {
    let mut sensor = sensor_or_leave!("tcp_states_are_told_with_ports");
    need_probe!("tcp_states_are_told_with_ports", sensor, "tcp-state");
    let wants = Subscription { classes: Classes::NONE.with(Class::Tcp), everywhere: true, capacity: 100_000 };
    let events = sensor.subscribe(wants).expect("starts");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listens");
    let address = listener.local_addr().expect("bound");
    let client = std::net::TcpStream::connect(address).expect("connects");
    let client_port = client.local_addr().expect("bound").port();
    // SAFETY: no arguments.
    let user = unsafe { libc::getuid() };
    let accepted = listener.accept().expect("accepts");
    drop(accepted);
    drop(client);
    sensor.flush().expect("runs");
    let server_port = address.port();
    let found = events.receiver().try_iter().any(|event| {
        matches!(&event.detail, Detail::Tcp { old, new, local_port, remote_port }
            if old == "syn-recv" && new == "established" && (*local_port, *remote_port) == (server_port, client_port))
            && event.uid == Some(user)
    });
    assert!(found, "the accepted connection was established");
}
