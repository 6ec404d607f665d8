//! Our own cgroups, on a pure v2 host and on one that keeps controllers in v1 hierarchies (hybrid).
//!
//! Every container has a v2 group: its inode is the container's id for the probes, and freezing, killing and "is anybody
//! left" are asked of v2 alone, which answers them without any controller. Limits and usage are asked of v2 or of the v1
//! hierarchies, wherever the controller is.
//!
//! Not here: which limits a container gets (`policy`), and the host's own groups, which are never touched beyond
//! enabling controllers for our children on a pure v2 host.

mod limits;
mod usage;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use warmswap_model::CgroupId;

pub(crate) use limits::write_limits;
pub(crate) use usage::read_usage;

use crate::BackendError;

/// The v1 controllers that limit or count; the others (devices, freezer, …) are not needed, and every attach costs.
const V1_CONTROLLERS: [&str; 6] = ["cpu", "cpuacct", "cpuset", "memory", "blkio", "pids"];
/// The same on v2.
const V2_CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "memory", "io", "pids"];
/// How long a group may take to become empty after everything in it was killed.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// The hierarchies of this host.
#[derive(Debug, Clone)]
pub(crate) struct Hierarchies {
    pub(crate) v2: PathBuf,
    /// Controllers that v2 has.
    pub(crate) v2_controllers: Vec<String>,
    /// Mount point of each v1 controller that we use.
    pub(crate) v1: BTreeMap<&'static str, PathBuf>,
}

impl Hierarchies {
    pub(crate) fn detect() -> Result<Self, BackendError> {
        let path = Path::new("/proc/self/mountinfo");
        let text = fs::read_to_string(path).map_err(file_error("read", path))?;
        let mut found = Self::from_mountinfo(&text)
            .ok_or(BackendError::Unsupported { feature: "cgroup v2", remedy: "mount it at /sys/fs/cgroup" })?;
        let controllers = fs::read_to_string(found.v2.join("cgroup.controllers")).unwrap_or_default();
        found.v2_controllers = controllers.split_ascii_whitespace().map(str::to_owned).collect();
        Ok(found)
    }

    fn from_mountinfo(text: &str) -> Option<Self> {
        let mut v2 = None;
        let mut v1 = BTreeMap::new();
        for line in text.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let (mut before, mut after) = (before.split(' ').skip(3), after.split(' '));
            let (Some(root), Some(mount_point)) = (before.next(), before.next()) else { continue };
            // A part of a hierarchy, mounted somewhere else, is not the hierarchy.
            if root != "/" {
                continue;
            }
            match after.next() {
                Some("cgroup2") if v2.is_none() => v2 = Some(PathBuf::from(mount_point)),
                Some("cgroup") => {
                    let options = after.nth(1).unwrap_or_default();
                    for controller in V1_CONTROLLERS {
                        if options.split(',').any(|option| option == controller) {
                            v1.entry(controller).or_insert_with(|| PathBuf::from(mount_point));
                        }
                    }
                }
                _ => {}
            }
        }
        Some(Self { v2: v2?, v2_controllers: Vec::new(), v1 })
    }

    pub(crate) fn has_v2(&self, controller: &str) -> bool {
        self.v2_controllers.iter().any(|c| c == controller)
    }

    /// The distinct v1 hierarchies: two controllers may share one.
    fn v1_roots(&self) -> Vec<&Path> {
        let mut roots: Vec<&Path> = self.v1.values().map(PathBuf::as_path).collect();
        roots.sort_unstable();
        roots.dedup();
        roots
    }

    /// The hierarchies' roots, v2 first.
    fn roots(&self) -> Vec<&Path> {
        std::iter::once(self.v2.as_path()).chain(self.v1_roots()).collect()
    }
}

/// One group, in every hierarchy. `relative` is the same path below each root.
#[derive(Debug, Clone)]
pub(crate) struct Group<'a> {
    pub(crate) hierarchies: &'a Hierarchies,
    pub(crate) relative: PathBuf,
}

impl<'a> Group<'a> {
    pub(crate) fn new(hierarchies: &'a Hierarchies, relative: PathBuf) -> Self {
        Self { hierarchies, relative }
    }

    pub(crate) fn v2(&self) -> PathBuf {
        self.hierarchies.v2.join(&self.relative)
    }

    pub(crate) fn v1(&self, controller: &str) -> Option<PathBuf> {
        Some(self.hierarchies.v1.get(controller)?.join(&self.relative))
    }

