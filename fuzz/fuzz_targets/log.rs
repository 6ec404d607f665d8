//! A segment that is sealed as it must be and says what it likes: a reader reads it or refuses it, and never reads past
//! what is committed.
//!
//! The first byte chooses how much of the header is forged; without help, no input would get past its checksum.
#![no_main]

use std::os::fd::OwnedFd;

use libfuzzer_sys::fuzz_target;
use warmswap_fuzz::sealed_memory;
use warmswap_transfer::log::{LogConfig, LogReader};
use warmswap_transfer::segment::{HEADER_LEN, Header, SEGMENT_LEN_MIN};

const SCHEMA: u32 = 1;
const COMMIT_AT: usize = 64;

fuzz_target!(|bytes: &[u8]| {
    let [how, rest @ ..] = bytes else { return };
    let Ok(mut reader) =
        LogReader::new(LogConfig { segment_len: SEGMENT_LEN_MIN, spares: 0, ..LogConfig::new(SCHEMA) })
    else {
        return;
    };
    let halves = rest.split_at(rest.len() / 2);
    let mut read = 0;
    for (index, part) in [halves.0, halves.1].into_iter().enumerate() {
        // A refused segment is closed, and the reader goes on with what it has.
        let _ = reader.add_segment(index as u64, segment(*how, index as u64, part));
        while let Ok(Some((at, _))) = reader.advance() {
            assert!(at.len > 0 && at.position.offset as usize + at.len <= SEGMENT_LEN_MIN);
            assert!(reader.segments().record(at.position).is_some(), "what was read can be read again");
            read += at.len;
        }
        assert!(read <= 2 * SEGMENT_LEN_MIN);
        let _ = reader.retire_segment(0);
    }
});

fn segment(how: u8, index: u64, part: &[u8]) -> OwnedFd {
    let mut whole = vec![0; SEGMENT_LEN_MIN];
    let used = part.len().min(SEGMENT_LEN_MIN - HEADER_LEN);
    if how & 1 == 0 {
        let header = Header {
            index,
            schema: SCHEMA,
            len: SEGMENT_LEN_MIN as u64,
            created_unix_ms: 0,
            previous_end: previous(how),
        };
        whole[..HEADER_LEN].copy_from_slice(&header.to_bytes());
        whole[HEADER_LEN..HEADER_LEN + used].copy_from_slice(&part[..used]);
        let commit = if how & 2 == 0 { (HEADER_LEN + used) as u64 } else { u64::from(how) << 10 };
        whole[COMMIT_AT..COMMIT_AT + 8].copy_from_slice(&commit.to_le_bytes());
    } else {
        whole[..used].copy_from_slice(&part[..used]);
    }
    sealed_memory(&whole)
}

fn previous(how: u8) -> u64 {
    if how & 4 == 0 { 0 } else { u64::from(how) << 8 }
}
