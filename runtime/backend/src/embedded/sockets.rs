//! Files of unix sockets: the only things of ours that lie where the user wants them, so each is written down, and what
//! is not written down (or was replaced since) is never removed.
//!
//! One record per service, a JSON list, in a folder of its own below the state folder: a file may lie on a disk and
//! outlive a reboot.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use nix::unistd::{Gid, Group, Uid, User, fchownat};
use serde::{Deserialize, Serialize};
use warmswap_model::Listen;

use super::{read_json, write_json};
use crate::cgroup::file_error;
use crate::contract::Result;

/// A socket file that we made. The numbers tell it from one that somebody else put in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.file_type().is_socket() && (found.dev(), found.ino()) == (self.device, self.inode))
    }
}

/// Binds a socket to its path, with the permissions and the owner it is to have. Until it has them, the umask says who may
/// use it. `record` is that of the service.
pub(crate) fn bind_file(fd: BorrowedFd<'_>, path: &Path, wanted: &Listen, record: &Path) -> io::Result<()> {
    let owner = wanted.owner.as_deref().map(find_owner).transpose()?;
    let address = UnixAddr::new(path)?;
    match bind(fd.as_raw_fd(), &address) {
        Err(Errno::EADDRINUSE) => {
            remove_stale(path, record)?;
            bind(fd.as_raw_fd(), &address)?;
        }
        other => other?,
    }
    // By descriptor from here on: whoever may write to the folder could put something else at the path.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    let found = file.metadata()?;
    if !found.file_type().is_socket() {
        return Err(io::Error::other("somebody replaced the socket's file while it was made"));
    }
    let ours = SocketFile { path: path.to_owned(), device: found.dev(), inode: found.ino() };
    let finish = || {
        remember(record, ours.clone())?;
        if let Some((user, group)) = owner {
            fchownat(&file, OsStr::new(""), Some(user), group, AtFlags::AT_EMPTY_PATH)?;
        }
        set_mode(&file, wanted.file_mode())
    };
    finish().inspect_err(|_| {
        if ours.is_there() {
            let _ = fs::remove_file(path);
        }
    })
}

/// A descriptor that only names its file can have no fchmod.
fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), Permissions::from_mode(mode))
}

/// `user[:group]`, names or numbers; without a group the user's own.
fn find_owner(text: &str) -> io::Result<(Uid, Option<Gid>)> {
    let unknown = |what: &str, name: &str| io::Error::other(format!("the host knows no {what} {name:?}"));
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let (uid, own_group) = match user.parse() {
        Ok(number) => (Uid::from_raw(number), None),
        Err(_) => {
            let found = User::from_name(user)?.ok_or_else(|| unknown("user", user))?;
            (found.uid, Some(found.gid))
        }
    };
    let gid = match group {
        None => own_group,
        Some(group) => Some(match group.parse() {
            Ok(number) => Gid::from_raw(number),
            Err(_) => Group::from_name(group)?.ok_or_else(|| unknown("group", group))?.gid,
        }),
    };
    Ok((uid, gid))
}

/// Removes what lies at `path` when it is a socket of ours that nobody holds any more.
fn remove_stale(path: &Path, record: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    if !found.file_type().is_socket() {
        return refused("there is a file that is no socket");
    }
    if is_held(path)? {
        return refused("another socket is bound to it");
    }
    let ours = records_beside(record)
        .iter()
        .flat_map(|record| read(record))
        .any(|file| (file.path.as_path(), file.device, file.inode) == (path, found.dev(), found.ino()));
    if !ours {
        return refused("there is a socket file that warmswap did not make; remove it if nobody needs it");
    }
    fs::remove_file(path)
}

/// Whether a process holds a socket that is bound to this file. A datagram socket asks, because it is refused only when
/// there is none at all: one of another type answers EPROTOTYPE.
fn is_held(path: &Path) -> io::Result<bool> {
    let probe =
        socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    Ok(connect(probe.as_raw_fd(), &UnixAddr::new(path)?) != Err(Errno::ECONNREFUSED))
}

/// Removes the files of a service that are still ours, then its record.
pub(crate) fn remove_all(record: &Path) -> Result<()> {
    for file in read(record).into_iter().filter(SocketFile::is_there) {
        fs::remove_file(&file.path).map_err(file_error("remove the socket", &file.path))?;
    }
    match fs::remove_file(record) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error("remove", record)(error)),
        _ => Ok(()),
    }
}

