//! One layer: a tar stream, unpacked as overlayfs wants it.
//!
//! Everything is created relative to an open folder that was resolved inside the layer, and never through a link in the
//! last step, so whatever names and links the archive contains, nothing outside is touched. Device nodes are left out
//! (the container has a `/dev` of its own and its root is mounted `nodev`), and so are extended attributes (file
//! capabilities have no effect under `no_new_privs`; `trusted.overlay.*` from outside would be an attack).

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use sha2::{Digest, Sha256};
use tar::EntryType;

use super::{Context, Problem, hex};
use crate::inside::make_folder_inside;

/// What one image may unpack to, in bytes.
pub(crate) const IMAGE_BYTES_MAX: u64 = 64 << 30;
/// Files one image may have.
pub(crate) const IMAGE_ENTRIES_MAX: u64 = 4_000_000;
/// A name, in bytes: the kernel's own limit.
const NAME_BYTES_MAX: u64 = 4096;
/// What a tar stream may say about one file beyond its header, in bytes.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const OPAQUE_ATTRIBUTE: &CStr = c"trusted.overlay.opaque";

/// What is left of the limits of one image.
pub(super) struct Budget {
    bytes: u64,
    entries: u64,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self { bytes: IMAGE_BYTES_MAX, entries: IMAGE_ENTRIES_MAX }
    }

    pub(super) fn reader<R: Read>(&mut self, inner: R) -> Limited<'_, R> {
        Limited { inner, left: &mut self.bytes }
    }
}

/// An error, not an end, when the limit is reached.
pub(super) struct Limited<'a, R> {
    inner: R,
    left: &'a mut u64,
}

impl<R: Read> Read for Limited<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        match self.left.checked_sub(got as u64) {
            Some(left) => *self.left = left,
            None => return Err(io::Error::other(format!("it unpacks to more than {} GiB", IMAGE_BYTES_MAX >> 30))),
        }
        Ok(got)
    }
}

struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        Ok(got)
    }
}

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

pub(super) fn is_compressed(magic: &[u8]) -> bool {
    magic.starts_with(GZIP) || magic.starts_with(ZSTD)
}

/// Told by the first bytes, not by a media type that may be wrong.
pub(super) fn decompressed(reader: Box<dyn Read>) -> io::Result<Box<dyn Read>> {
    let mut reader = BufReader::with_capacity(1 << 17, reader);
    let magic = io::BufRead::fill_buf(&mut reader)?;
    Ok(if magic.starts_with(GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(reader))
    } else if magic.starts_with(ZSTD) {
        Box::new(zstd::stream::read::Decoder::with_buffer(reader)?)
    } else {
        Box::new(reader)
    })
}

/// A name that no other call on this host uses.
pub(super) fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Relaxed: only the number matters, nothing is ordered by it.
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A layer that is there, or unpacked beside its place until [`commit`].
pub(super) struct Unpacked {
    target: PathBuf,
    temporary: Option<Temporary>,
}

/// Unpacks the layer for `<folder>/<digest>` unless that exists. `digest` is of the uncompressed stream.
pub(super) fn unpack(
    open: impl FnOnce() -> Result<Box<dyn Read>, Problem>,
    digest: &str,
    folder: &Path,
    budget: &mut Budget,
) -> Result<Unpacked, Problem> {
    let target = folder.join(digest);
    if target.is_dir() {
        return Ok(Unpacked { target, temporary: None });
    }
    let temporary = Temporary(folder.join(format!(".unpacking-{}", unique())));
    fs::create_dir(&temporary.0).context(|| format!("{} cannot be made", temporary.0.display()))?;
    let root = File::open(&temporary.0)?;
    let cannot = || format!("layer {digest} cannot be unpacked");
    let entries = budget.entries;
    let mut stream = Hashing { inner: budget.reader(decompressed(open()?).context(cannot)?), hash: Sha256::new() };
    let used = unpack_stream(&mut stream, root.as_fd(), entries)
        .map_err(|Problem(problem)| Problem(format!("{}: {problem}", cannot())))?;
    // What follows the archive's end belongs to the digest.
    io::copy(&mut stream, &mut io::sink()).context(cannot)?;
    let found = hex(&stream.hash.finalize());
    budget.entries -= used;
    if found != digest {
        return Err(Problem(format!("layer {digest} does not match its digest: its content has {found}")));
    }
    Ok(Unpacked { target, temporary: Some(temporary) })
}

