//! What of ours is on the machine: taken before and after, the difference is what was left behind.
//!
//! It looks at the machine, not at what the runtime believes: processes, mounts, cgroups in every hierarchy, network
//! namespaces and interfaces, unix sockets, files below the run folder, BPF objects.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::wait::within;

/// The kernel frees BPF objects, sockets and cgroups a moment after their last user.
const SETTLE_TIME: Duration = Duration::from_secs(10);

/// One line for each thing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    things: BTreeSet<String>,
    run_dir: PathBuf,
    state_dir: PathBuf,
}

/// Things that were not there before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(Vec<String>);

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} left behind:", self.0.len())?;
        self.0.iter().try_for_each(|thing| write!(f, "\n  {thing}"))
    }
}

impl std::error::Error for Leftovers {}

impl Inventory {
    /// Looks now. `run_dir` and `state_dir` are those of the agent that is going to run.
    #[must_use]
    pub fn take(run_dir: &Path, state_dir: &Path) -> Self {
        let mut inventory =
            Self { things: BTreeSet::new(), run_dir: run_dir.to_owned(), state_dir: state_dir.to_owned() };
        inventory.processes();
        inventory.mounts();
        inventory.cgroups();
        inventory.names("network namespace", Path::new("/run/netns"));
        inventory.names("network interface", Path::new("/sys/class/net"));
        inventory.names("pinned BPF object", Path::new("/sys/fs/bpf"));
        inventory.sockets();
        inventory.files_below_run_dir();
        let elsewhere = inventory.bpf_of_other_runtimes();
        let objects = crate::bpf::objects().unwrap_or_default();
        inventory.things.extend(objects.into_iter().filter(|object| !elsewhere.iter().any(|id| is_object(object, id))));
        inventory
    }

    /// Compares with what is there now, giving the kernel a few seconds to free what nobody uses any more.
    ///
    /// # Errors
    /// Whatever is there that was not there before.
    pub fn nothing_left(&self) -> Result<(), Leftovers> {
        let mut left = Vec::new();
        let clean = within(SETTLE_TIME, || {
            let now = Self::take(&self.run_dir, &self.state_dir);
            left = now.things.difference(&self.things).cloned().collect();
            left.is_empty().then_some(())
        });
        clean.ok_or(Leftovers(left))
    }

    fn add(&mut self, thing: String) {
        self.things.insert(thing);
    }

    /// True for a path of this agent, or where warmswap has things when nobody says otherwise.
    fn ours(&self, text: &str) -> bool {
        ["/run/warmswap/", "/var/lib/warmswap/", "@warmswap"].iter().any(|usual| text.contains(usual))
            || self.below_ours(text)
    }

    /// True for a cgroup of a runtime with another run folder (a demo beside the tests, say): a runtime that does not
    /// use the usual run folder has its cgroups below `warmswap/@<begin of the SHA-256 of the run folder's path>`.
    fn of_another_runtime(&self, cgroup: &str) -> bool {
        let Some((_, after)) = cgroup.split_once("/warmswap/@") else { return false };
        let digest = Sha256::digest(self.run_dir.as_os_str().as_encoded_bytes());
        let own: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let named = after.split('/').next().unwrap_or_default();
        !own.starts_with(named)
    }

    /// True for a process that was given another run folder than ours, in its environment or as an option, and for a demo,
    /// which has its own.
    fn told_of_another_run_dir(&self, environment: &str, arguments: &str) -> bool {
        let told = environment.contains("WARMSWAP_RUN_DIR=")
            || [" --run-dir", "/warmswap demo"].iter().any(|option| arguments.contains(option));
        told && !self.below_ours(environment) && !self.below_ours(arguments)
    }

