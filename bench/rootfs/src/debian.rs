//! Packs programs that Debian built: the files of installed packages and of whatever they depend on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::{Result, RootfsError, below, copy, create_folder, prepare};

/// What no program needs to run.
const LEFT_OUT: [&str; 5] =
    ["/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/", "/usr/share/info/", "/usr/share/lintian/"];

/// Makes `dest` a root file system with the files of these packages and of all that they depend on, as they are installed
/// on this host: symbolic links stay links, folders that the host has merged are merged. What packages make when
/// they are configured is not in it, but for compiled Python modules. `dest` may exist; files of the same name are
/// replaced.
///
/// # Errors
/// When this is no Debian, a package is not installed, or a file cannot be written.
pub fn pack_packages(packages: &[&str], dest: &Path) -> Result<()> {
    let installed = Installed::read()?;
    let mut wanted = BTreeSet::new();
    for package in packages {
        installed
            .close(package, &mut wanted)
            .map_err(|problem| RootfsError::Package { package: (*package).to_owned(), problem })?;
    }
    merge_folders(dest)?;
    prepare(dest)?;
    let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
    for line in dpkg(&[&["--listfiles"], &wanted[..]].concat())?.lines() {
        // Others tell of diversions.
        if line.starts_with('/') && !LEFT_OUT.iter().any(|folder| line.starts_with(folder)) {
            pack_file(Path::new(line), dest)?;
        }
    }
    Ok(())
}

/// Where the host has `/lib` in `/usr/lib`, the image has it there too.
fn merge_folders(dest: &Path) -> Result<()> {
    create_folder(dest)?;
    let file_error = |path: &Path| {
        let path = path.to_owned();
        move |source| RootfsError::File { action: "merge", path, source }
    };
    for entry in fs::read_dir("/").map_err(file_error(Path::new("/")))?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let link = dest.join(entry.file_name());
        if target.components().all(|part| matches!(part, Component::Normal(_))) {
            create_folder(&dest.join(&target))?;
            if fs::symlink_metadata(&link).is_err() {
                symlink(&target, &link).map_err(file_error(&link))?;
            }
        }
    }
    Ok(())
}

fn pack_file(path: &Path, dest: &Path) -> Result<()> {
    // A conffile that was deleted, say.
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    let to = below(dest, path);
    let file_error = |action| {
        let path = to.clone();
        move |source| RootfsError::File { action, path, source }
    };
    if metadata.is_dir() {
        create_folder(&to)?;
        return fs::set_permissions(&to, metadata.permissions()).map_err(file_error("set the mode of"));
    }
    if let Some(parent) = to.parent() {
        create_folder(parent)?;
    }
    if metadata.is_symlink() {
        // Two spellings of one path, where folders are merged, or an earlier packing.
        match fs::remove_file(&to) {
            Err(source) if source.kind() == io::ErrorKind::IsADirectory => return Ok(()),
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(file_error("replace")(source)),
            _ => {}
        }
        let target = fs::read_link(path).map_err(file_error("read the link"))?;
        return symlink(target, &to).map_err(file_error("link"));
    }
    if !metadata.is_file() {
        return Ok(());
    }
    copy_as_is(path, &to)?;
    for compiled in compiled_modules(path) {
        copy_as_is(&compiled, &below(dest, &compiled))?;
    }
    Ok(())
}

/// With the time of its last change, by which Python tells whether a compiled module is current.
fn copy_as_is(from: &Path, to: &Path) -> Result<()> {
    copy(from, to)?;
    fs::metadata(from)
        .and_then(|metadata| metadata.modified())
        .and_then(|time| fs::File::open(to)?.set_modified(time))
        .map_err(|source| RootfsError::File { action: "set the time of", path: to.to_owned(), source })
}

/// `/x/__pycache__/a.cpython-311.pyc` of `/x/a.py`: made when the package was configured, and each start of a program would
/// take a second longer without.
fn compiled_modules(source: &Path) -> Vec<PathBuf> {
    let Some(stem) = source.file_name().and_then(|name| name.to_str()?.strip_suffix(".py")) else { return Vec::new() };
    let Some(cache) = source.parent().map(|folder| folder.join("__pycache__")) else { return Vec::new() };
    let ours = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| {
            name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(".cpython-") && rest.ends_with(".pyc"))
        })
    };
    fs::read_dir(cache).map_or_else(|_| Vec::new(), |found| found.flatten().map(|e| e.path()).filter(ours).collect())
}