/// Gives the layers their names, once for all of them written to disk: after a crash of the host, a folder of such a name
/// must be whole.
pub(super) fn commit(unpacked: Vec<Unpacked>, folder: &Path) -> Result<Vec<PathBuf>, Problem> {
    if unpacked.iter().any(|layer| layer.temporary.is_some()) {
        nix::unistd::syncfs(File::open(folder)?).context(|| format!("{} cannot be written", folder.display()))?;
    }
    unpacked
        .into_iter()
        .map(|Unpacked { target, temporary }| match temporary.map(|t| fs::rename(&t.0, &target)) {
            // Somebody else may have unpacked the same layer meanwhile.
            Some(Err(error)) if !target.is_dir() => {
                Err(Problem(format!("{} cannot be made: {error}", target.display())))
            }
            _ => Ok(target),
        })
        .collect()
}

/// Removed when dropped, unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What extension headers say about the next entry.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u32>,
    gid: Option<u32>,
}

/// Returns the number of entries.
fn unpack_stream(stream: &mut impl Read, root: BorrowedFd<'_>, entries_max: u64) -> Result<u64, Problem> {
    let mut archive = tar::Archive::new(stream);
    let mut extension = Extension::default();
    let mut count = 0;
    // Raw: the tar crate would read extension headers of any size into memory.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        count += 1;
        if count > entries_max {
            return Err(Problem(format!("more than {IMAGE_ENTRIES_MAX} files")));
        }
        match entry.header().entry_type() {
            EntryType::GNULongName => extension.path = Some(long_name(&mut entry)?),
            EntryType::GNULongLink => extension.link = Some(long_name(&mut entry)?),
            EntryType::XHeader => read_pax(&mut entry, &mut extension)?,
            EntryType::XGlobalHeader => {}
            _ => {
                let extension = std::mem::take(&mut extension);
                let path = extension.path.clone().unwrap_or_else(|| entry.header().path_bytes().into_owned());
                let path = PathBuf::from(OsStr::from_bytes(&path));
                unpack_entry(&mut entry, &path, &extension, root)
                    .map_err(|Problem(problem)| Problem(format!("{}: {problem}", path.display())))?;
            }
        }
    }
    Ok(count)
}