    /// What agents with another run folder hold, such as `BPF link 17`.
    fn bpf_of_other_runtimes(&self) -> BTreeSet<String> {
        let mut held = BTreeSet::new();
        for pid in names_in(Path::new("/proc")).into_iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) {
            let folder = Path::new("/proc").join(&pid);
            let text = |name: &str| {
                let bytes = fs::read(folder.join(name)).unwrap_or_default();
                String::from_utf8_lossy(&bytes).replace('\0', " ")
            };
            if !self.told_of_another_run_dir(&text("environ"), &text("cmdline")) {
                continue;
            }
            for fd in names_in(&folder.join("fdinfo")) {
                for line in text(&format!("fdinfo/{fd}")).lines() {
                    let Some((key, id)) = line.split_once(":\t") else { continue };
                    let kind = match key {
                        "link_id" => "link",
                        "prog_id" => "program",
                        "map_id" => "map",
                        _ => continue,
                    };
                    held.insert(format!("BPF {kind} {}", id.trim()));
                }
            }
        }
        held
    }

    fn below_ours(&self, text: &str) -> bool {
        [&self.run_dir, &self.state_dir].iter().any(|folder| text.contains(&*folder.to_string_lossy()))
    }

    /// Ours is whoever runs one of our programs as a server, sits in one of our cgroups, or was given our folders. Test
    /// programs and xtask itself are not meant: they are still running.
    fn processes(&mut self) {
        let own = std::process::id().to_string();
        for pid in names_in(Path::new("/proc")).into_iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) {
            if pid == own {
                continue;
            }
            let folder = Path::new("/proc").join(&pid);
            let read = |name: &str| fs::read(folder.join(name)).unwrap_or_default();
            let text = |name: &str| String::from_utf8_lossy(&read(name)).replace('\0', " ").trim().to_owned();
            let exe = fs::read_link(folder.join("exe")).unwrap_or_default();
            let exe = exe.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let cgroup = text("cgroup");
            if cgroup.lines().any(|line| self.of_another_runtime(line)) {
                continue;
            }
            if self.told_of_another_run_dir(&text("environ"), &text("cmdline")) {
                continue;
            }
            let our_program = ["warmswap", "warmswap-shim"].contains(&exe.trim_end_matches(" (deleted)"))
                || exe.starts_with("session-store");
            let in_our_cgroup = cgroup.contains("/warmswap/");
            if !(our_program || in_our_cgroup || self.below_ours(&text("environ")) || self.below_ours(&text("cmdline")))
            {
                continue;
            }
            // A process id may be given again; with the start time it is unique. Field 22, after the last ')'.
            let stat = text("stat");
            let Some((_, fields)) = stat.rsplit_once(") ") else { continue };
            let started = fields.split(' ').nth(19).unwrap_or("?");
            let state = fields.split(' ').next().unwrap_or("?");
            self.add(format!("process {pid} (state {state}, started {started}): {} {}", exe, text("cmdline")));
        }
    }

    fn mounts(&mut self) {
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            // `36 35 98:0 /root /point options … - type source …`
            let point = line.split(' ').nth(4).unwrap_or_default();
            if self.ours(point) {
                self.add(format!("mount at {point}"));
            }
        }
    }

    /// In every hierarchy that is mounted, v1 and v2: everything below, and including, `warmswap`.
    fn cgroups(&mut self) {
        for line in fs::read_to_string("/proc/self/mounts").unwrap_or_default().lines() {
            let mut words = line.split(' ');
            let (Some(_), Some(point), Some(kind)) = (words.next(), words.next(), words.next()) else { continue };
            if kind != "cgroup" && kind != "cgroup2" {
                continue;
            }
            let mut waiting = vec![Path::new(point).join("warmswap")];
            while let Some(folder) = waiting.pop() {
                if !folder.is_dir() || self.of_another_runtime(&folder.to_string_lossy()) {
                    continue;
                }
                let below: Vec<_> =
                    names_in(&folder).into_iter().map(|n| folder.join(n)).filter(|p| p.is_dir()).collect();
                let shared = below.iter().any(|folder| self.of_another_runtime(&folder.to_string_lossy()));
                waiting.extend(below);
                if shared {
                    continue;
                }
                self.add(format!("cgroup {}", folder.display()));
            }
        }
    }

    fn names(&mut self, what: &str, folder: &Path) {
        for name in names_in(folder) {
            self.add(format!("{what} {name}"));
        }
    }

    fn sockets(&mut self) {
        for line in fs::read_to_string("/proc/net/unix").unwrap_or_default().lines().skip(1) {
            // Number, count, protocol, flags, type, state, inode, path.
            if let Some(path) = line.split_whitespace().nth(7).filter(|path| self.ours(path)) {
                self.add(format!("unix socket {path}"));
            }
        }
    }

    /// Not counted is what holds nothing and is made anew by the next agent: empty folders, an empty lock file, the link
    /// to the state folder.
    fn files_below_run_dir(&mut self) {
        let mut waiting = vec![self.run_dir.clone()];
        while let Some(folder) = waiting.pop() {
            for path in names_in(&folder).into_iter().map(|name| folder.join(name)) {
                let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
                if metadata.is_dir() {
                    waiting.push(path);
                    continue;
                }
                let to_state_dir = fs::read_link(&path).is_ok_and(|target| target == self.state_dir);
                let empty = metadata.is_file() && metadata.len() == 0;
                if !to_state_dir && !empty {
                    self.add(format!("file {}", path.display()));
                }
            }
        }
    }
}

