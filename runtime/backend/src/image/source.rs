//! The files of an image archive, by name: in a tar file, or in a folder.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;

use super::{Context, Problem};

/// Files in an archive: a layer is one.
const FILES_MAX: usize = 100_000;
/// Links from one name in the archive to another that are followed.
const LINKS_MAX: usize = 16;

pub(super) enum Source {
    Tar { file: File, index: HashMap<PathBuf, Member> },
    Folder(File),
}

pub(super) enum Member {
    Data {
        offset: u64,
        size: u64,
    },
    /// `docker save` writes a layer that occurs twice as a link.
    Link(PathBuf),
}

impl Source {
    /// Reads the headers only; `file` must be a plain tar file.
    pub(super) fn tar(file: File) -> Result<Self, Problem> {
        let mut index = HashMap::new();
        {
            let length = file.metadata()?.len();
            let mut archive = tar::Archive::new(&file);
            for entry in archive.entries_with_seek().context(|| "it is no tar file".to_owned())? {
                // The error repeats what it could not read: of a file that is none of ours, nobody should see that.
                let entry = entry.map_err(|_| Problem("it is no intact tar file".to_owned()))?;
                let path = normal(&entry.path().context(|| "a name in it is invalid".to_owned())?, Path::new(""))?;
                let kind = entry.header().entry_type();
                let member = if kind.is_file() {
                    let (offset, size) = (entry.raw_file_position(), entry.size());
                    if offset.checked_add(size).is_none_or(|end| end > length) {
                        return Err(Problem(format!("{} is cut off", path.display())));
                    }
                    Member::Data { offset, size }
                } else if kind.is_symlink() || kind.is_hard_link() {
                    let target = entry.link_name()?.ok_or("a link in it has no target")?;
                    let base = if kind.is_symlink() { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
                    Member::Link(normal(&target, base)?)
                } else {
                    continue;
                };
                index.insert(path, member);
                if index.len() > FILES_MAX {
                    return Err(Problem(format!("more than {FILES_MAX} files")));
                }
            }
        }
        Ok(Self::Tar { file, index })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.open(Path::new(name)).is_ok()
    }

    /// A reader over one file, and its size.
    pub(super) fn open(&self, name: &Path) -> Result<(Box<dyn Read>, u64), Problem> {
        match self {
            Self::Folder(root) => {
                let fd = crate::inside::open_inside(root.as_fd(), name, OFlag::O_RDONLY | OFlag::O_NONBLOCK)
                    .context(|| format!("{} cannot be read", name.display()))?;
                let file = File::from(fd);
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(Problem(format!("{} is no file", name.display())));
                }
                Ok((Box::new(file), metadata.len()))
            }
            Self::Tar { file, index } => {
                let mut name = normal(name, Path::new(""))?;
                for _ in 0..LINKS_MAX {
                    match index.get(&name) {
                        None => return Err(Problem(format!("{} is missing", name.display()))),
                        Some(Member::Link(target)) => name.clone_from(target),
                        Some(Member::Data { offset, size }) => {
                            let part = Part { file: file.try_clone()?, position: *offset, end: offset + size };
                            return Ok((Box::new(part), *size));
                        }
                    }
                }
                Err(Problem(format!("{} is a link that leads nowhere", name.display())))
            }
        }
    }

    /// A whole small file.
    pub(super) fn read(&self, name: &Path) -> Result<Vec<u8>, Problem> {
        let (reader, size) = self.open(name)?;
        if size > super::JSON_BYTES_MAX {
            return Err(Problem(format!("{} is longer than {} bytes", name.display(), super::JSON_BYTES_MAX)));
        }
        let mut bytes = Vec::new();
        reader.take(size).read_to_end(&mut bytes).context(|| format!("{} cannot be read", name.display()))?;
        Ok(bytes)
    }
}

/// Without `.`, with `..` resolved; leaving the archive is an error.
fn normal(path: &Path, base: &Path) -> Result<PathBuf, Problem> {
    let mut normal = if path.is_absolute() { PathBuf::new() } else { base.to_owned() };
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir if !normal.pop() => {
                return Err(Problem(format!("the name {} leaves the archive", path.display())));
            }
            _ => {}
        }
    }
    Ok(normal)
}

/// A stretch of a file. Seeks before every read, because the position is shared with all duplicates.
struct Part {
    file: File,
    position: u64,
    end: u64,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        if wanted == 0 {
            return Ok(0);
        }
        self.file.seek(SeekFrom::Start(self.position))?;
        let got = self.file.read(&mut buffer[..wanted])?;
        self.position += got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_archive() {
        let ok = |path: &str, base: &str| normal(Path::new(path), Path::new(base)).ok();
        assert_eq!(ok("./a/b", ""), Some("a/b".into()));
        assert_eq!(ok("../x/layer.tar", "y"), Some("x/layer.tar".into()));
        assert_eq!(ok("../../x", "y"), None);
        assert_eq!(ok("/a", "y"), Some("a".into()));
    }
}