/// What the packages of this host depend on.
#[derive(Debug, Default)]
struct Installed {
    /// By name: alternatives of each dependency.
    depends: BTreeMap<String, Vec<Vec<String>>>,
    /// Names that stand for other packages.
    provided_by: BTreeMap<String, String>,
}

impl Installed {
    fn read() -> Result<Self> {
        let format = "${db:Status-Status}\t${Package}\t${Pre-Depends}\t${Depends}\t${Provides}\n";
        let output = run("dpkg-query", &["--show", &format!("--showformat={format}")])?;
        Ok(Self::parse(&output))
    }

    fn parse(text: &str) -> Self {
        let mut installed = Self::default();
        for line in text.lines() {
            let fields: Vec<&str> = line.split('\t').collect();
            let [status, package, pre_depends, depends, provides] = fields[..] else { continue };
            if status != "installed" {
                continue;
            }
            let alternatives = |field: &str| names(field, ',').into_iter().map(|one| names(&one, '|')).collect();
            let mut all: Vec<Vec<String>> = alternatives(pre_depends);
            all.extend::<Vec<Vec<String>>>(alternatives(depends));
            let all = all.into_iter().map(|any| any.iter().map(|name| bare(name)).collect()).collect();
            installed.depends.entry(package.to_owned()).or_insert(all);
            for provided in names(provides, ',') {
                installed.provided_by.entry(bare(&provided)).or_insert_with(|| package.to_owned());
            }
        }
        installed
    }

    /// Adds a package and all that it depends on, or says what is missing.
    fn close(&self, package: &str, wanted: &mut BTreeSet<String>) -> std::result::Result<(), String> {
        let mut waiting = vec![vec![package.to_owned()]];
        while let Some(any) = waiting.pop() {
            let real = any.iter().find_map(|name| {
                let name = if self.depends.contains_key(name) { name } else { self.provided_by.get(name)? };
                Some((name, self.depends.get(name)?))
            });
            let (name, depends) = real.ok_or_else(|| format!("{} is not installed", any.join(" or ")))?;
            if wanted.insert(name.clone()) {
                waiting.extend(depends.iter().cloned());
            }
        }
        Ok(())
    }
}

fn names(field: &str, separator: char) -> Vec<String> {
    field.split(separator).map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// `python3:any (>= 3.10~)` is `python3`.
fn bare(name: &str) -> String {
    name.split([' ', '(', ':']).next().unwrap_or(name).to_owned()
}

fn dpkg(arguments: &[&str]) -> Result<String> {
    run("dpkg", arguments)
}

fn run(program: &'static str, arguments: &[&str]) -> Result<String> {
    let failed = |problem: String| RootfsError::PackageManager { program, problem };
    let output =
        Command::new(program).args(arguments).env("LC_ALL", "C").output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    String::from_utf8(output.stdout).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_followed_through_alternatives_and_provided_names() {
        let installed = Installed::parse(
            "installed\tserver\tbase (>= 1)\tlibx (= 2), none | other:any, virtual\t\n\
             installed\tbase\t\t\t\n\
             installed\tlibx\t\tbase\t\n\
             config-files\tnone\t\t\t\n\
             installed\tother\t\t\t\n\
             installed\treal\t\tserver\tvirtual (= 1), virtual2\n\
             installed\tunrelated\t\t\t\n",
        );
        let mut wanted = BTreeSet::new();
        installed.close("server", &mut wanted).unwrap();
        assert_eq!(wanted.iter().map(String::as_str).collect::<Vec<_>>(), ["base", "libx", "other", "real", "server"]);
        let problem = installed.close("none", &mut wanted).unwrap_err();
        assert_eq!(problem, "none is not installed");
    }

    #[test]
    fn a_packed_package_runs_with_nothing_but_the_folder() {
        // Where there is no Debian there are no packages, and nothing here is of use.
        if Installed::read().is_err() {
            return;
        }
        let dest = tempfile::tempdir().unwrap();
        pack_packages(&["dash"], dest.path()).unwrap();
        pack_packages(&["dash"], dest.path()).unwrap();
        let shell = fs::canonicalize("/bin/dash").unwrap();
        let loader = crate::interpreter(&shell).unwrap().unwrap();
        let inside = |path: &Path| {
            let path = below(dest.path(), path);
            assert!(path.is_file(), "{} is missing", path.display());
        };
        inside(&shell);
        inside(&loader);
        crate::libraries(&shell).unwrap().iter().for_each(|library| inside(library));
        assert!(!dest.path().join("usr/share/doc").exists());
        assert!(matches!(pack_packages(&["no-such-package"], dest.path()), Err(RootfsError::Package { .. })));
    }
}
