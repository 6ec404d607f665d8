//! Builds the BPF programs of `ebpf/probes` and leaves the object in `OUT_DIR/warmswap-probes`.
//!
//! They are compiled with the project's own stable toolchain: `RUSTC_BOOTSTRAP` allows `-Z build-std=core`, and
//! bpf-linker turns the bitcode into BPF. With `AYA_BUILD_SKIP=1` nothing is built, the object is empty, and loading
//! it says so.

use std::path::{Path, PathBuf};
use std::{env, fs};

const PACKAGE: &str = "warmswap-probes";

fn main() {
    if let Err(problem) = build() {
        // `cargo::error` would need a newer minimum; a panic message is what cargo shows in full.
        panic!("cannot build the BPF programs (ebpf/probes): {problem}");
    }
}

fn build() -> Result<(), String> {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let workspace = here.ancestors().nth(2).ok_or("the crate is not two folders below the workspace")?.to_owned();
    let object = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join(PACKAGE);
    let toolchain_file = workspace.join("rust-toolchain.toml");
    for path in [&toolchain_file, &workspace.join("ebpf/events"), &workspace.join("ebpf/probes")] {
        println!("cargo::rerun-if-changed={}", path.display());
    }

    let skip = env::var("AYA_BUILD_SKIP").is_ok_and(|value| value == "1" || value.eq_ignore_ascii_case("true"));
    if skip {
        println!("cargo::rerun-if-env-changed=AYA_BUILD_SKIP");
        return fs::write(&object, b"").map_err(|error| format!("{}: {error}", object.display()));
    }

    let toolchain = toolchain_of(&toolchain_file)?;
    require_rust_src(&toolchain)?;
    let tools = workspace.join("target/tools/bin");
    require_linker(&tools)?;

    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(std::iter::once(tools).chain(env::split_paths(&path)))
        .map_err(|error| format!("PATH: {error}"))?;
    // SAFETY: this process has one thread until aya-build starts its own.
    unsafe {
        env::set_var("PATH", path);
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // A panic path is what the verifier refuses; the workspace's release profile checks for overflow.
        env::set_var("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "false");
        env::set_var("CARGO_PROFILE_RELEASE_DEBUG", "2");
        // aya-build passes every line on as a warning; errors still come.
        env::set_var("CARGO_TERM_QUIET", "true");
        // Settings for the host's programs, and wrappers for its compiler, mean nothing to the BPF target.
        for name in [
            "RUSTFLAGS",
            "CARGO_BUILD_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_INCREMENTAL",
            "CARGO_TARGET_DIR",
            "RUSTC_WRAPPER",
            "CARGO_BUILD_RUSTC_WRAPPER",
            "RUSTDOCFLAGS",
        ] {
            env::remove_var(name);
        }
    }
    let probes = workspace.join("ebpf/probes");
    let root_dir = probes.to_str().ok_or_else(|| format!("{} is not valid UTF-8", probes.display()))?;
    let package = aya_build::Package { name: PACKAGE, root_dir, ..Default::default() };
    aya_build::build_ebpf([package], aya_build::Toolchain::Custom(&toolchain)).map_err(|error| format!("{error:#}"))
}

/// `channel` of rust-toolchain.toml.
fn toolchain_of(file: &Path) -> Result<String, String> {
    let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| key.trim() == "channel")
        .map(|(_, value)| value.trim().trim_matches('"').to_owned())
        .ok_or_else(|| format!("{} has no channel", file.display()))
}

/// `core` is compiled for BPF from source.
fn require_rust_src(toolchain: &str) -> Result<(), String> {
    // cargo names the compiler it uses; with rustup it is the toolchain's own.
    let rustc = env::var_os("RUSTC").ok_or("RUSTC is not set")?;
    let output = std::process::Command::new(&rustc)
        .args(["--print", "sysroot"])
        .output()
        .map_err(|error| format!("{} --print sysroot: {error}", rustc.display()))?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
    if source.exists() {
        return Ok(());
    }
    Err(format!(
        "the component rust-src of toolchain {toolchain} is missing ({} does not exist); run `cargo xtask setup`",
        source.display()
    ))
}

fn require_linker(tools: &Path) -> Result<(), String> {
    const LINKER: &str = "bpf-linker";
    let path = env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::iter::once(tools.to_owned()).chain(env::split_paths(&path)).map(|dir| dir.join(LINKER));
    // Only a file that exists may be named to cargo: one that does not would mean a build every time.
    match candidates.find(|file| file.is_file()) {
        Some(found) => {
            println!("cargo::rerun-if-changed={}", found.display());
            Ok(())
        }
        None => Err(format!("{LINKER} is neither in {} nor on PATH; run `cargo xtask setup`", tools.display())),
    }
}
