//! The container's root file system: the image's layers, read-only, below a writable overlay of its own.
//!
//! Mounted in the shim's private mount namespace, so that nothing is left when shim and container are gone, whoever
//! ends them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Overlayfs takes no more lower folders.
pub(crate) const LAYERS_MAX: usize = 500;

/// Gives this process a mount namespace of its own that the host's mounts reach and that does not reach the host, and
/// takes the cgroup v1 hierarchies out of it: libcontainer would join all of them, each at the price of milliseconds,
/// while we join those we need ourselves.
pub(crate) fn private_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        if line.split_once(" - ").is_some_and(|(_, after)| after.starts_with("cgroup "))
            && let Some(point) = line.split(' ').nth(4)
        {
            umount2(point, MntFlags::MNT_DETACH)?;
        }
    }
    Ok(())
}

/// Whether this process can `pivot_root`: not from the first mount of all, as in an initramfs that was never left.
pub(crate) fn can_pivot() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The first mount is its own parent, or has one outside this namespace's table.
    mounts.lines().all(|line| {
        let fields: Vec<&str> = line.split(' ').take(5).collect();
        !matches!(fields[..], [id, parent, _, _, "/"] if id == parent) && !line.contains(" - rootfs ")
    })
}

/// Mounts the overlay at `target`. `writable` are folders to try for its upper layer, the better ones first: an upper
/// layer cannot lie on every file system (not on another overlay, for one).
pub(crate) fn mount_overlay(layers: &[PathBuf], writable: &[PathBuf], target: &Path) -> Result<(), String> {
    if layers.is_empty() || layers.len() > LAYERS_MAX {
        return Err(format!("{} layers: overlayfs takes 1 to {LAYERS_MAX}", layers.len()));
    }
    let mut problems = Vec::new();
    for folder in writable {
        match try_overlay(layers, folder, target) {
            Ok(()) => return Ok(()),
            Err(error) => problems.push(format!("with the writable layer in {}: {error}", folder.display())),
        }
    }
    Err(format!("overlayfs cannot be mounted ({})", problems.join("; ")))
}

fn try_overlay(layers: &[PathBuf], writable: &Path, target: &Path) -> io::Result<()> {
    let (upper, work) = (writable.join("upper"), writable.join("work"));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    // The root of the container has the mode of the image's root, which is the upper folder's.
    fs::set_permissions(&upper, fs::metadata(layers.last().map_or(Path::new("/"), PathBuf::as_path))?.permissions())?;
    // By descriptor: short enough for many layers in the one page of options, and no character needs escaping.
    let lower = layers.iter().rev().map(|layer| open_folder(layer)).collect::<io::Result<Vec<_>>>()?;
    let (upper, work) = (open_folder(&upper)?, open_folder(&work)?);
    let path = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
    let options = format!(
        // The writable layer goes with the container, so nothing in it need survive a crash of the host: volatile keeps
        // fsync in the container, and the end of the container, from waiting for the disk.
        "volatile,lowerdir={},upperdir={},workdir={}",
        lower.iter().map(path).collect::<Vec<_>>().join(":"),
        path(&upper),
        path(&work)
    );
    // No device node and no set-uid program of an image has any effect.
    mount(Some("overlay"), target, Some("overlay"), MsFlags::MS_NODEV | MsFlags::MS_NOSUID, Some(options.as_str()))?;
    Ok(())
}

fn open_folder(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
