//! `install-sdk`: what a service that is not written in Rust links, below a folder: library, header, pkg-config file, Python
//! module.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::run;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to put it: PREFIX/lib, PREFIX/include, PREFIX/share
    #[arg(long, value_name = "PREFIX", default_value = "/usr/local")]
    prefix: PathBuf,
}

/// By the script that packagers use.
pub(crate) fn install(options: &Options) -> Result<()> {
    let prefix = std::path::absolute(&options.prefix).context("cannot tell where the folder is")?;
    run::run(run::cargo().args(["build", "--release", "--package", "warmswap-sdk-c"]))?;
    let script = run::workspace().join("runtime/sdk/c/install.sh");
    run::run(Command::new("sh").arg(script).arg(run::target().join("release")).arg(&prefix))?;
    let prefix = prefix.display();
    eprintln!("installed; unless your tools look there anyway: export PKG_CONFIG_PATH={prefix}/lib/pkgconfig");
    eprintln!(
        "and for programs that run: export LD_LIBRARY_PATH={prefix}/lib PYTHONPATH={prefix}/share/warmswap/python"
    );
    Ok(())
}
