//! `setup`: installs what is missing, says what and why, asks nothing, and does nothing the second time.
//!
//! Every step looks at what *is* there (not at a note that it was done once), so a half-finished installation is
//! finished by the next call.

mod debian;
mod rust;

use anyhow::Result;

pub(crate) fn run() -> Result<()> {
    let mut done = 0;
    done += debian::install_missing()?;
    done += rust::install_missing()?;
    if done == 0 {
        eprintln!("setup: everything is there");
    } else {
        eprintln!("setup: done, {done} installed");
    }
    Ok(())
}
