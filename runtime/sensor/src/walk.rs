//! Programs that the kernel runs for each of many things, when it is asked to: tasks, and entries of a map. So what they have
//! counted is taken over before a window is read.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::bpf;

/// Detached when dropped.
#[derive(Debug)]
pub(crate) struct Walk {
    link: OwnedFd,
}

impl Walk {
    /// With a program that is loaded, over what it is for; over the entries of a map when that is given.
    pub(crate) fn attach(program: BorrowedFd<'_>, map: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        bpf::attach_iterator(program, map).map(|link| Self { link })
    }

    /// Over all of them, once.
    pub(crate) fn go(&self) -> io::Result<()> {
        let mut all = File::from(bpf::iterate(self.link.as_fd())?);
        // It says nothing; reading it to its end is what makes it go.
        let mut nothing = [0; 64];
        loop {
            match all.read(&mut nothing) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // After a million of them the kernel wants to be asked again.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
