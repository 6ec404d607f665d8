//! `lint`: formatting, clippy, tidy. Apart from `test`, because clippy has to look at all dependencies once more
//! (it shares nothing with a build), which a first `cargo xtask test` in a fresh clone need not pay for.

use anyhow::Result;

use crate::{fuzz, run, tidy};

pub(crate) fn run() -> Result<()> {
    tidy::run()?;
    format()?;
    clippy()?;
    fuzz::lint()
}

pub(crate) fn format() -> Result<()> {
    run::run(run::cargo().args(["fmt", "--all", "--check"]))
}

/// In the release profile: build scripts and procedural macros are then those of the build. The probes are built
/// for another target by the sensor's build script and are not checked here.
fn clippy() -> Result<()> {
    run::run(run::cargo().args([
        "clippy",
        "--release",
        "--workspace",
        "--exclude=warmswap-probes",
        "--all-targets",
        "--quiet",
        "--",
        "-Dwarnings",
    ]))
}
