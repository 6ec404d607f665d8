//! The cgroups of the v2 hierarchy, as they come and go.
//!
//! The kernel tells of every folder made or removed (inotify), so that a container is known before its first process runs
//! and nothing is done while nothing happens. Where that cannot be had, the tree is walked once a second instead.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use warmswap_model::CgroupId;

/// How often the tree is walked where the kernel does not tell. A group costs some 10 µs each time.
const WALK_EVERY: Duration = Duration::from_secs(1);
/// Folders deeper than this are not looked into; the probes look no further up either.
const DEPTH_MAX: usize = 16;
/// Groups beyond these are not known: nobody makes as many on purpose.
const GROUPS_MAX: usize = 20_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Came {
        id: CgroupId,
        parent: CgroupId,
        /// Below the root of the hierarchy.
        path: String,
    },
    Went {
        id: CgroupId,
    },
}

#[derive(Debug)]
struct Group {
    path: String,
    children: BTreeMap<String, CgroupId>,
    watch: Option<WatchDescriptor>,
}

#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
    top: CgroupId,
    /// `None` where the kernel does not tell.
    inotify: Option<Inotify>,
    /// How often the whole tree is looked at, where that is needed.
    walk_every: Duration,
    groups: BTreeMap<CgroupId, Group>,
    by_watch: BTreeMap<i32, CgroupId>,
    changes: Vec<Change>,
}

impl Tree {
    /// All groups that are there come as changes with the first [`Tree::wait`].
    ///
    /// # Errors
    /// When the root cannot be looked at.
    pub(super) fn new(root: &Path) -> std::io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).inspect_err(|errno| {
            tracing::warn!("containers of other tools are looked for once a second only: inotify: {errno}");
        });
        let top = CgroupId(fs::metadata(root)?.ino());
        let mut tree = Self {
            root: root.to_owned(),
            top,
            inotify: inotify.ok(),
            walk_every: WALK_EVERY,
            groups: BTreeMap::new(),
            by_watch: BTreeMap::new(),
            changes: Vec::new(),
        };
        tree.visit(None, "");
        Ok(tree)
    }

    /// Waits for changes, or until `wake` can be read, and returns what has changed since the last call.
    pub(super) fn wait(&mut self, wake: BorrowedFd<'_>) -> Vec<Change> {
        if self.changes.is_empty() {
            let timeout = match &self.inotify {
                Some(_) => PollTimeout::NONE,
                None => PollTimeout::try_from(self.walk_every).unwrap_or(PollTimeout::MAX),
            };
            let inotify = self.inotify.as_ref().map(|inotify| inotify.as_fd());
            let mut wanted: Vec<PollFd<'_>> =
                inotify.into_iter().chain([wake]).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            // An interruption by a signal only makes a round early.
            let _ = poll(&mut wanted, timeout);
            match &self.inotify {
                Some(_) => self.read(),
                None => self.walk(),
            }
        }
        std::mem::take(&mut self.changes)
    }

    fn read(&mut self) {
        while let Some(inotify) = &self.inotify {
            let events = match inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Err(errno) => {
                    tracing::warn!("containers of other tools are looked for once a second only: inotify: {errno}");
                    self.inotify = None;
                    return;
                }
            };
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    self.walk();
                    continue;
                }
                let Some(id) = self.by_watch.get(&event.wd.as_raw()).copied() else { continue };
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    self.by_watch.remove(&event.wd.as_raw());
                    continue;
                }
                let Some(name) = event.name.as_ref().map(|name| String::from_utf8_lossy(name.as_bytes()).into_owned())
                else {
                    continue;
                };
                if event.mask.contains(AddWatchFlags::IN_CREATE) {
                    let path = self.child_path(id, &name);
                    self.visit(Some((id, &name)), &path);
                } else if event.mask.contains(AddWatchFlags::IN_DELETE) {
                    self.removed(id, &name);
                }
            }
        }
    }

    fn child_path(&self, parent: CgroupId, name: &str) -> String {
        match self.groups.get(&parent) {
            Some(group) if !group.path.is_empty() => format!("{}/{name}", group.path),
            _ => name.to_owned(),
        }
    }

    /// Takes up a folder and everything below it that is not known yet. One that has gone meanwhile is none.
    fn visit(&mut self, place: Option<(CgroupId, &str)>, path: &str) {
        let folder = self.root.join(path);
        let Ok(metadata) = fs::metadata(&folder) else { return };
        if !metadata.is_dir() {
            return;
        }
        let id = CgroupId(metadata.ino());
        let deep = path.split('/').count() > DEPTH_MAX;
        if deep || (!self.groups.contains_key(&id) && self.groups.len() >= GROUPS_MAX) {
            return;
        }
        if let Some((parent, name)) = place {
            let before = self.groups.get_mut(&parent).and_then(|group| group.children.insert(name.to_owned(), id));
            // Removed and made anew, and the kernel's word of it is still on its way.
            if let Some(before) = before.filter(|before| *before != id) {
                self.forget(before);
            }
        }
        if !self.groups.contains_key(&id) {
            // Before the folder is read: what is made after that is told, what was made before is there.
            let watch = self.watch(&folder);
            if let Some(watch) = watch {
                self.by_watch.insert(watch.as_raw(), id);
            }
            self.groups.insert(id, Group { path: path.to_owned(), children: BTreeMap::new(), watch });
            if let Some((parent, _)) = place {
                self.changes.push(Change::Came { id, parent, path: path.to_owned() });
            }
        }
        for name in folders(&folder) {
            let path = self.child_path(id, &name);
            self.visit(Some((id, &name)), &path);
        }
    }

    fn watch(&mut self, folder: &Path) -> Option<WatchDescriptor> {
        let wanted = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
        match self.inotify.as_ref()?.add_watch(folder, wanted) {
            Ok(watch) => Some(watch),
            Err(Errno::ENOENT) => None,
            Err(errno) => {
                tracing::warn!(
                    "containers of other tools are looked for once a second only: cannot watch {}: {errno} (see \
                     /proc/sys/fs/inotify)",
                    folder.display()
                );
                self.inotify = None;
                None
            }
        }
    }

    /// The kernel says that a folder was removed; it may have been made anew since.
    fn removed(&mut self, parent: CgroupId, name: &str) {
        let path = self.child_path(parent, name);
        let now = fs::metadata(self.root.join(&path)).ok().map(|metadata| CgroupId(metadata.ino()));
        let Some(group) = self.groups.get_mut(&parent) else { return };
        if let Some(before) = group.children.get(name).copied().filter(|before| Some(*before) != now) {
            group.children.remove(name);
            self.forget(before);
        }
    }

    fn forget(&mut self, id: CgroupId) {
        let Some(group) = self.groups.remove(&id) else { return };
        for child in group.children.into_values() {
            self.forget(child);
        }
        if let Some(watch) = group.watch {
            // The kernel has taken it back with the folder.
            self.by_watch.remove(&watch.as_raw());
        }
        self.changes.push(Change::Went { id });
    }

    /// Compares the whole tree with what is known.
    fn walk(&mut self) {
        let mut waiting = vec![self.top];
        while let Some(id) = waiting.pop() {
            let Some(group) = self.groups.get(&id) else { continue };
            let names: Vec<String> = group.children.keys().cloned().collect();
            names.iter().for_each(|name| self.removed(id, name));
            waiting.extend(self.groups.get(&id).iter().flat_map(|group| group.children.values()));
        }
        self.visit(None, "");
    }
}

