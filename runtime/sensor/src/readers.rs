//! Whether a process of a cgroup can read input: it has a terminal, or an input device, open.

use std::fs;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use warmswap_events::InputDevice;

/// A program opens its devices soon after it began or never, so they are looked for soon after, then ever less often.
const SOON: Duration = Duration::from_secs(1);
const RARELY: Duration = Duration::from_secs(60);

/// What is known of one cgroup.
#[derive(Debug)]
pub(crate) struct Readers {
    pub(crate) any: bool,
    next: Instant,
    wait: Duration,
}

impl Readers {
    /// Nothing is known; it is looked at when asked first.
    pub(crate) fn unknown() -> Self {
        Self { any: false, next: Instant::now(), wait: SOON }
    }

    /// Something was started there: it is time to look, and to do so often.
    pub(crate) fn expect(&mut self) {
        self.next = Instant::now();
        self.wait = SOON;
    }

    pub(crate) fn is_time(&self, now: Instant) -> bool {
        self.next <= now
    }

    pub(crate) fn look(&mut self, folder: &Path, now: Instant) {
        self.any = in_cgroup(folder);
        self.next = now + self.wait;
        self.wait = (self.wait * 2).min(RARELY);
    }
}

/// In this cgroup or below it. What cannot be read is gone.
fn in_cgroup(folder: &Path) -> bool {
    let processes = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    processes.lines().any(is_reader)
        || fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()) && in_cgroup(&entry.path()))
}

fn is_reader(pid: &str) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    // Follows to what is open, whatever it is called in the container.
    descriptors.filter_map(|entry| fs::metadata(entry.path()).ok()).any(|file| {
        let device = file.st_rdev();
        file.file_type().is_char_device() && InputDevice::of(libc::major(device), libc::minor(device)).is_some()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_found_among_the_descriptors_and_nothing_else_is_taken_for_one() {
        let me = std::process::id().to_string();
        let null = fs::File::open("/dev/null").expect("every Linux has it");
        // Whoever runs the tests may do so from a terminal.
        let before = is_reader(&me);
        let (mut master, mut slave) = (0, 0);
        let nobody = std::ptr::null_mut();
        // SAFETY: room for two descriptors, no names or settings.
        assert_eq!(unsafe { libc::openpty(&raw mut master, &raw mut slave, nobody, nobody.cast(), nobody.cast()) }, 0);
        assert!(is_reader(&me));
        // SAFETY: our own descriptors, closed once.
        unsafe {
            libc::close(master);
            libc::close(slave);
        }
        assert_eq!(is_reader(&me), before);
        assert!(!is_reader("0"), "nobody");
        drop(null);
    }

    #[test]
    fn it_is_looked_for_soon_after_a_launch_and_rarely_later() {
        let mut readers = Readers::unknown();
        let mut now = Instant::now();
        let begin = now;
        let mut looks = 0;
        while now - begin < Duration::from_secs(600) {
            if readers.is_time(now) {
                readers.look(Path::new("/nowhere"), now);
                looks += 1;
            }
            now += Duration::from_secs(1);
        }
        assert!((10..20).contains(&looks), "{looks}");
        assert!(!readers.is_time(now - Duration::from_secs(1)) || !readers.is_time(now - Duration::from_secs(59)));
        readers.expect();
        assert!(readers.is_time(Instant::now()));
    }
}