    pub(crate) fn id(&self) -> Result<CgroupId, BackendError> {
        let path = self.v2();
        fs::metadata(&path).map(|m| CgroupId(m.ino())).map_err(file_error("look at", &path))
    }

    pub(crate) fn exists(&self) -> bool {
        self.v2().is_dir()
    }

    /// Makes the v2 group only: for processes that shall be found and killed but not limited.
    pub(crate) fn create_v2(&self) -> Result<(), BackendError> {
        make(&self.v2())
    }

    /// Makes the group in every hierarchy, and its parents. Controllers must be enabled by the parents for it to have
    /// limits: see [`Self::enable_for_children`].
    pub(crate) fn create(&self) -> Result<(), BackendError> {
        for root in self.hierarchies.roots() {
            make(&root.join(&self.relative))?;
        }
        self.initialise_cpuset()
    }

    /// A v1 cpuset begins empty and takes no process then: copy what each parent has, from the top down.
    fn initialise_cpuset(&self) -> Result<(), BackendError> {
        let Some(root) = self.hierarchies.v1.get("cpuset") else { return Ok(()) };
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let mut folder = root.clone();
            let mut value = read(&folder.join(file))?;
            for part in &self.relative {
                folder.push(part);
                let path = folder.join(file);
                let own = read(&path)?;
                if own.trim().is_empty() {
                    write(&path, value.trim())?;
                } else {
                    value = own;
                }
            }
        }
        Ok(())
    }

    /// Lets children of this v2 group have controllers, and so all groups above it. From then on no process may be in it.
    pub(crate) fn enable_for_children(&self) {
        let mut folder = self.hierarchies.v2.clone();
        let mut levels = vec![folder.clone()];
        for part in &self.relative {
            folder.push(part);
            levels.push(folder.clone());
        }
        for level in levels {
            let path = level.join("cgroup.subtree_control");
            let enabled = fs::read_to_string(&path).unwrap_or_default();
            for controller in V2_CONTROLLERS {
                let missing = !enabled.split_ascii_whitespace().any(|c| c == controller);
                if missing
                    && self.hierarchies.has_v2(controller)
                    && let Err(error) = fs::write(&path, format!("+{controller}"))
                {
                    tracing::warn!(path = %path.display(), controller, %error,
                        "cannot enable a cgroup controller: its limits will not hold");
                }
            }
        }
    }

    /// Takes the controllers of the children away again, so that a process may join this group.
    /// Only for a group without populated children: they would lose their limits.
    pub(crate) fn disable_for_children(&self) {
        let path = self.v2().join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&path).unwrap_or_default();
        for controller in enabled.split_ascii_whitespace() {
            // Whoever joins next is told by the kernel if this did not help.
            let _ = fs::write(&path, format!("-{controller}"));
        }
    }

    /// The `cgroup.procs` files of the group in every hierarchy, for [`attach`] from where the hierarchies cannot be seen.
    pub(crate) fn open_procs(&self) -> Result<Vec<fs::File>, BackendError> {
        let open = |root: &Path| {
            let path = root.join(&self.relative).join("cgroup.procs");
            fs::OpenOptions::new().write(true).open(&path).map_err(file_error("open", &path))
        };
        self.hierarchies.roots().into_iter().map(open).collect()
    }

    /// Whether any process is in the v2 group or below it.
    pub(crate) fn is_populated(&self) -> bool {
        event(&self.v2(), "populated") == Some(true)
    }

    /// Whether a process is in the v2 group or below it.
    pub(crate) fn has_process(&self, pid: i32) -> bool {
        lists(&self.v2(), &pid.to_string())
    }

    /// Freezes or thaws; returns when the kernel confirms it.
    pub(crate) fn set_frozen(&self, frozen: bool, timeout: Duration) -> Result<(), BackendError> {
        let folder = self.v2();
        write(&folder.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        let deadline = Instant::now() + timeout;
        let mut pause = Duration::from_micros(10);
        while event(&folder, "frozen") != Some(frozen) {
            if Instant::now() >= deadline {
                let source =
                    io::Error::new(io::ErrorKind::TimedOut, format!("not confirmed within {} ms", timeout.as_millis()));
                let action = if frozen { "freeze" } else { "thaw" };
                return Err(BackendError::File { action, path: folder, source });
            }
            // The state mostly changes within microseconds, and an inotify watch costs more than a few reads.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Kills every process in the group and below, frozen ones too, and waits until none is left.
    pub(crate) fn kill(&self) -> Result<(), BackendError> {
        let folder = self.v2();
        if !folder.is_dir() {
            return Ok(());
        }
        let kill = folder.join("cgroup.kill");
        let deadline = Instant::now() + EMPTY_TIMEOUT;
        let mut pause = Duration::from_micros(50);
        loop {
            if fs::write(&kill, "1").is_err() {
                kill_each(&folder);
            }
            if !self.is_populated() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let source = io::Error::new(io::ErrorKind::TimedOut, "processes are left after SIGKILL");
                return Err(BackendError::File { action: "empty", path: folder, source });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    /// Removes the group, with everything below it, in every hierarchy. It must be empty of processes.
    pub(crate) fn remove(&self) -> Result<(), BackendError> {
        for root in self.hierarchies.roots() {
            remove_tree(&root.join(&self.relative))?;
        }
        Ok(())
    }

    /// Removes the group where it has no children; leaves it where it has.
    pub(crate) fn remove_if_unused(&self) {
        for root in self.hierarchies.roots() {
            // Failing means that somebody uses it.
            let _ = fs::remove_dir(root.join(&self.relative));
        }
    }

    /// Paths of this group that exist, over all hierarchies.
    pub(crate) fn existing(&self) -> Vec<PathBuf> {
        self.hierarchies.roots().iter().map(|r| r.join(&self.relative)).filter(|p| p.is_dir()).collect()
    }
}

/// Puts a process into the groups whose `cgroup.procs` files these are.
pub(crate) fn attach(procs: &[fs::File], pid: i32) -> io::Result<()> {
    procs.iter().try_for_each(|mut file| io::Write::write_all(&mut file, pid.to_string().as_bytes()))
}

/// Whether a process is in the group of this folder or below it.
fn lists(folder: &Path, pid: &str) -> bool {
    fs::read_to_string(folder.join("cgroup.procs")).is_ok_and(|procs| procs.lines().any(|line| line == pid))
        || crate::layout::folder_names(folder)
            .into_iter()
            .map(|name| folder.join(name))
            .any(|child| child.is_dir() && lists(&child, pid))
}

/// For kernels before 5.14, which have no `cgroup.kill`.
fn kill_each(folder: &Path) {
    let _ = fs::write(folder.join("cgroup.freeze"), "0");
    for pid in fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Ok(pid) = pid.parse::<i32>() {
            // Between the read and the kill the pid could only be reused after its process ended, within microseconds.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
    for child in crate::layout::folder_names(folder) {
        let child = folder.join(child);
        if child.is_dir() {
            kill_each(&child);
        }
    }
}

/// One line of `cgroup.events`.
fn event(folder: &Path, name: &str) -> Option<bool> {
    let text = fs::read_to_string(folder.join("cgroup.events")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(|value| value.trim() == "1")
}

fn make(path: &Path) -> Result<(), BackendError> {
    let mut tries = 0;
    loop {
        match fs::create_dir_all(path) {
            Ok(()) => return Ok(()),
            // Somebody else may be removing the parent because it was empty.
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 10 => tries += 1,
            Err(source) => return Err(file_error("make the cgroup", path)(source)),
        }
    }
}

fn remove_tree(folder: &Path) -> Result<(), BackendError> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        match fs::remove_dir(folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A v1 hierarchy may hold on to a task for a moment after v2 reports the group as empty.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(source) => return Err(file_error("remove the cgroup", folder)(source)),
        }
    }
}

pub(crate) fn file_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> BackendError {
    let path = path.to_owned();
    move |source| BackendError::File { action, path: path.clone(), source }
}

fn read(path: &Path) -> Result<String, BackendError> {
    fs::read_to_string(path).map_err(file_error("read", path))
}

fn write(path: &Path, value: &str) -> Result<(), BackendError> {
    // Not `fs::write`: it would create the file where the folder is no cgroup.
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(file_error("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_and_pure_hosts_are_told_apart() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
            35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let found = Hierarchies::from_mountinfo(hybrid).unwrap();
        assert_eq!(found.v2, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(found.v1.keys().copied().collect::<Vec<_>>(), ["cpu", "cpuacct", "memory"]);
        assert_eq!(found.v1_roots().len(), 2);
        let pure = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n\
            32 23 0:28 /part /mnt rw - cgroup2 cgroup2 rw\n";
        let found = Hierarchies::from_mountinfo(pure).unwrap();
        assert_eq!(found.v2, Path::new("/sys/fs/cgroup"));
        assert!(found.v1.is_empty());
        assert!(Hierarchies::from_mountinfo("27 1 254:0 / / rw - ext4 /dev/vda rw\n").is_none());
    }
}