/// Names of the folders in a folder; of one that has gone, none.
pub(super) fn folders(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use nix::sys::eventfd::EventFd;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(20);

    /// Paths that came, and how many went, until `enough`; any folder does, as all file systems tell of folders.
    fn until(tree: &mut Tree, enough: impl Fn(&[String], usize) -> bool) -> (Vec<String>, usize) {
        let (mut came, mut went) = (Vec::new(), 0);
        // It does not wait, so that what does not come ends the test.
        let awake = EventFd::from_value(1).expect("an eventfd");
        for _ in 0..250 {
            std::thread::sleep(PATIENCE);
            for change in tree.wait(awake.as_fd()) {
                match change {
                    Change::Came { path, .. } => came.push(path),
                    Change::Went { .. } => went += 1,
                }
            }
            if enough(&came, went) {
                break;
            }
        }
        came.sort();
        (came, went)
    }

    fn check_tree(told: bool) {
        let folder = tempfile::tempdir().expect("a folder");
        let make = |path: &str| fs::create_dir_all(folder.path().join(path)).expect("a folder");
        make("a/b");
        let mut tree = Tree::new(folder.path()).expect("a tree");
        if !told {
            tree.inotify = None;
            tree.walk_every = PATIENCE;
        }
        assert_eq!(until(&mut tree, |came, _| came.len() == 2), (vec!["a".into(), "a/b".into()], 0));

        // A folder in one that nobody has been told of yet.
        make("c/d/e");
        fs::write(folder.path().join("a/file"), "no group").expect("a file");
        assert_eq!(until(&mut tree, |came, _| came.len() == 3), (vec!["c".into(), "c/d".into(), "c/d/e".into()], 0));

        // One of the same name is another one.
        fs::remove_dir(folder.path().join("a/b")).expect("removed");
        fs::create_dir(folder.path().join("other"))
            .expect("takes the number of the one that went, where these are reused");
        make("a/b/x");
        fs::remove_dir_all(folder.path().join("c")).expect("removed");
        let (came, went) = until(&mut tree, |came, went| came.len() >= 3 && went >= 4);
        assert_eq!((came, went), (vec!["a/b".into(), "a/b/x".into(), "other".into()], 4));
        let awake = EventFd::from_value(1).expect("an eventfd");
        assert_eq!(tree.wait(awake.as_fd()), []);
        assert_eq!(tree.groups.len(), 5, "{tree:?}");
    }

    #[test]
    fn groups_are_told_as_they_come_and_go() {
        check_tree(true);
    }

    #[test]
    fn without_the_kernels_word_the_tree_is_walked() {
        check_tree(false);
    }
}
