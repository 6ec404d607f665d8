//! The installed SDK, and a C compiler.

#![allow(dead_code, reason = "each file uses some of it")]

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

pub(crate) fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The SDK in a folder of its own, as `cargo xtask install-sdk` puts it there, and room for what is built with it.
pub(crate) struct Sdk {
    folder: TempDir,
}

impl Sdk {
    pub(crate) fn install() -> Self {
        let folder = tempfile::tempdir().unwrap();
        said(Command::new("sh").arg(package().join("install.sh")).arg(built()).arg(folder.path()));
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What `pkg-config` says.
    pub(crate) fn flags(&self, arguments: &[&str]) -> Vec<String> {
        let mut command = Command::new("pkg-config");
        command.args(arguments).arg("warmswap").env("PKG_CONFIG_PATH", self.path("lib/pkgconfig"));
        said(&mut command).split_whitespace().map(str::to_owned).collect()
    }
}

/// Where cargo put the library.
fn built() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let beside = own.parent().unwrap().parent().unwrap().to_owned();
    let folder = std::env::var_os("WARMSWAP_BIN_DIR").map_or(beside, PathBuf::from);
    let library = folder.join("libwarmswap.so");
    assert!(
        library.is_file(),
        "{} is missing: run `cargo build --release --package warmswap-sdk-c`",
        library.display()
    );
    folder
}

/// Runs it; it must succeed. Returns what it printed.
pub(crate) fn said(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?} ended with {}\n{stdout}{stderr}", output.status);
    stdout
}
