//! Parts of the Rust toolchain, and the linker for BPF programs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::run;

/// The last line that links the LLVM of our rustc by itself; newer ones want a newer rustc.
const BPF_LINKER: &str = "0.10.3";

/// Returns how many parts it installed.
pub(super) fn install_missing() -> Result<usize> {
    let mut installed = 0;
    for (component, why) in [
        ("rust-src", "the probes build their own `core` for the BPF target"),
        ("rustfmt", "formatting is part of the tests"),
        ("clippy", "lints are part of what is checked before a push"),
    ] {
        if has_component(component)? {
            continue;
        }
        eprintln!("setup: {component} is missing: {why}");
        add_component(component)?;
        installed += 1;
    }
    installed += usize::from(install_bpf_linker()?);
    Ok(installed)
}

/// Looks for the files: `rustup component list` needs rustup, and knows nothing of a toolchain from elsewhere.
fn has_component(component: &str) -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let sysroot = run::output(Command::new(rustc).current_dir(run::workspace()).args(["--print", "sysroot"]))
        .context("cannot ask rustc where it lies")?;
    let sysroot = Path::new(sysroot.trim());
    Ok(match component {
        "rust-src" => sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file(),
        "rustfmt" => sysroot.join("bin/cargo-fmt").is_file() && sysroot.join("bin/rustfmt").is_file(),
        "clippy" => sysroot.join("bin/cargo-clippy").is_file() && sysroot.join("bin/clippy-driver").is_file(),
        _ => bail!("{component} is not a component this knows how to look for"),
    })
}

fn add_component(component: &str) -> Result<()> {
    let channel = pinned_channel()?;
    let by_hand = format!("rustup component add {component} --toolchain {channel}");
    if !run::on_path("rustup") {
        bail!(
            "there is no rustup here to add {component}: add it to the toolchain the way that was installed, \
             or install rustup and run `rustup toolchain install {channel}` and `{by_hand}`"
        );
    }
    run::run(Command::new("rustup").args(["component", "add", component, "--toolchain", &channel]))
        .with_context(|| format!("try by hand: {by_hand}"))
}

/// The version in `rust-toolchain.toml`, the one place that names it.
fn pinned_channel() -> Result<String> {
    let path = run::workspace().join("rust-toolchain.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix('"'))
        .map(str::to_owned)
        .with_context(|| format!("{} has no line `channel = \"…\"`", path.display()))
}

fn install_bpf_linker() -> Result<bool> {
    let program = run::tools().join("bin/bpf-linker");
    let version = Command::new(&program).arg("--version").output();
    // Asked, not looked for: an interrupted installation or one for another LLVM does not answer.
    if version.is_ok_and(|v| v.status.success() && String::from_utf8_lossy(&v.stdout).contains(BPF_LINKER)) {
        return Ok(false);
    }
    eprintln!("setup: bpf-linker {BPF_LINKER} is missing: it links the BPF programs (builds in about two minutes)");
    let build = run::tools().join("build");
    let mut cargo = run::cargo();
    cargo
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force", "--root"])
        .arg(run::tools())
        // Its own, so that it is independent of the caller's and an interrupted build goes on where it was.
        .arg("--target-dir")
        .arg(&build);
    // Flags meant for this project must not leak into a tool.
    for name in ["CARGO_TARGET_DIR", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTC_WRAPPER"] {
        cargo.env_remove(name);
    }
    run::run(&mut cargo)?;
    // Half a gigabyte that nobody needs again.
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
    Ok(true)
}