fn limited(entry: &mut tar::Entry<'_, impl Read>, bytes_max: u64) -> Result<Vec<u8>, Problem> {
    if entry.header().size()? > bytes_max {
        return Err(Problem(format!("an extension header is longer than {bytes_max} bytes")));
    }
    let mut bytes = Vec::new();
    entry.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn long_name(entry: &mut tar::Entry<'_, impl Read>) -> Result<Vec<u8>, Problem> {
    let mut name = limited(entry, NAME_BYTES_MAX)?;
    if name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

fn read_pax(entry: &mut tar::Entry<'_, impl Read>, extension: &mut Extension) -> Result<(), Problem> {
    let bytes = limited(entry, EXTENSION_BYTES_MAX)?;
    for record in tar::PaxExtensions::new(&bytes) {
        let record = record?;
        let number = || record.value().ok().and_then(|v| v.parse().ok());
        match record.key_bytes() {
            b"path" => extension.path = Some(record.value_bytes().to_vec()),
            b"linkpath" => extension.link = Some(record.value_bytes().to_vec()),
            b"uid" => extension.uid = number(),
            b"gid" => extension.gid = number(),
            b"size" => return Err(Problem("files of 8 GiB and more are not supported".to_owned())),
            _ => {}
        }
    }
    Ok(())
}

fn unpack_entry(
    entry: &mut tar::Entry<'_, impl Read>,
    path: &Path,
    extension: &Extension,
    root: BorrowedFd<'_>,
) -> Result<(), Problem> {
    let header = entry.header();
    let kind = header.entry_type();
    let mode = Mode::from_bits_truncate(header.mode()? & 0o7777);
    let owner = (
        extension.uid.or_else(|| header.uid().ok().and_then(|id| id.try_into().ok())).unwrap_or(0),
        extension.gid.or_else(|| header.gid().ok().and_then(|id| id.try_into().ok())).unwrap_or(0),
    );
    let modified = i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0);
    let Some((parent, name)) = split(path)? else {
        // The root itself.
        fchmodat(root, ".", mode, FchmodatFlags::FollowSymlink)?;
        set_owner(root, c".", owner)?;
        return Ok(());
    };
    let folder = make_folder_inside(root, &parent).map_err(|errno| match errno {
        Errno::EEXIST => Problem("a folder in its name is a link that leads nowhere".to_owned()),
        other => other.into(),
    })?;
    let folder = folder.as_fd();
    if let Some(hidden) = name.to_bytes().strip_prefix(WHITEOUT) {
        return whiteout(folder, &name, hidden);
    }
    let replaced = make_room(folder, &name, kind == EntryType::Directory)?;
    match kind {
        EntryType::Directory => {
            match mkdirat(folder, name.as_c_str(), mode) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
            if replaced == Replaced::Whiteout {
                // Removed below and made anew in the same layer: nothing below may shine through.
                set_opaque(folder, &name)?;
            }
        }
        EntryType::Regular | EntryType::Continuous => {
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let file = openat(folder, name.as_c_str(), flags, Mode::from_bits_truncate(0o600))?;
            io::copy(entry, &mut File::from(file))?;
        }
        EntryType::Symlink => {
            let target = link_target(entry, extension)?;
            symlinkat(OsStr::from_bytes(&target), folder, name.as_c_str())?;
            return set_owner(folder, &name, owner);
        }
        EntryType::Link => {
            let target = link_target(entry, extension)?;
            let (from, old) = split(Path::new(OsStr::from_bytes(&target)))?.ok_or("it links to the root")?;
            let from = make_folder_inside(root, &from)?;
            linkat(from.as_fd(), old.as_c_str(), folder, name.as_c_str(), AtFlags::empty())
                .context(|| format!("cannot link to {}", String::from_utf8_lossy(&target)))?;
            // Mode, owner and time are those of the file it links to.
            return Ok(());
        }
        EntryType::Fifo => mknodat(folder, name.as_c_str(), SFlag::S_IFIFO, mode, 0)?,
        EntryType::Char | EntryType::Block => return Ok(()),
        other => return Err(Problem(format!("entries of type {other:?} are not supported"))),
    }
    set_owner(folder, &name, owner)?;
    // After the owner: changing that clears the set-id bits.
    fchmodat(folder, name.as_c_str(), mode, FchmodatFlags::FollowSymlink)?;
    let time = TimeSpec::new(modified, 0);
    utimensat(folder, name.as_c_str(), &time, &time, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

/// Folder and last name; `None` for the root.
fn split(path: &Path) -> Result<Option<(PathBuf, CString)>, Problem> {
    if path.as_os_str().len() as u64 > NAME_BYTES_MAX {
        return Err(Problem(format!("the name is longer than {NAME_BYTES_MAX} bytes")));
    }
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => return Err(Problem("the name leaves the image".to_owned())),
            _ => {}
        }
    }
    let Some(name) = clean.file_name().map(|name| CString::new(name.as_bytes())) else { return Ok(None) };
    clean.pop();
    Ok(Some((clean, name?)))
}

fn link_target(entry: &tar::Entry<'_, impl Read>, extension: &Extension) -> Result<Vec<u8>, Problem> {
    let target = extension.link.clone().or_else(|| entry.header().link_name_bytes().map(|name| name.into_owned()));
    Ok(target.filter(|target| !target.is_empty()).ok_or("a link without a target")?)
}

#[derive(PartialEq, Eq)]
enum Replaced {
    Nothing,
    Whiteout,
}

/// A later entry of the same name replaces an earlier one; folders are merged.
fn make_room(folder: BorrowedFd<'_>, name: &CStr, for_folder: bool) -> Result<Replaced, Problem> {
    let found = match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) => found,
        Err(Errno::ENOENT) => return Ok(Replaced::Nothing),
        Err(error) => return Err(error.into()),
    };
    let kind = SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFDIR {
        return if for_folder { Ok(Replaced::Nothing) } else { Err(Problem("it replaces a folder".to_owned())) };
    }
    unlinkat(folder, name, UnlinkatFlags::NoRemoveDir)?;
    Ok(if kind == SFlag::S_IFCHR { Replaced::Whiteout } else { Replaced::Nothing })
}

/// `.wh.name` hides what lower layers have under that name; `.wh..wh..opq` everything in its folder.
fn whiteout(folder: BorrowedFd<'_>, name: &CStr, hidden: &[u8]) -> Result<(), Problem> {
    if name.to_bytes() == OPAQUE {
        return set_opaque(folder, c".");
    }
    if hidden.starts_with(WHITEOUT) {
        // Notes of AUFS to itself.
        return Ok(());
    }
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(Problem("it hides no name".to_owned()));
    }
    let hidden = CString::new(hidden)?;
    match mknodat(folder, hidden.as_c_str(), SFlag::S_IFCHR, Mode::empty(), 0) {
        // This layer has the name itself: it hides the lower ones anyway, but a folder would let them shine through.
        Err(Errno::EEXIST) => {
            let found = fstatat(folder, hidden.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
            if found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits() {
                set_opaque(folder, &hidden)?;
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

fn set_opaque(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Problem> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened: OwnedFd = openat(folder, name, flags, Mode::empty())?;
    // SAFETY: an open descriptor, a terminated name, and a value of the stated length, all alive during the call.
    let done = unsafe { libc::fsetxattr(opened.as_raw_fd(), OPAQUE_ATTRIBUTE.as_ptr(), c"y".as_ptr().cast(), 1, 0) };
    if done == 0 {
        return Ok(());
    }
    Err(Problem(format!("the file system of the layers takes no trusted attributes: {}", Errno::last())))
}

fn set_owner(folder: BorrowedFd<'_>, name: &CStr, (uid, gid): (u32, u32)) -> Result<(), Problem> {
    fchownat(folder, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(())
}
