//! `user[:group]` of an image, looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! The files come from the image and are untrusted: they are opened inside the root (symbolic links cannot leave it)
//! and only so much of them is read.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::fcntl::OFlag;

use crate::inside::open_inside;

/// The most that is read of `/etc/passwd` and of `/etc/group`, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
}

impl Identity {
    #[cfg(test)]
    pub(crate) const ROOT: Self = Self { uid: 0, gid: 0, additional_gids: Vec::new() };
}

/// Resolves `user` against the root file system open at `root`.
pub(crate) fn identity(root: BorrowedFd<'_>, user: &str) -> Result<Identity, String> {
    let passwd = read_inside(root, "etc/passwd");
    let group = read_inside(root, "etc/group");
    resolve(user, &passwd, &group)
}

fn resolve(user: &str, passwd: &str, group: &str) -> Result<Identity, String> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    // name:password:uid:gid:…
    let line = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 4 && (fields[0] == user || (number.is_some() && fields[2].parse().ok() == number))
    });
    let (uid, primary, name) = match (&line, number) {
        (Some(fields), _) => {
            let uid = fields[2].parse().map_err(|_| format!("the uid of {user:?} in /etc/passwd is no number"))?;
            let gid = fields[3].parse().map_err(|_| format!("the gid of {user:?} in /etc/passwd is no number"))?;
            (uid, gid, Some(fields[0]))
        }
        (None, Some(uid)) => (uid, 0, None),
        (None, None) => return Err(format!("user {user:?} is not in the image's /etc/passwd")),
    };
    // name:password:gid:members
    let groups = || group.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 4);
    let gid = match wanted_group {
        None => primary,
        Some(wanted) => match groups().find(|fields| fields[0] == wanted).and_then(|fields| fields[2].parse().ok()) {
            Some(gid) => gid,
            None => wanted.parse().map_err(|_| format!("group {wanted:?} is not in the image's /etc/group"))?,
        },
    };
    // As Docker does: a group that was asked for is the only one.
    let additional_gids = match (name, wanted_group) {
        (Some(name), None) => groups()
            .filter(|fields| fields[3].split(',').any(|member| member == name))
            .filter_map(|fields| fields[2].parse().ok())
            .filter(|other| *other != gid)
            .collect(),
        _ => Vec::new(),
    };
    Ok(Identity { uid, gid, additional_gids })
}

/// Empty when there is no such file, as in images that hold one program only.
fn read_inside(root: BorrowedFd<'_>, path: &str) -> String {
    let mut text = Vec::new();
    // O_NONBLOCK: a pipe in place of the file must not stop us.
    if let Ok(fd) = open_inside(root, Path::new(path), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
        let file = File::from(fd);
        if file.metadata().is_ok_and(|m| m.is_file()) {
            let _ = file.take(FILE_BYTES_MAX).read_to_end(&mut text);
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\nbad:x:u:0\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\nlogs:x:50:app,web\nweb:x:33:\n";

    #[test]
    fn users_resolve_as_docker_resolves_them() {
        let id = |uid, gid, more: &[u32]| Ok(Identity { uid, gid, additional_gids: more.to_vec() });
        assert_eq!(resolve("", PASSWD, GROUP), id(0, 0, &[]));
        assert_eq!(resolve("app", PASSWD, GROUP), id(1000, 1001, &[50]));
        assert_eq!(resolve("1000", PASSWD, GROUP), id(1000, 1001, &[50]));
        assert_eq!(resolve("app:web", PASSWD, GROUP), id(1000, 33, &[]));
        assert_eq!(resolve("7:8", PASSWD, GROUP), id(7, 8, &[]));
        assert_eq!(resolve("7", "", ""), id(7, 0, &[]));
        assert!(resolve("nobody", PASSWD, GROUP).unwrap_err().contains("nobody"));
        assert!(resolve("app:none", PASSWD, GROUP).unwrap_err().contains("none"));
        assert!(resolve("bad", PASSWD, GROUP).is_err());
    }

    #[test]
    fn links_of_the_image_do_not_leave_the_root() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("etc/passwd")).unwrap();
        let root = File::open(folder.path()).unwrap();
        assert!(identity(root.as_fd(), "root").is_err(), "the host's /etc/passwd was read");
    }
}
