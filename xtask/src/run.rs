//! Starting other programs, and where things lie.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The root of the workspace, wherever it was cloned to.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Tools built for this project only. In the workspace and not under `CARGO_TARGET_DIR`, because build scripts look
/// for them there.
pub(crate) fn tools() -> PathBuf {
    workspace().join("target/tools")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace().join(folder),
        None => workspace().join("target"),
    }
}

/// The cargo that runs us, in the workspace, without the variables that `cargo run` set for us: they would make
/// build scripts believe they are part of xtask, and rebuild.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    clean_environment(&mut command);
    command
}

/// Takes away what `cargo run` adds to the environment of xtask.
pub(crate) fn clean_environment(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let of_cargo_run = name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_MANIFEST_")
            || matches!(name, "CARGO_BIN_NAME" | "CARGO_CRATE_NAME" | "CARGO_PRIMARY_PACKAGE" | "OUT_DIR");
        if of_cargo_run {
            command.env_remove(name);
        }
    }
}

/// Goes on as a program of this workspace: it gets the terminal's signals directly and its exit status is ours.
pub(crate) fn become_program(name: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<()> {
    let program = target().join("release").join(name);
    let mut command = Command::new(&program);
    command.args(arguments);
    clean_environment(&mut command);
    eprintln!("$ {}", shown(&command));
    Err(command.exec()).with_context(|| format!("cannot start {}", program.display()))
}

/// Shows the command, runs it with our terminal and no standard input, fails when it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", shown(command));
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed with {status}", shown(command));
    }
    Ok(())
}

/// Runs quietly and returns standard output; what it said on standard error becomes part of the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed with {}: {}", shown(command), output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{}` printed something that is no UTF-8", shown(command)))
}

/// True when the program is found on PATH.
pub(crate) fn on_path(program: &str) -> bool {
    let Some(path) = std::env::var_os("PATH") else { return false };
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

pub(crate) fn shown(command: &Command) -> String {
    let mut words = vec![
        Path::new(command.get_program()).file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned(),
    ];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}
