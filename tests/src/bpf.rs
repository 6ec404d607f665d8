//! Lists the BPF objects the kernel holds, through the `bpf` system call. No library: this must see what is there even
//! if the sensor and its library are wrong about it.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

// Of `enum bpf_cmd` in linux/bpf.h; part of the kernel's interface, so they never change.
const PROG_GET_NEXT_ID: u32 = 11;
const MAP_GET_NEXT_ID: u32 = 12;
const PROG_GET_FD_BY_ID: u32 = 13;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const LINK_GET_NEXT_ID: u32 = 31;

/// `char name[16]` in `struct bpf_prog_info`.
const PROG_INFO_NAME: std::ops::Range<usize> = 64..80;

/// One line for each program, map and link that exists now, such as `BPF program 17 exec`.
pub(crate) fn objects() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for id in ids(PROG_GET_NEXT_ID)? {
        match program_name(id) {
            // systemd's own, which come and go with its units.
            Ok(name) if name.starts_with("sd_") => {}
            Ok(name) => found.push(format!("BPF program {id} {name}")),
            // Gone in between.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    found.extend(ids(MAP_GET_NEXT_ID)?.into_iter().map(|id| format!("BPF map {id}")));
    found.extend(ids(LINK_GET_NEXT_ID)?.into_iter().map(|id| format!("BPF link {id}")));
    Ok(found)
}

fn ids(command: u32) -> io::Result<Vec<u32>> {
    let mut ids = Vec::new();
    let mut last = 0;
    loop {
        // `{ start_id, next_id, open_flags }`
        let mut attributes = [last, 0, 0];
        match bpf(command, &mut attributes) {
            Ok(_) => {
                last = attributes[1];
                ids.push(last);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(ids),
            Err(error) => return Err(error),
        }
    }
}

fn program_name(id: u32) -> io::Result<String> {
    let fd = bpf(PROG_GET_FD_BY_ID, &mut [id, 0, 0])?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor, nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = [0_u8; 128];
    let address = info.as_mut_ptr() as u64;
    // `{ bpf_fd, info_len, info (u64) }`, little and big halves in the machine's order
    let halves = address.to_ne_bytes();
    let half = |i: usize| u32::from_ne_bytes([halves[i], halves[i + 1], halves[i + 2], halves[i + 3]]);
    let raw = u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)?;
    bpf(OBJ_GET_INFO_BY_FD, &mut [raw, info.len() as u32, half(0), half(4)])?;
    let name = &info[PROG_INFO_NAME];
    let length = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

fn bpf<const N: usize>(command: u32, attributes: &mut [u32; N]) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is valid for reads and writes of the size given, and the kernel takes a shorter structure
    // than its own as one that ends in zeros. The only pointer in it (OBJ_GET_INFO_BY_FD) is to a buffer of the
    // length beside it that outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_long, attributes.as_mut_ptr(), size_of_val(attributes))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An array of one number, which goes with its descriptor.
    pub(crate) fn array_map() -> io::Result<OwnedFd> {
        const MAP_CREATE: u32 = 0;
        // `{ map_type: ARRAY, key_size, value_size, max_entries, … }`
        let fd = bpf(MAP_CREATE, &mut [2, 4, 8, 1])?;
        // SAFETY: the kernel has just given us this descriptor, nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
    }
}
