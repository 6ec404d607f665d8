//! Kernels to test on: fetched as Debian packages with Debian's own client, unpacked below the target folder, never
//! installed. No root needed, and the host's package lists stay as they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::run;

/// A kernel line with the Debian suite that carries it. To add one, add a row and run
/// `cargo xtask vm --kernel NAME --command 'uname -r'`. sid moves on: `7.x` is whatever 7 it has today.
const KERNELS: [(&str, &str); 6] = [
    ("5.10", "bullseye"),
    ("6.1", "bookworm"),
    ("6.1-full", "bookworm"),
    ("6.12", "trixie"),
    ("7.2", "sid"),
    ("7.x", "sid"),
];

/// Depend on the newest kernel of the suite: the small one, which has what virtual machines have, and the one with
/// every driver, for the lines whose names end with [`FULL`].
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const META_PACKAGE_FULL: &str = "linux-image-amd64";
const FULL: &str = "-full";

/// What the tests need and the cloud kernels have as modules: overlayfs for images, veth for networks, sock_diag for
/// the comparison of sockets before and after, evdev and uinput for input, a disk for block I/O.
const MODULES: [&str; 9] =
    ["overlay", "veth", "unix_diag", "inet_diag", "tcp_diag", "evdev", "virtio_pci", "virtio_blk", "uinput"];

#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// In the order in which they can be loaded.
    pub(crate) modules: Vec<PathBuf>,
}

pub(crate) fn names() -> Vec<&'static str> {
    KERNELS.iter().map(|(name, ..)| *name).collect()
}

/// Fetches the kernel unless it is there already.
pub(crate) fn fetch(name: &str) -> Result<Kernel> {
    let Some((_, suite)) = KERNELS.iter().find(|(known, ..)| *known == name) else {
        bail!("no kernel {name} in the table, there are {}", names().join(", "));
    };
    let folder = run::target().join("vm/kernels").join(name);
    let unpacked = folder.join("unpacked");
    if !unpacked.is_dir() {
        let packages = download(name, suite, &folder)?;
        // Under another name until it is complete: an interrupted one is not taken for a whole one.
        let partial = folder.join("partial");
        remove(&partial)?;
        for package in &packages {
            run::output(Command::new("dpkg-deb").arg("--extract").args([package, &partial]))?;
            fs::remove_file(package).with_context(|| format!("cannot remove {}", package.display()))?;
        }
        fs::rename(&partial, &unpacked).with_context(|| format!("cannot rename {}", partial.display()))?;
    }
    // /boot/vmlinuz-VERSION, or beside the modules where the package is split.
    let image = find(&unpacked, &|file| file == "vmlinuz" || file.starts_with("vmlinuz-"))?;
    let image = image.into_iter().next().context("the kernel package has no vmlinuz")?;
    let modules = load_order(&unpacked)?;
    Ok(Kernel { image, modules })
}

/// With package lists of our own below `folder`, so that the host may be of any suite.
fn download(name: &str, suite: &str, folder: &Path) -> Result<Vec<PathBuf>> {
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
    // Without this option a mirror that does not answer is only warned about.
    run::output(client("apt-get").args(["-o", "APT::Update::Error-Mode=any", "update"]))
        .with_context(|| format!("no package lists of Debian {suite}"))?;
    let depends = |package: &str| -> Result<Vec<String>> {
        let shown = run::output(client("apt-cache").args(["show", "--no-all-versions", package]))?;
        Ok(dependencies_of_package(&shown))
    };
    let meta = if name.ends_with(FULL) { META_PACKAGE_FULL } else { META_PACKAGE };
    let image = depends(meta)?.into_iter().find(|package| package.starts_with("linux-image-"));
    let image = image.with_context(|| format!("{meta} of {suite} names no kernel"))?;
    if !is_of_line(&image, name) {
        let other = KERNELS.iter().find(|(other, of)| *of == suite && is_of_line(&image, other));
        let how = other.map_or_else(
            || "correct the table in xtask/src/vm/kernel.rs".to_owned(),
            |(other, _)| format!("ask for {other}, which is whatever it has"),
        );
        bail!("Debian {suite} now has {image}, not {name}: {how}");
    }
    let mut packages = parts(depends(&image)?);
    if packages.is_empty() {
        packages.push(image);
    }
    run::output(client("apt-get").arg("download").args(&packages))?;
    let file = |package: &String| {
        let found = find(folder, &|file| file.starts_with(&format!("{package}_")) && file.ends_with(".deb"))?;
        found.into_iter().next().with_context(|| format!("apt-get downloaded no {package}"))
    };
    let files = packages.iter().map(file).collect::<Result<_>>()?;
    remove(&apt)?;
    Ok(files)
}

/// From sid on, the image and the modules are packages of their own, and `linux-image-…` only asks for both.
fn parts(dependencies: Vec<String>) -> Vec<String> {
    let part = |package: &String| ["linux-binary-", "linux-modules-"].iter().any(|p| package.starts_with(p));
    dependencies.into_iter().filter(part).collect()
}

/// From what apt-cache shows of one package: names only, the first of alternatives.
fn dependencies_of_package(shown: &str) -> Vec<String> {
    let line = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    line.split(',').filter_map(|one| one.split_whitespace().next()).map(str::to_owned).collect()
}

/// `linux-image-6.12.3+deb13-cloud-amd64` is of the line 6.12, `linux-image-7.3.1…` of 7.x.
fn is_of_line(package: &str, line: &str) -> bool {
    let Some(version) = package.strip_prefix("linux-image-") else { return false };
    let line = line.strip_suffix(FULL).unwrap_or(line);
    match line.strip_suffix('x') {
        Some(beginning) => version.starts_with(beginning),
        None => version.strip_prefix(line).is_some_and(|rest| rest.starts_with(['.', '+'])),
    }
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

    #[test]
    fn a_split_package_is_fetched_in_parts() {
        let whole = "Package: a\nDepends: kmod, initramfs-tools (>= 0.120) | linux-initramfs-tool\nSize: 1\n";
        assert!(parts(dependencies_of_package(whole)).is_empty());
        let split =
            "Depends: dracut | x, linux-base-7.2-c (= 7.2-1), linux-binary-7.2-c (= 7.2-1), linux-modules-7.2-c\n";
        assert_eq!(parts(dependencies_of_package(split)), ["linux-binary-7.2-c", "linux-modules-7.2-c"]);
    }

    #[test]
    fn a_line_is_told_from_its_neighbours() {
        assert!(is_of_line("linux-image-6.1.0-50-cloud-amd64", "6.1"));
        assert!(!is_of_line("linux-image-6.12.117+deb13-cloud-amd64", "6.1"));
        assert!(is_of_line("linux-image-7.3.1+deb14-cloud-amd64", "7.x"));
        assert!(!is_of_line("linux-image-7.3.1+deb14-cloud-amd64", "7.2"));
        assert!(is_of_line("linux-image-6.1.0-50-amd64", "6.1-full"));
    }
}
