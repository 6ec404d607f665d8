//! Paths below a root that cannot leave it: symbolic links and `..` are resolved as if the root were `/`. For whatever
//! comes out of an image.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// Opens what `path` names below `root`.
pub(crate) fn open_inside(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT))
}

/// Opens a folder below the root, made where it is missing (mode 755).
pub(crate) fn make_folder_inside(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let folder = OFlag::O_PATH | OFlag::O_DIRECTORY;
    match open_inside(root, path, folder) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let mut so_far = PathBuf::new();
    let mut parent = open_inside(root, &so_far, folder)?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        so_far.push(name);
        parent = match open_inside(root, &so_far, folder) {
            Err(Errno::ENOENT) => {
                mkdirat(parent.as_fd(), name, Mode::from_bits_truncate(0o755))?;
                open_inside(root, &so_far, folder)?
            }
            other => other?,
        };
    }
    Ok(parent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn links_do_not_leave_the_root() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("../../../../../../tmp", folder.path().join("up")).unwrap();
        std::os::unix::fs::symlink("/", folder.path().join("top")).unwrap();
        let root = File::open(folder.path()).unwrap();
        make_folder_inside(root.as_fd(), Path::new("/a/b/c")).unwrap();
        assert!(folder.path().join("a/b/c").is_dir());
        make_folder_inside(root.as_fd(), Path::new("top/a/d")).unwrap();
        assert!(folder.path().join("a/d").is_dir());
        assert!(make_folder_inside(root.as_fd(), Path::new("/up/x")).is_err());
        assert!(open_inside(root.as_fd(), Path::new("../../etc/passwd"), OFlag::O_PATH).is_err());
    }
}
