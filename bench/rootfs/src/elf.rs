//! Reads the one thing of an ELF file that is needed here: which dynamic loader it asks for.
//!
//! ```text
//! 0      e_ident "\x7fELF", class 2 (64 bit), data 1 (little endian)
//! 32     e_phoff, 8 bytes      54  e_phentsize, 2 bytes      56  e_phnum, 2 bytes
//! e_phoff + i × e_phentsize:   p_type (4) … p_offset at 8 … p_filesz at 32;  PT_INTERP = 3
//! ```

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::RootfsError;

const PT_INTERP: u32 = 3;
/// `PATH_MAX`: a longer interpreter could not be executed anyway.
const INTERPRETER_BYTES_MAX: u64 = 4096;

/// The dynamic loader that `program` names, or `None` when it is statically linked.
pub fn interpreter(program: &Path) -> Result<Option<PathBuf>, RootfsError> {
    let file_error = |action| move |source| RootfsError::File { action, path: program.to_owned(), source };
    let bad = |problem| RootfsError::NotAProgram { path: program.to_owned(), problem };

    let mut file = File::open(program).map_err(file_error("open"))?;
    let header: [u8; 64] = read_at(&mut file, 0).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => bad("it is shorter than an ELF header"),
        _ => file_error("read")(e),
    })?;
    if header[..4] != *b"\x7fELF" {
        return Err(bad("it does not begin with the ELF magic"));
    }
    if header[4] != 2 || header[5] != 1 {
        return Err(bad("it is for another word size or byte order"));
    }
    let table = number(&header, 32, 8);
    let entry_size = number(&header, 54, 2);
    let entries = number(&header, 56, 2);
    for index in 0..entries {
        let at = index.checked_mul(entry_size).and_then(|o| o.checked_add(table));
        let at = at.ok_or_else(|| bad("its program headers lie outside the file"))?;
        let entry: [u8; 56] = read_at(&mut file, at).map_err(|_| bad("its program headers lie outside the file"))?;
        if number(&entry, 0, 4) != u64::from(PT_INTERP) {
            continue;
        }
        let length = number(&entry, 32, 8);
        if !(2..=INTERPRETER_BYTES_MAX).contains(&length) {
            return Err(bad("the name of its loader has an impossible length"));
        }
        let mut name = vec![0; usize::try_from(length).map_err(|_| bad("the name of its loader is too long"))?];
        file.seek(SeekFrom::Start(number(&entry, 8, 8)))
            .and_then(|_| file.read_exact(&mut name))
            .map_err(|_| bad("the name of its loader lies outside the file"))?;
        name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
        return Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(name))));
    }
    Ok(None)
}

fn read_at<const N: usize>(file: &mut File, offset: u64) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Little-endian number of `length` (at most 8) bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}
