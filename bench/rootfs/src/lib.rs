//! Packs a program built on this host, with the shared libraries it loads, into a folder that a container (or a
//! virtual machine) can use as its root. The demo, the tests, the benchmark and `cargo xtask vm` share it.
//!
//! Or packs programs that Debian built, from installed packages.
//!
//! Not for images in general: no layers, no image config. For that there are image archives.

mod debian;
mod elf;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use debian::pack_packages;
pub use elf::interpreter;

#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is no 64-bit little-endian ELF program: {problem}")]
    NotAProgram { path: PathBuf, problem: &'static str },
    #[error("cannot run the dynamic loader {loader} to list the libraries of {program}")]
    Loader {
        loader: PathBuf,
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{program} needs {library}, which this host does not have: install it or build the program here")]
    MissingLibrary { program: PathBuf, library: String },
    #[error("cannot pack the package {package}: {problem}")]
    Package { package: String, problem: String },
    #[error("{program}, which knows the packages of a Debian, cannot be asked: {problem}")]
    PackageManager { program: &'static str, problem: String },
    #[error("the dynamic loader {loader} cannot load {program}: {problem}")]
    NotLoadable { loader: PathBuf, program: PathBuf, problem: String },
}

type Result<T> = std::result::Result<T, RootfsError>;

/// Makes `dest` a root file system with `binary` as `/bin/<its name>`, its libraries where the loader looks for them,
/// the usual empty folders (`/proc`, `/sys`, `/dev`, `/tmp`, `/run`, `/etc`) and a minimal `/etc/passwd`.
/// Returns the program's path inside the root. `dest` may exist; files of the same name are replaced.
pub fn pack_rootfs(binary: &Path, dest: &Path) -> Result<PathBuf> {
    pack_rootfs_as(binary, dest, None)
}

/// Like [`pack_rootfs`], with another file name for the program: several versions can share one entry point.
pub fn pack_rootfs_as(binary: &Path, dest: &Path, name: Option<&str>) -> Result<PathBuf> {
    let name = match name {
        Some(name) => PathBuf::from(name),
        None => PathBuf::from(
            binary
                .file_name()
                .ok_or(RootfsError::NotAProgram { path: binary.to_owned(), problem: "it has no file name" })?,
        ),
    };
    prepare(dest)?;
    let inside = Path::new("/bin").join(name);
    copy(binary, &below(dest, &inside))?;
    for library in libraries(binary)? {
        copy(&library, &below(dest, &library))?;
    }
    Ok(inside)
}

/// What every root has.
fn prepare(dest: &Path) -> Result<()> {
    for folder in ["bin", "dev", "etc", "proc", "run", "sys", "tmp", "var"] {
        create_folder(&dest.join(folder))?;
    }
    write(&dest.join("etc/passwd"), "root:x:0:0:root:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    write(&dest.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")
}

/// Every file that must be present for `binary` to start: the dynamic loader and all shared libraries, under the
/// absolute paths at which the loader looks for them. Empty for a static program.
pub fn libraries(binary: &Path) -> Result<Vec<PathBuf>> {
    let Some(loader) = elf::interpreter(binary)? else { return Ok(Vec::new()) };
    // What ldd does, without needing ldd: the loader lists what it would load and starts nothing.
    let output = Command::new(&loader)
        .arg("--list")
        .arg(binary)
        .env_remove("LD_PRELOAD")
        .output()
        .map_err(|source| RootfsError::Loader { loader: loader.clone(), program: binary.to_owned(), source })?;
    if !output.status.success() {
        let problem = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(RootfsError::NotLoadable { loader, program: binary.to_owned(), problem });
    }
    let mut files = BTreeSet::from([loader]);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        match parse_loader_line(line) {
            Some(Listed::At(path)) => {
                files.insert(path);
            }
            Some(Listed::Missing(library)) => {
                return Err(RootfsError::MissingLibrary { program: binary.to_owned(), library });
            }
            None => {}
        }
    }
    Ok(files.into_iter().collect())
}

#[derive(Debug, PartialEq, Eq)]
enum Listed {
    At(PathBuf),
    Missing(String),
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`, `libx.so => not found`;
/// the kernel's own `linux-vdso.so.1 (0x…)` is no file.
fn parse_loader_line(line: &str) -> Option<Listed> {
    let line = line.trim();
    let (name, found) = match line.split_once(" => ") {
        Some((name, found)) => (name, found),
        None => (line, line),
    };
    if found.starts_with("not found") {
        return Some(Listed::Missing(name.to_owned()));
    }
    let path = found.split(" (0x").next()?;
    path.starts_with('/').then(|| Listed::At(PathBuf::from(path)))
}

/// `/lib/x` below `/dest` is `/dest/lib/x`.
fn below(dest: &Path, absolute: &Path) -> PathBuf {
    dest.join(absolute.strip_prefix("/").unwrap_or(absolute))
}

fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|source| RootfsError::File {
        action: "create folder",
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).map_err(|source| RootfsError::File { action: "write", path: path.to_owned(), source })
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        create_folder(parent)?;
    }
    // A container that runs from this folder may have the old file mapped or running: replace it, do not write into it.
    match fs::remove_file(to) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(RootfsError::File { action: "replace", path: to.to_owned(), source });
        }
        _ => {}
    }
    fs::copy(from, to).map(drop).map_err(|source| RootfsError::File { action: "copy", path: from.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loader_lines_are_understood() {
        let at = |p: &str| Some(Listed::At(PathBuf::from(p)));
        assert_eq!(parse_loader_line("\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)"), at("/lib/x/libc.so.6"));
        assert_eq!(parse_loader_line("\t/lib64/ld-linux-x86-64.so.2 (0x00007f)"), at("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(parse_loader_line("\tlinux-vdso.so.1 (0x00007f)"), None);
        assert_eq!(parse_loader_line("\tstatically linked"), None);
        assert_eq!(parse_loader_line("\tlibz.so => not found"), Some(Listed::Missing("libz.so".to_owned())));
    }

    #[test]
    fn a_packed_program_runs_with_nothing_but_the_folder() {
        // The test program itself: dynamically linked, and it answers `--list`.
        let program = std::env::current_exe().unwrap();
        let dest = tempfile::tempdir().unwrap();
        let inside = pack_rootfs(&program, dest.path()).unwrap();
        let loader = interpreter(&program).unwrap().expect("test programs are dynamically linked");
        // The packed loader, told to look nowhere but in the packed folders, resolves everything.
        let folders: BTreeSet<String> = libraries(&program)
            .unwrap()
            .iter()
            .map(|l| below(dest.path(), l.parent().unwrap()).display().to_string())
            .collect();
        let output = Command::new(below(dest.path(), &loader))
            .args(["--inhibit-cache", "--library-path", &folders.into_iter().collect::<Vec<_>>().join(":")])
            .arg(below(dest.path(), &inside))
            .arg("--list")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("loader_lines_are_understood"));
    }

    #[test]
    fn packing_again_replaces_the_program() {
        let dest = tempfile::tempdir().unwrap();
        let program = std::env::current_exe().unwrap();
        let first = pack_rootfs_as(&program, dest.path(), Some("service")).unwrap();
        let second = pack_rootfs_as(&program, dest.path(), Some("service")).unwrap();
        assert_eq!(first, second);
        assert_eq!(first, Path::new("/bin/service"));
    }

    #[test]
    fn what_is_no_program_is_refused_with_a_reason() {
        let dest = tempfile::tempdir().unwrap();
        let text = dest.path().join("text");
        for content in [&b""[..], b"#!/bin/sh\n", b"\x7fELF", &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0]] {
            fs::write(&text, content).unwrap();
            assert!(matches!(libraries(&text), Err(RootfsError::NotAProgram { .. })), "{content:?}");
        }
        assert!(matches!(libraries(&dest.path().join("absent")), Err(RootfsError::File { .. })));
    }
}
