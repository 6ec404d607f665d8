//! Alone in its binary: looks at all BPF objects of this process.

#[macro_use]
mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use warmswap_sensor::SensorConfig;

/// Ids of the BPF programs and links this process holds, from its descriptors.
fn held() -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").expect("procfs").flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        for line in text.lines() {
            if let Some(id) = line.strip_prefix("prog_id:") {
                ids.insert(format!("prog {}", id.trim()));
            } else if let Some(id) = line.strip_prefix("link_id:") {
                ids.insert(format!("link {}", id.trim()));
            } else if let Some(id) = line.strip_prefix("map_id:") {
                ids.insert(format!("map {}", id.trim()));
            }
        }
    }
    ids
}

/// Whether the kernel still has an object of this id.
fn exists(id: &str) -> bool {
    let (kind, number) = id.split_once(' ').expect("kind and number");
    let number: u32 = number.parse().expect("a number");
    const GET_FD_BY_ID: [(&str, libc::c_long); 3] = [("prog", 13), ("map", 14), ("link", 30)];
    let command = GET_FD_BY_ID.iter().find(|(name, _)| *name == kind).expect("a known kind").1;
    let mut attributes = [0u32; 16];
    attributes[0] = number;
    // SAFETY: a zeroed attribute block with the id in its first word, as the three commands want it.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes)) };
    if fd >= 0 {
        // SAFETY: the descriptor just made.
        unsafe { libc::close(fd as i32) };
    }
    fd >= 0
}

#[test]
fn nothing_stays_in_the_kernel_or_in_the_process() {
    assert_sensor_leaves_nothing(false);
    assert_sensor_leaves_nothing(true);
    assert_check_leaves_nothing(&held());
}

fn assert_sensor_leaves_nothing(probe_log: bool) {
    let threads_and_descriptors =
        || ["task", "fd"].map(|of| std::fs::read_dir(format!("/proc/self/{of}")).expect("procfs").count());
    let (held_before, before) = (held(), threads_and_descriptors());
    let config = SensorConfig { probe_log, ..SensorConfig::default() };
    let mut sensor = sensor_or_leave!("nothing_stays_in_the_kernel_or_in_the_process", config);
    sensor.start().expect("starts");
    let marks = sensor.marks().expect("starts");
    let ids = held();
    assert!(ids.len() > held_before.len() + 20, "programs, links and maps: {ids:?}");
    assert!(ids.iter().all(|id| exists(id)));
    drop(sensor);
    assert!(marks.recv().is_err(), "the taker of marks learns of the end");
    assert_eq!(held(), held_before);
    assert_eq!(threads_and_descriptors(), before);
    // The kernel frees programs a grace period after their last use.
    let begin = Instant::now();
    while ids.iter().any(|id| exists(id)) {
        let left: Vec<_> = ids.iter().filter(|id| exists(id)).collect();
        assert!(begin.elapsed() < Duration::from_secs(5), "still there: {left:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn assert_check_leaves_nothing(held_before: &BTreeSet<String>) {
    let findings = warmswap_sensor::check();
    for finding in &findings {
        println!("{finding:?}");
    }
    assert!(findings.iter().filter(|finding| finding.name.starts_with("probe ")).count() >= 15);
    assert_eq!(&held(), held_before);
}
