//! A kill for want of memory is seen, with its victim and its cgroup.

#[macro_use]
mod support;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use support::{Cgroup, window};
use warmswap_sensor::{Class, Classes, Detail, Subscription};

const LIMIT_BYTES: usize = 16 << 20;

/// A folder in which the memory of its members is limited: the v2 cgroup itself where it has the controller, else one
/// in the v1 hierarchy.
struct Limited {
    procs: PathBuf,
    own: Option<PathBuf>,
}

impl Limited {
    fn new(cgroup: &Cgroup) -> Result<Self, String> {
        if cgroup.path.join("memory.max").exists() {
            fs::write(cgroup.path.join("memory.max"), LIMIT_BYTES.to_string()).map_err(|e| e.to_string())?;
            let _ = fs::write(cgroup.path.join("memory.swap.max"), "0");
            return Ok(Self { procs: cgroup.path.join("cgroup.procs"), own: None });
        }
        let folder = PathBuf::from("/sys/fs/cgroup/memory").join(cgroup.path.file_name().expect("a name"));
        fs::create_dir(&folder).map_err(|e| format!("no memory controller: {}: {e}", folder.display()))?;
        let limited = Self { procs: folder.join("cgroup.procs"), own: Some(folder.clone()) };
        fs::write(folder.join("memory.limit_in_bytes"), LIMIT_BYTES.to_string()).map_err(|e| e.to_string())?;
        Ok(limited)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if let Some(folder) = &self.own {
            for _ in 0..100 {
                if fs::remove_dir(folder).is_ok() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            eprintln!("left behind: {}", folder.display());
        }
    }
}

#[test]
fn a_victim_is_told_at_once_and_counted() {
    const TEST: &str = "a_victim_is_told_at_once_and_counted";
    let mut sensor = sensor_or_leave!("a_victim_is_told_at_once_and_counted");
    need_probe!("a_victim_is_told_at_once_and_counted", sensor, "out-of-memory");
    let cgroup = Cgroup::new();
    let limited = match Limited::new(&cgroup) {
        Ok(limited) => limited,
        Err(reason) => {
            println!("LEFT OUT: {TEST}: {reason}");
            return;
        }
    };
    sensor.watch(cgroup.id).expect("watch");
    let wants = Subscription { classes: Classes::NONE.with(Class::Oom), everywhere: false, capacity: 16 };
    let events = sensor.subscribe(wants).expect("starts");
    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| {
        use std::os::fd::AsRawFd;
        let mut byte = 0u8;
        let length = 4 * LIMIT_BYTES;
        // SAFETY: our own descriptors and stack; a new mapping, written inside its bounds.
        unsafe {
            libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let base = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            for page in 0..length / 4096 {
                base.cast::<u8>().add(page * 4096).write_volatile(1);
            }
        }
        0
    });
    fs::write(&limited.procs, child.pid.to_string()).expect("joins the limited group");
    use std::io::Write;
    let pid = child.pid;
    let begin = Instant::now();
    fs::File::from(write).write_all(b"x").expect("lets the child go");
    let event = events.receiver().recv_timeout(Duration::from_secs(10)).expect("an event");
    assert!(matches!(event.detail, Detail::Oom { victim } if victim == pid as u32), "{event}");
    assert_eq!(event.cgroup, cgroup.id);
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(child.wait(), -libc::SIGKILL);
    assert_eq!(window(&mut sensor).counts.oom_kills, 1);
}
