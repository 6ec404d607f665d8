//! From a path to layers and a config. An image is a root file system folder, an OCI bundle, or an image archive: what
//! `docker save` writes, or an OCI layout, as a tar file (plain, gzip or zstd) or, the latter, as a folder.
//!
//! Archives are untrusted input: sizes are limited by the named constants here and in `layer`, every digest is checked,
//! and no path leaves the folder it is unpacked to.
//!
//! The digest of a *folder* image is a hash over its metadata (paths, types, modes, owners, sizes, modification times,
//! link targets): reading every byte would make watching an image expensive. A file changed without a change of its
//! size and modification time is not noticed. While a container runs from a folder, the folder must not be changed in
//! place; put the new version into another folder.

mod archive;
mod bundle;
mod layer;
mod source;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use warmswap_model::ImageRef;

use crate::contract::Result;
use crate::{BackendError, PreparedImage};

/// Entries of a folder image whose metadata are hashed.
const FOLDER_ENTRIES_MAX: usize = 2_000_000;
/// A config, manifest or index, in bytes.
const JSON_BYTES_MAX: u64 = 8 << 20;

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// What is wrong with an image, without its path.
#[derive(Debug)]
pub(crate) struct Problem(pub(crate) String);

impl<T: std::fmt::Display> From<T> for Problem {
    fn from(problem: T) -> Self {
        Self(problem.to_string())
    }
}

/// Says what an error belongs to.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> std::result::Result<T, Problem>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> std::result::Result<T, Problem> {
        self.map_err(|error| Problem(format!("{}: {error}", what())))
    }
}

/// `layers` is where unpacked layers are kept.
pub(crate) fn prepare(image: &ImageRef, layers: &Path) -> Result<PreparedImage> {
    let path = &image.0;
    let missing = || BackendError::NoSuchImage { path: path.clone() };
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => missing(),
        _ => BackendError::File { action: "look at the image", path: path.clone(), source: error },
    })?;
    let prepared = if metadata.is_dir() {
        let path = fs::canonicalize(path).map_err(crate::cgroup::file_error("resolve", path))?;
        if path == Path::new("/") {
            let problem = "it is the root of this host, not an image".to_owned();
            return Err(BackendError::BadImage { path, problem });
        }
        if path.join("oci-layout").is_file() {
            archive::prepare_folder(image, &path, layers)
        } else if path.join("config.json").is_file() {
            bundle::prepare(image, &path)
        } else {
            prepare_folder(image, &path)
        }
    } else if metadata.is_file() {
        archive::prepare_file(image, path, &metadata, layers)
    } else {
        return Err(missing());
    };
    prepared.map_err(|Problem(problem)| BackendError::BadImage { path: path.clone(), problem })
}

fn prepare_folder(image: &ImageRef, path: &Path) -> std::result::Result<PreparedImage, Problem> {
    if fs::read_dir(path).context(|| "it cannot be read".to_owned())?.next().is_none() {
        return Err(Problem("the folder is empty".to_owned()));
    }
    Ok(PreparedImage {
        image: image.clone(),
        digest: format!("folder:{}", folder_digest(path, OsStr::new(""))?),
        entrypoint: Vec::new(),
        env: Vec::new(),
        working_dir: "/".into(),
        user: String::new(),
        stop_signal: None,
        layers: vec![path.to_owned()],
    })
}

/// `salt` is hashed too: the config of a bundle, say.
fn folder_digest(root: &Path, salt: &OsStr) -> std::result::Result<String, Problem> {
    let mut hash = Sha256::new();
    hash.update(salt.as_encoded_bytes());
    let mut entries = 0;
    let mut folders: Vec<PathBuf> = vec![PathBuf::new()];
    while let Some(relative) = folders.pop() {
        let folder = root.join(&relative);
        let mut names = fs::read_dir(&folder)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.file_name())).collect::<std::io::Result<Vec<_>>>())
            .context(|| format!("{} cannot be read", folder.display()))?;
        names.sort();
        entries += names.len();
        if entries > FOLDER_ENTRIES_MAX {
            return Err(Problem(format!("more than {FOLDER_ENTRIES_MAX} files")));
        }
        for name in names {
            let relative = relative.join(&name);
            let path = root.join(&relative);
            let metadata = fs::symlink_metadata(&path).context(|| format!("{} cannot be read", path.display()))?;
            let bytes = relative.as_os_str().as_encoded_bytes();
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
            for value in [metadata.mode(), metadata.uid(), metadata.gid()] {
                hash.update(value.to_le_bytes());
            }
            if metadata.is_dir() {
                folders.push(relative);
            } else {
                // A folder's own time and size change with what is unpacked below it and say nothing more.
                hash.update(metadata.size().to_le_bytes());
                hash.update(metadata.mtime().to_le_bytes());
                hash.update(metadata.mtime_nsec().to_le_bytes());
                if metadata.is_symlink() {
                    let target = fs::read_link(&path).context(|| format!("{} cannot be read", path.display()))?;
                    hash.update(target.as_os_str().as_encoded_bytes());
                }
            }
        }
    }
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_of_a_folder_changes_with_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let digest = || folder_digest(folder.path(), OsStr::new("")).unwrap();
        fs::create_dir(folder.path().join("bin")).unwrap();
        fs::write(folder.path().join("bin/a"), "1").unwrap();
        let first = digest();
        assert_eq!(first, digest());
        fs::write(folder.path().join("bin/a"), "22").unwrap();
        let second = digest();
        assert_ne!(first, second);
        fs::rename(folder.path().join("bin/a"), folder.path().join("bin/b")).unwrap();
        assert_ne!(second, digest());
    }
}