/// Whether this line is about the object with this id; programs have their name after it.
fn is_object(line: &str, id: &str) -> bool {
    line.strip_prefix(id).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Requirement, needs};
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    #[test]
    fn what_is_left_behind_is_named_and_what_is_gone_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let before = Inventory::take(folder.path(), folder.path());
        assert_eq!(before.nothing_left(), Ok(()));

        let socket = UnixListener::bind(folder.path().join("x.sock")).unwrap();
        let mut process = Command::new("sleep").arg("600").env("RUN", folder.path()).spawn().unwrap();
        let now = Inventory::take(folder.path(), folder.path());
        let found: Vec<&String> = now.things.difference(&before.things).collect();
        process.kill().unwrap();
        process.wait().unwrap();
        drop(socket);
        for kind in ["unix socket ", "file ", "process "] {
            assert_eq!(found.iter().filter(|thing| thing.starts_with(kind)).count(), 1, "{kind}: {found:?}");
        }
        fs::remove_file(folder.path().join("x.sock")).unwrap();
        assert_eq!(before.nothing_left(), Ok(()));
    }

    #[test]
    fn mounts_and_cgroups_are_seen() {
        needs!("mounts_and_cgroups_are_seen", Requirement::Containers);
        let folder = tempfile::tempdir().unwrap();
        let v2 = fs::read_to_string("/proc/self/mounts").unwrap();
        let v2 =
            v2.lines().map(|l| l.split(' ').collect::<Vec<_>>()).find(|w| w[2] == "cgroup2").unwrap()[1].to_owned();
        let ours = Path::new(&v2).join("warmswap");
        let existed = ours.is_dir();
        let group = ours.join(format!("inventory-test-{}", std::process::id()));
        fs::create_dir_all(&group).unwrap();
        let point = folder.path().join("point");
        fs::create_dir(&point).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&point).status().unwrap().success();
        let now = Inventory::take(folder.path(), folder.path());
        let unmounted = Command::new("umount").arg(&point).status().unwrap().success();
        fs::remove_dir(&group).unwrap();
        if !existed {
            // Somebody else may have begun to use it.
            let _ = fs::remove_dir(&ours);
        }
        assert!(mounted && unmounted);
        assert!(now.things.contains(&format!("cgroup {}", group.display())), "{now:?}");
        assert!(now.things.contains(&format!("mount at {}", point.display())), "{now:?}");
    }

    #[test]
    fn cgroups_of_another_runtime_are_not_ours() {
        // printf /run/ours | sha256sum
        let inventory = Inventory { run_dir: "/run/ours".into(), ..Inventory::default() };
        let digest = "37cca0c60332";
        assert!(!inventory.of_another_runtime(&format!("0::/warmswap/@{digest}/web/g1")));
        assert!(inventory.of_another_runtime("/sys/fs/cgroup/warmswap/@0123456789ab/web/g1"));
        assert!(!inventory.of_another_runtime("/sys/fs/cgroup/warmswap/web/g1"));
    }

    #[test]
    fn bpf_objects_are_seen() {
        needs!("bpf_objects_are_seen", Requirement::Bpf, Requirement::Containers);
        let folder = tempfile::tempdir().unwrap();
        let before = Inventory::take(folder.path(), folder.path());
        let map = crate::bpf::tests::array_map().unwrap();
        let now = Inventory::take(folder.path(), folder.path());
        let maps = now.things.difference(&before.things).filter(|thing| thing.starts_with("BPF map ")).count();
        drop(map);
        assert!(maps >= 1, "a BPF map was made and not seen");
    }
}
