//! Whether a process of a cgroup can read input: it has a terminal, or an input device, open.
//!
//! ```text
//! windows() ──folder, when it is time──▶ a thread that looks through /proc ──▶ a flag per cgroup ──▶ windows()
//! ```

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded};
use warmswap_events::InputDevice;

/// A program opens its devices soon after it began or never, so they are looked for soon after, then ever less often.
const SOON: Duration = Duration::from_secs(1);
const RARELY: Duration = Duration::from_secs(60);
/// How much of a process is looked at, and of a cgroup in one look. The lowest descriptors come first, and devices are opened
/// early.
const DESCRIPTORS_MAX: usize = 1024;
const LOOKS_MAX: usize = 1 << 16;
/// Looks that may wait; one that finds no room is done later.
const WAITING_MAX: usize = 256;

/// What is known of one cgroup.
#[derive(Debug)]
pub(crate) struct Readers {
    any: Arc<AtomicBool>,
    next: Instant,
    wait: Duration,
}

impl Readers {
    /// Nothing is known; it is looked at when asked first.
    pub(crate) fn unknown() -> Self {
        Self { any: Arc::default(), next: Instant::now(), wait: SOON }
    }

    pub(crate) fn any(&self) -> bool {
        // Relaxed: a flag, which orders nothing.
        self.any.load(Ordering::Relaxed)
    }

    /// Something was started there: it is time to look soon, and to do so often.
    pub(crate) fn expect(&mut self, now: Instant) {
        self.next = self.next.min(now + SOON);
        self.wait = SOON;
    }

    pub(crate) fn is_time(&self, now: Instant) -> bool {
        self.next <= now
    }

    fn looked(&mut self, now: Instant) {
        self.next = now + self.wait;
        self.wait = (self.wait * 2).min(RARELY);
    }
}

struct Look {
    folder: PathBuf,
    any: Arc<AtomicBool>,
}

/// The thread that looks; ends when dropped.
#[derive(Debug)]
pub(crate) struct Lookout {
    looks: Option<Sender<Look>>,
    thread: Option<JoinHandle<()>>,
}

impl Lookout {
    pub(crate) fn start() -> std::io::Result<Self> {
        let (looks, receiver) = bounded::<Look>(WAITING_MAX);
        let thread = std::thread::Builder::new().name("warmswap-input".to_owned()).spawn(move || {
            for look in receiver {
                look.any.store(in_cgroup(look.folder), Ordering::Relaxed);
            }
        })?;
        Ok(Self { looks: Some(looks), thread: Some(thread) })
    }

    /// Has it looked at, soon.
    pub(crate) fn look(&self, readers: &mut Readers, folder: PathBuf, now: Instant) {
        let look = Look { folder, any: Arc::clone(&readers.any) };
        if self.looks.as_ref().is_some_and(|looks| looks.try_send(look).is_ok()) {
            readers.looked(now);
        }
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.looks = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that looks for readers of input had panicked");
        }
    }
}

/// In this cgroup or below it. What cannot be read is gone.
fn in_cgroup(folder: PathBuf) -> bool {
    let (mut folders, mut looks) = (VecDeque::from([folder]), LOOKS_MAX);
    while let Some(folder) = folders.pop_front() {
        let processes = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines() {
            if looks == 0 {
                return false;
            }
            if is_reader(pid, &mut looks) {
                return true;
            }
        }
        let below = fs::read_dir(&folder).into_iter().flatten().flatten();
        let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path());
        folders.extend(below.take(looks));
        looks = looks.saturating_sub(1);
    }
    false
}

/// Takes what it looks at from `looks`.
fn is_reader(pid: &str, looks: &mut usize) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    *looks = looks.saturating_sub(1);
    descriptors.take((*looks).min(DESCRIPTORS_MAX)).any(|entry| {
        *looks -= 1;
        device_of(&entry.path()).is_some_and(|(major, minor)| InputDevice::of(major, minor).is_some())
    })
}

/// The device that a descriptor in `/proc` is of, whatever it is called in its container; `None` for all else. Asks no server of
/// files: one that does not answer would hold us.
fn device_of(descriptor: &Path) -> Option<(u32, u32)> {
    let path = CString::new(descriptor.as_os_str().as_bytes()).ok()?;
    // SAFETY: zero is a value of every field.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: a path that ends with zero, and room for the answer.
    let result = unsafe {
        libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, libc::STATX_TYPE, &raw mut found)
    };
    let is_character_device = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
    (result == 0 && is_character_device).then_some((found.stx_rdev_major, found.stx_rdev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_found_among_the_descriptors_and_nothing_else_is_taken_for_one() {
        let me = std::process::id().to_string();
        let null = fs::File::open("/dev/null").expect("every Linux has it");
        // Whoever runs the tests may do so from a terminal.
        let before = is_reader(&me, &mut LOOKS_MAX.clone());
        let (mut master, mut slave) = (0, 0);
        let nobody = std::ptr::null_mut();
        // SAFETY: room for two descriptors, no names or settings.
        assert_eq!(unsafe { libc::openpty(&raw mut master, &raw mut slave, nobody, nobody.cast(), nobody.cast()) }, 0);
        assert!(is_reader(&me, &mut LOOKS_MAX.clone()));
        // SAFETY: our own descriptors, closed once.
        unsafe {
            libc::close(master);
            libc::close(slave);
        }
        assert_eq!(is_reader(&me, &mut LOOKS_MAX.clone()), before);
        assert!(!is_reader("0", &mut LOOKS_MAX.clone()), "nobody");
        drop(null);
    }

    #[test]
    fn it_is_looked_for_soon_after_a_launch_and_rarely_later() {
        let mut readers = Readers::unknown();
        let begin = Instant::now();
        let looks_in = |readers: &mut Readers, seconds: std::ops::Range<u64>, launches: bool| {
            let mut looks = 0;
            for second in seconds {
                let now = begin + Duration::from_secs(second);
                if readers.is_time(now) {
                    readers.looked(now);
                    looks += 1;
                }
                if launches {
                    readers.expect(now);
                }
            }
            looks
        };
        assert!((5..10).contains(&looks_in(&mut readers, 1..60, false)));
        assert!((9..12).contains(&looks_in(&mut readers, 60..660, false)));
        readers.expect(begin + Duration::from_secs(660));
        assert!((4..8).contains(&looks_in(&mut readers, 660..690, false)));
        assert!((25..=30).contains(&looks_in(&mut readers, 690..720, true)), "no more than once a second");
    }

    #[test]
    fn a_look_ends_however_much_there_is() {
        let me = std::process::id().to_string();
        let mut looks = 2;
        is_reader(&me, &mut looks);
        assert!(looks <= 1);
        is_reader(&me, &mut looks);
        assert_eq!(looks, 0);
        assert!(!in_cgroup(PathBuf::from("/nowhere")));
    }
}
