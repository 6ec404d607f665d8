//! What the targets share: sealed memory files, and a place where images are prepared and escapes are seen.

use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use tempfile::TempDir;
use warmswap_backend::{Backend, FakeBackend, PreparedImage};
use warmswap_model::ImageRef;

const CANARY: &str = "nobody writes here";

/// A memory file that nobody can change any more.
///
/// # Panics
/// When there is no memory.
#[must_use]
pub fn sealed_memory(bytes: &[u8]) -> OwnedFd {
    let name: &CStr = c"fuzzed";
    // SAFETY: a valid name; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0, "no memory file");
    // SAFETY: just made, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let file = fs::File::from(fd.try_clone().expect("a descriptor is free"));
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).expect("memory is there");
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: integers only.
    assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) }, 0, "it can be sealed");
    fd
}

/// A folder with an image to be, a folder for layers, and a file that must stay as it is.
pub struct Kiln {
    folder: TempDir,
    backend: FakeBackend,
}

impl Kiln {
    /// # Panics
    /// When there is no place for temporary files.
    #[must_use]
    pub fn new() -> Self {
        // In memory where that is possible: every layer that is kept is synced.
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = tempfile::Builder::new().prefix("warmswap-fuzz-").tempdir_in(parent).expect("a folder");
        let backend = FakeBackend::new(&folder.path().join("work"));
        let kiln = Self { folder, backend };
        kiln.write("canary", CANARY.as_bytes());
        kiln
    }

    /// # Panics
    /// When there is no place for temporary files.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it is below the folder")).expect("a folder");
        fs::write(path, bytes).expect("a file");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// # Errors
    /// What the back end says against the image.
    pub fn prepare(&self, name: &str) -> Result<PreparedImage, warmswap_backend::BackendError> {
        let prepared = self.backend.prepare_image(&ImageRef(self.path(name)))?;
        let layers = self.path("work/layers");
        for layer in prepared.layers.iter().filter(|layer| !layer.starts_with(self.path("bundle"))) {
            // A bundle may name any root it likes: it is a folder of whoever names it. Layers are ours.
            assert!(name == "bundle" || layer.parent() == Some(&layers), "{} is no layer", layer.display());
        }
        Ok(prepared)
    }

    /// # Panics
    /// When anything was written where nothing may be.
    pub fn assert_untouched(&self) {
        assert_eq!(fs::read_to_string(self.path("canary")).ok().as_deref(), Some(CANARY), "the canary");
        let names = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        for name in names(self.folder.path()) {
            assert!(["canary", "image", "bundle", "work"].contains(&name.as_str()), "{name} was made");
        }
        for name in names(&self.path("work")) {
            assert_eq!(name, "layers", "beside the layers");
        }
        for name in names(&self.path("work/layers")) {
            let digest = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            assert!(digest || name == ".seen", "{name} was left among the layers");
        }
    }
}

impl Default for Kiln {
    fn default() -> Self {
        Self::new()
    }
}

/// Appends an entry, whatever its name.
pub fn entry(archive: &mut Vec<u8>, kind: EntryType, name: &str, link: &str, data: &[u8]) {
    let mut header = Header::new_gnu();
    let fields = header.as_gnu_mut().expect("a GNU header");
    let copy = |field: &mut [u8; 100], text: &str| {
        let len = text.len().min(field.len());
        field[..len].copy_from_slice(&text.as_bytes()[..len]);
    };
    copy(&mut fields.name, name);
    copy(&mut fields.linkname, link);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(data.len() as u64);
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

/// The end of a tar stream.
pub fn finish(archive: &mut Vec<u8>) {
    archive.resize(archive.len() + 1024, 0);
}

/// An archive as `docker save` writes it, of one layer.
#[must_use]
pub fn docker_save(layer: &[u8]) -> Vec<u8> {
    let digest: String = Sha256::digest(layer).iter().map(|byte| format!("{byte:02x}")).collect();
    let config = serde_json::json!({
        "architecture": "amd64",
        "config": {"Entrypoint": ["/bin/x"], "Env": ["A=1"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": ["x:1"], "Layers": ["layer.tar"]}]);
    let mut archive = Vec::new();
    entry(&mut archive, EntryType::Regular, "manifest.json", "", manifest.to_string().as_bytes());
    entry(&mut archive, EntryType::Regular, "config.json", "", config.to_string().as_bytes());
    entry(&mut archive, EntryType::Regular, "layer.tar", "", layer);
    finish(&mut archive);
    archive
}
