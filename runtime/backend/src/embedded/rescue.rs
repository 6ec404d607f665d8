//! Descriptors of a container whose shim was killed or hangs: what the shim kept is out of reach, but the container's first
//! process still holds what it was given and the memory files it maps.
//!
//! What comes from there is as trustworthy as the container: whoever uses it checks it, as it checks the container's
//! messages.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::{EmbeddedBackend, LISTENER_PREFIX, ground};
use crate::contract::Result;
use crate::process::ProcessId;
use crate::{BackendError, ContainerId, ContainerState, MEMORY_FILE_PREFIX, NamedFd};

impl EmbeddedBackend {
    pub(super) fn rescue_fds(&self, id: &ContainerId) -> Result<Vec<NamedFd>> {
        let failed =
            |problem: String| BackendError::Runtime { action: "fetch the descriptors of", id: id.clone(), problem };
        let running = self.record(id).filter(|record| matches!(record.state, Some(ContainerState::Running { .. })));
        let alive = running.and_then(|record| Some((record.init.filter(|init| init.is_alive())?, record.passed)));
        let Some((init, passed)) = alive else {
            return Err(failed(
                "its shim process gives none, and it has ended; destroy it and create another".to_owned(),
            ));
        };
        rescue(init, &passed)
            .map_err(|error| failed(format!("its shim process gives none, and its own cannot be taken: {error}")))
    }
}

fn rescue(init: ProcessId, passed: &[String]) -> io::Result<Vec<NamedFd>> {
    let pidfd = init.pidfd().ok_or(io::ErrorKind::NotFound)?;
    let mut rescued = Vec::new();
    for (number, name) in (3..).zip(passed) {
        // The program may have closed what it has no use for.
        let Ok(fd) = take(&pidfd, number) else { continue };
        if ground::is_listener(fd.as_fd()) {
            let name = format!("{LISTENER_PREFIX}{name}");
            rescued.push(NamedFd { name, fd: fd.try_clone()? });
        }
        rescued.push(NamedFd { name: name.clone(), fd });
    }
    for entry in fs::read_dir(format!("/proc/{}/fd", init.pid))?.flatten() {
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let text = link.to_string_lossy();
        let Some(name) = text.strip_prefix("/memfd:") else { continue };
        let name = format!("{MEMORY_FILE_PREFIX}{}", name.trim_end_matches(" (deleted)"));
        if let Some(number) = entry.file_name().to_str().and_then(|number| number.parse().ok())
            && let Ok(fd) = take(&pidfd, number)
        {
            rescued.push(NamedFd { name, fd });
        }
    }
    Ok(rescued)
}

/// A duplicate of another process's descriptor.
fn take(pidfd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes three integers and returns a new descriptor, close-on-exec, or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