/// Takes back what [`bind_file`] made.
pub(crate) fn unbind_file(path: &Path, record: &Path) {
    let mut files = read(record);
    if let Some(at) = files.iter().position(|file| file.path == path) {
        let file = files.remove(at);
        if file.is_there() {
            let _ = fs::remove_file(path);
        }
        // What is written down and is not there harms nobody.
        let _ = write_json(record, &files);
    }
}

/// Socket files of ours in all records of a folder that are still there.
pub(crate) fn left_in(folder: &Path) -> Vec<PathBuf> {
    records_in(folder).iter().flat_map(|record| read(record)).filter(SocketFile::is_there).map(|f| f.path).collect()
}

/// All records of a folder.
pub(crate) fn records_in(folder: &Path) -> Vec<PathBuf> {
    let names = crate::layout::folder_names(folder).into_iter();
    names.filter(|name| name.ends_with(".json")).map(|name| folder.join(name)).collect()
}

fn records_beside(record: &Path) -> Vec<PathBuf> {
    record.parent().map(records_in).unwrap_or_default()
}

/// None when there is no record, or it is damaged: then nothing is ours.
fn read(record: &Path) -> Vec<SocketFile> {
    read_json(record).unwrap_or_default()
}

fn remember(record: &Path, new: SocketFile) -> io::Result<()> {
    if let Some(folder) = record.parent() {
        fs::create_dir_all(folder)?;
    }
    // A number is given again once its file is gone: what another record says of this path is not true any more.
    for other in records_beside(record) {
        let mut files = read(&other);
        let before = files.len();
        files.retain(|file| file.path != new.path);
        if files.len() < before && other != record {
            write_json(&other, &files).map_err(io::Error::other)?;
        }
    }
    let mut files = read(record);
    files.retain(|file| file.path != new.path);
    files.push(new);
    write_json(record, &files).map_err(io::Error::other)
}

/// A new unix socket.
pub(crate) fn unix_socket(kind: SockType) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (path, record) = (folder.path().join("a.sock"), folder.path().join("sockets/a.json"));
        (folder, path, record)
    }

    fn bind_new(path: &Path, record: &Path) -> io::Result<OwnedFd> {
        let fd = unix_socket(SockType::Stream)?;
        bind_file(fd.as_fd(), path, &Listen { mode: Some("0640".into()), ..Listen::at(path) }, record)?;
        Ok(fd)
    }

    #[test]
    fn our_own_stale_file_is_replaced_and_removed_in_the_end() {
        let (_folder, path, record) = place();
        drop(bind_new(&path, &record).unwrap());
        assert!(path.exists(), "a socket leaves its file");
        let held = bind_new(&path, &record).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        assert!(bind_new(&path, &record).unwrap_err().to_string().contains("another socket"), "it is held");
        drop(held);
        assert_eq!(left_in(record.parent().unwrap()), std::slice::from_ref(&path));
        remove_all(&record).unwrap();
        assert!(!path.exists() && !record.exists());
        remove_all(&record).unwrap();
    }

    #[test]
    fn what_somebody_else_put_there_stays() {
        let (_folder, path, record) = place();
        // Once ours, then replaced.
        drop(bind_new(&path, &record).unwrap());
        fs::remove_file(&path).unwrap();
        fs::write(path.with_extension("keeps-the-inode"), "").unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(bind_new(&path, &record).unwrap_err().to_string().contains("did not make"));
        remove_all(&record).unwrap();
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "text").unwrap();
        assert!(bind_new(&path, &record).unwrap_err().to_string().contains("no socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
        fs::remove_file(&path).unwrap();
        for _ in 0..2 {
            let other = UnixDatagram::bind(&path).unwrap();
            assert!(bind_new(&path, &record).unwrap_err().to_string().contains("another socket"));
            drop(other);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_belongs_to_the_service_that_made_it_last() {
        let (_folder, path, record) = place();
        let other = record.with_file_name("b.json");
        drop(bind_new(&path, &record).unwrap());
        let _held = bind_new(&path, &other).unwrap();
        remove_all(&record).unwrap();
        assert!(path.exists(), "it is another service's now");
        unbind_file(&path, &other);
        assert!(!path.exists());
    }

    #[test]
    fn owners_are_the_hosts() {
        assert_eq!(find_owner("root").unwrap(), (Uid::from_raw(0), Some(Gid::from_raw(0))));
        assert_eq!(find_owner("12:34").unwrap(), (Uid::from_raw(12), Some(Gid::from_raw(34))));
        assert_eq!(find_owner("12").unwrap(), (Uid::from_raw(12), None));
        assert!(find_owner("no-such-user").unwrap_err().to_string().contains("no-such-user"));
    }
}
