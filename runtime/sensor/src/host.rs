//! Where this host has its cgroups, and which folder an id stands for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use warmswap_model::CgroupId;

/// Mount points, as far as the sensor needs them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CgroupMounts {
    /// Root of the v2 hierarchy.
    pub v2: Option<PathBuf>,
    /// Root of the v1 hierarchy that the io (blkio) controller is on; `None` when it is on v2.
    pub v1_block: Option<PathBuf>,
    /// The same for the memory controller.
    pub v1_memory: Option<PathBuf>,
}

impl CgroupMounts {
    /// From `/proc/self/mountinfo`.
    ///
    /// # Errors
    /// When that file cannot be read.
    pub fn of_host() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn parse(mountinfo: &str) -> Self {
        let mut mounts = Self::default();
        for line in mountinfo.lines() {
            // id parent major:minor root mountpoint options [tags…] - type source superoptions
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let mut left = left.split(' ').skip(3);
            let (Some(root), Some(point)) = (left.next(), left.next()) else { continue };
            let mut right = right.split(' ');
            let (kind, options) = (right.next().unwrap_or_default(), right.nth(1).unwrap_or_default());
            // A bind mount of a part of the hierarchy is not its root.
            if root != "/" {
                continue;
            }
            let point = PathBuf::from(unescape(point));
            let has = |controller| kind == "cgroup" && options.split(',').any(|option| option == controller);
            if kind == "cgroup2" && mounts.v2.is_none() {
                mounts.v2 = Some(point.clone());
            }
            if has("blkio") && mounts.v1_block.is_none() {
                mounts.v1_block = Some(point.clone());
            }
            if has("memory") && mounts.v1_memory.is_none() {
                mounts.v1_memory = Some(point);
            }
        }
        mounts
    }
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(text: &str) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        result.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match code {
            Some(code) => {
                result.push(char::from(code));
                rest = &rest[at + 4..];
            }
            None => {
                result.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    result + rest
}

/// The id of a cgroup folder.
///
/// # Errors
/// When the folder does not exist or cannot be looked at.
pub fn cgroup_id(folder: &Path) -> io::Result<CgroupId> {
    Ok(CgroupId(std::fs::metadata(folder)?.ino()))
}

/// The folder of a v2 cgroup, found by its id.
///
/// # Errors
/// When there is no such cgroup (any more), or without the right to open by handle (root).
pub fn cgroup_path(v2_root: &Path, cgroup: CgroupId) -> io::Result<PathBuf> {
    /// `struct file_handle` with the 8 bytes that kernfs wants.
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        id: [u8; 8],
    }
    const KERNFS: libc::c_int = 0xfe;
    let root = File::open(v2_root)?;
    let mut handle = Handle { bytes: 8, kind: KERNFS, id: cgroup.0.to_ne_bytes() };
    // SAFETY: the handle is laid out as the kernel's, with as many bytes as it says; the kernel only reads it.
    let fd = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, root.as_raw_fd(), &raw mut handle, libc::O_PATH | libc::O_CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel just gave us, owned by nobody else.
    let folder = unsafe { File::from_raw_fd(fd as i32) };
    std::fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd()))
}

/// The id under which block requests of a cgroup are charged: its own where the io controller is on v2, that of the
/// folder at the same path of the v1 hierarchy otherwise. `None` while there is no such folder.
pub(crate) fn block_id(mounts: &CgroupMounts, cgroup: CgroupId) -> Option<u64> {
    let Some(v1) = &mounts.v1_block else { return Some(cgroup.0) };
    let v2 = mounts.v2.as_ref()?;
    let path = cgroup_path(v2, cgroup).ok()?;
    let below = path.strip_prefix(v2).ok()?;
    if below.as_os_str().is_empty() {
        return None;
    }
    cgroup_id(&v1.join(below)).ok().map(|id| id.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_hybrid_and_unified_hosts_are_told_apart() {
        let hybrid = "24 1 0:21 / /sys/fs/cgroup/blkio rw,relatime shared:5 - cgroup cgroup rw,blkio\n\
                      25 1 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      27 1 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      26 1 0:22 /a /mnt/bind rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            CgroupMounts::parse(hybrid),
            CgroupMounts {
                v2: Some("/sys/fs/cgroup/unified".into()),
                v1_block: Some("/sys/fs/cgroup/blkio".into()),
                v1_memory: Some("/sys/fs/cgroup/memory".into()),
            }
        );
        let unified = "25 1 0:22 / /sys/fs/c\\040group rw,nosuid master:1 shared:2 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            CgroupMounts::parse(unified),
            CgroupMounts { v2: Some("/sys/fs/c group".into()), ..CgroupMounts::default() }
        );
        assert_eq!(CgroupMounts::parse("rubbish\n\n1 - 2"), CgroupMounts::default());
    }
}
