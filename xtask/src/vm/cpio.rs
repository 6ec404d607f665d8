//! Writes the archive (cpio, "newc") from which the kernel fills its first root file system. Written here, because
//! it is short, needs no root for device nodes, and no program that might be missing.
//!
//! ```text
//! "070701" then 13 numbers of 8 hex digits: inode mode uid gid links mtime size major minor rmajor rminor
//! name_size check; name with NUL; padding to 4; content; padding to 4. Ends with a file called TRAILER!!!.
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

enum Entry {
    Folder,
    /// Content and permissions.
    Text(Vec<u8>, u32),
    /// A file of the host.
    Copy(PathBuf),
    Link(String),
    /// Major and minor number.
    Device(u32, u32),
}

/// What is to be in the archive, by path without the leading slash. Folders come by themselves, and before what is in
/// them, because the order is that of the names.
#[derive(Default)]
pub(super) struct Archive {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Archive {
    pub(super) fn folder(&mut self, path: &str) -> Result<()> {
        self.add(Path::new(path), Entry::Folder)
    }

    pub(super) fn text(&mut self, path: &str, content: impl Into<Vec<u8>>, permissions: u32) -> Result<()> {
        self.add(Path::new(path), Entry::Text(content.into(), permissions))
    }

    pub(super) fn copy(&mut self, host: &Path, guest: &Path) -> Result<()> {
        self.add(guest, Entry::Copy(host.to_owned()))
    }

    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.add(Path::new(path), Entry::Link(target.to_owned()))
    }

    pub(super) fn device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.add(Path::new(path), Entry::Device(major, minor))
    }

    pub(super) fn contains(&self, path: &Path) -> bool {
        self.entries.contains_key(path.strip_prefix("/").unwrap_or(path))
    }

    fn add(&mut self, path: &Path, entry: Entry) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path.as_os_str().is_empty() || !path.components().all(|c| matches!(c, Component::Normal(_))) {
            bail!("{} is no plain path for the virtual machine", path.display());
        }
        for folder in path.ancestors().skip(1).filter(|a| !a.as_os_str().is_empty()) {
            match self.entries.entry(folder.to_owned()).or_insert(Entry::Folder) {
                Entry::Folder => {}
                _ => bail!("{} cannot be a file and a folder", folder.display()),
            }
        }
        self.entries.insert(path.to_owned(), entry);
        Ok(())
    }

    /// Returns the size in bytes.
    pub(super) fn write(&self, to: &Path) -> Result<u64> {
        let file = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
        let mut writer = Writer { to: BufWriter::new(file), written: 0, inode: 0 };
        for (path, entry) in &self.entries {
            let result = match entry {
                Entry::Folder => writer.entry(path, FOLDER, 0, 0, &mut io::empty(), 0),
                Entry::Text(content, permissions) => {
                    writer.entry(path, FILE | permissions, 0, 0, &mut content.as_slice(), content.len() as u64)
                }
                Entry::Link(target) => writer.entry(path, LINK, 0, 0, &mut target.as_bytes(), target.len() as u64),
                Entry::Device(major, minor) => {
                    writer.entry(path, CHARACTER_DEVICE, *major, *minor, &mut io::empty(), 0)
                }
                Entry::Copy(host) => writer.copy(host, path),
            };
            result.with_context(|| format!("cannot put {} into {}", path.display(), to.display()))?;
        }
        writer.entry(Path::new("TRAILER!!!"), 0, 0, 0, &mut io::empty(), 0)?;
        writer.to.flush().with_context(|| format!("cannot write {}", to.display()))?;
        Ok(writer.written)
    }
}

struct Writer<W> {
    to: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Writer<W> {
    fn copy(&mut self, host: &Path, path: &Path) -> io::Result<()> {
        let metadata = fs::metadata(host)?;
        let permissions = metadata.mode() & 0o777;
        self.entry(path, FILE | permissions, 0, 0, &mut File::open(host)?, metadata.len())
    }

    fn entry(
        &mut self,
        path: &Path,
        mode: u32,
        major: u32,
        minor: u32,
        content: &mut dyn io::Read,
        size: u64,
    ) -> io::Result<()> {
        let name = path.as_os_str().as_encoded_bytes();
        let size32 = u32::try_from(size).map_err(|_| io::Error::other("files above 4 GiB do not fit this format"))?;
        self.inode += 1;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let mut header = String::from("070701");
        for number in [self.inode, mode, 0, 0, 1, 0, size32, 0, 0, major, minor, name_size, 0] {
            header += &format!("{number:08X}");
        }
        self.bytes(header.as_bytes())?;
        self.bytes(name)?;
        self.bytes(b"\0")?;
        self.pad()?;
        let copied = io::copy(&mut content.take(size), &mut self.to)?;
        self.written += copied;
        if copied != size {
            return Err(io::Error::other("the file became shorter while it was read"));
        }
        self.pad()
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.to.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        while !self.written.is_multiple_of(4) {
            self.bytes(b"\0")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn another_program_reads_the_archive() {
        let folder = tempfile::tempdir().unwrap();
        let mut archive = Archive::default();
        archive.text("/a/b/text", "hello", 0o644).unwrap();
        archive.text("odd", "12345", 0o755).unwrap();
        archive.link("/a/link", "b/text").unwrap();
        archive.copy(Path::new("/proc/self/exe"), Path::new("/exe")).unwrap();
        assert!(archive.folder("/a/../b").is_err());
        assert!(archive.text("/odd/below", "", 0o644).is_err());
        let file = folder.path().join("archive");
        assert_eq!(archive.write(&file).unwrap(), fs::metadata(&file).unwrap().len());
        let busybox = Command::new("busybox")
            .args(["cpio", "-id"])
            .current_dir(folder.path())
            .stdin(Stdio::from(File::open(&file).unwrap()))
            .output();
        let Ok(output) = busybox else {
            println!("LEFT OUT: another_program_reads_the_archive: busybox is not installed");
            return;
        };
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read_to_string(folder.path().join("a/link")).unwrap(), "hello");
        assert_eq!(fs::read_to_string(folder.path().join("odd")).unwrap(), "12345");
        let exe = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(fs::read(folder.path().join("exe")).unwrap() == exe);
    }
}
