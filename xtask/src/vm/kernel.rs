//! Kernels to test on: fetched as Debian packages with Debian's own client, unpacked below the target folder, never
//! installed. No root needed, and the host's package lists stay as they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::run;

/// A kernel line with the Debian suite that carries it. To add one, add a row and run
/// `cargo xtask vm --kernel NAME --command 'uname -r'`.
const KERNELS: [(&str, &str); 3] = [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie")];

/// Depends on the newest cloud kernel of the suite.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// What the tests need and the cloud kernels have as modules: overlayfs for images, veth for networks, sock_diag for
/// the comparison of sockets before and after, evdev for input, a disk for block I/O.
const MODULES: [&str; 8] =
    ["overlay", "veth", "unix_diag", "inet_diag", "tcp_diag", "evdev", "virtio_pci", "virtio_blk"];

#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// In the order in which they can be loaded.
    pub(crate) modules: Vec<PathBuf>,
}

pub(crate) fn names() -> Vec<&'static str> {
    KERNELS.iter().map(|(name, _)| *name).collect()
}

/// Fetches the kernel unless it is there already.
pub(crate) fn fetch(name: &str) -> Result<Kernel> {
    let Some((_, suite)) = KERNELS.iter().find(|(known, _)| *known == name) else {
        bail!("no kernel {name} in the table, there are {}", names().join(", "));
    };
    let folder = run::target().join("vm/kernels").join(name);
    let unpacked = folder.join("unpacked");
    if !unpacked.is_dir() {
        let package = download(name, suite, &folder)?;
        // Under another name until it is complete: an interrupted one is not taken for a whole one.
        let partial = folder.join("partial");
        remove(&partial)?;
        run::output(Command::new("dpkg-deb").arg("--extract").args([&package, &partial]))?;
        fs::rename(&partial, &unpacked).with_context(|| format!("cannot rename {}", partial.display()))?;
        fs::remove_file(&package).with_context(|| format!("cannot remove {}", package.display()))?;
    }
    let image = find(&unpacked.join("boot"), &|file| file.starts_with("vmlinuz-"))?;
    let image = image.into_iter().next().context("the kernel package has no /boot/vmlinuz-…")?;
    let modules = load_order(&unpacked)?;
    Ok(Kernel { image, modules })
}

/// With package lists of our own below `folder`, so that the host may be of any suite.
fn download(name: &str, suite: &str, folder: &Path) -> Result<PathBuf> {
    let apt = folder.join("apt");
    for below in ["lists/partial", "cache/archives/partial"] {
        let path = apt.join(below);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let sources = apt.join("sources.list");
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let source = format!("deb [arch=amd64 signed-by={keyring}] {} {suite} main\n", mirror()?);
    fs::write(&sources, source).with_context(|| format!("cannot write {}", sources.display()))?;

    let client = |program: &str| {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", sources.as_path()),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::State::lists", &apt.join("lists")),
            ("Dir::State::status", Path::new("/dev/null")),
            ("Dir::Cache", &apt.join("cache")),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        // Without this root's apt downloads as another user, who cannot write here.
        command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]);
        command.current_dir(folder);
        command
    };
    eprintln!("vm: fetching kernel {name} of Debian {suite}");
    run::output(client("apt-get").arg("update"))?;
    let shown = run::output(client("apt-cache").args(["show", "--no-all-versions", META_PACKAGE]))?;
    let package = shown
        .lines()
        .find_map(|line| line.strip_prefix("Depends: ")?.split([' ', ',']).next())
        .with_context(|| format!("{META_PACKAGE} of {suite} names no kernel"))?;
    if !package.starts_with(&format!("linux-image-{name}.")) && !package.starts_with(&format!("linux-image-{name}+")) {
        bail!("{suite} now has {package}, not {name}: correct the table in xtask/src/vm/kernel.rs");
    }
    run::output(client("apt-get").args(["download", package]))?;
    let found = find(folder, &|file| file.starts_with(package) && file.ends_with(".deb"))?;
    remove(&apt)?;
    found.into_iter().next().with_context(|| format!("apt-get downloaded no {package}"))
}

/// The Debian mirror that this host uses.
fn mirror() -> Result<String> {
    const BY_HAND: &str = "set WARMSWAP_DEBIAN_MIRROR to the address of one";
    if let Ok(mirror) = std::env::var("WARMSWAP_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    let targets = run::output(Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]))
        .with_context(|| format!("no apt here to ask for a Debian mirror: {BY_HAND}"))?;
    let mirror = targets.lines().find(|uri| uri.trim_end_matches('/').ends_with("/debian"));
    mirror.map(str::to_owned).with_context(|| format!("this host uses no Debian mirror: {BY_HAND}"))
}

/// [`MODULES`] and what they depend on. A module that the kernel does not have as a file is built in.
fn load_order(unpacked: &Path) -> Result<Vec<PathBuf>> {
    let all = find(unpacked, &|file| file.contains(".ko"))?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for module in MODULES {
        add_module(module, &all, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn add_module(name: &str, all: &[PathBuf], seen: &mut BTreeSet<String>, order: &mut Vec<PathBuf>) -> Result<()> {
    let Some(path) = all.iter().find(|path| module_name(path).as_deref() == Some(name)) else { return Ok(()) };
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let path = decompressed(path)?;
    let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    for dependency in dependencies(&content) {
        add_module(&dependency, all, seen, order)?;
    }
    order.push(path);
    Ok(())
}

/// `…/nf-log.ko.xz` is nf_log.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    Some(file.split_once(".ko")?.0.replace('-', "_"))
}

/// Newer suites compress their modules.
fn decompressed(path: &Path) -> Result<PathBuf> {
    if path.extension().is_some_and(|e| e == "xz") {
        run::output(Command::new("xz").arg("--decompress").arg("--force").arg(path))?;
        return Ok(path.with_extension(""));
    }
    Ok(path.to_owned())
}

/// The module's own note `depends=a,b`. The package has no modules.dep: that is made at installation.
fn dependencies(module: &[u8]) -> Vec<String> {
    const NOTE: &[u8] = b"\0depends=";
    let Some(at) = module.windows(NOTE.len()).position(|w| w == NOTE) else { return Vec::new() };
    let rest = &module[at + NOTE.len()..];
    let text = String::from_utf8_lossy(&rest[..rest.iter().position(|b| *b == 0).unwrap_or(rest.len())]).into_owned();
    text.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// Files below `folder` whose name `wanted` accepts, sorted.
fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_str().is_some_and(wanted) {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        assert_eq!(
            dependencies(b"\x7fELF\0alias=x\0depends=inet_diag,nf-log\0name=tcp_diag\0"),
            ["inet_diag", "nf_log"]
        );
        assert!(dependencies(b"\0depends=\0name=overlay\0").is_empty());
        assert!(dependencies(b"").is_empty());
        assert_eq!(module_name(Path::new("a/nf-log.ko.xz")).as_deref(), Some("nf_log"));
    }
}
