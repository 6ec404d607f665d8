//! Records as serde and postcard write them, in pieces of about one mebibyte, so that both sides can work at the same time.

use std::io::{Read, Write};

use anyhow::{Result, ensure};
use warmswap_load::monotonic_ns;

use crate::transfer::line::Received;
use crate::transfer::records::{Record, digest, touch};

const RECORDS_PER_FRAME: usize = 1024;
const FRAME_LEN_MAX: usize = 16 << 20;

pub(super) fn write(to: &mut impl Write, records: &[Record]) -> Result<()> {
    let mut frame = Vec::new();
    for chunk in records.chunks(RECORDS_PER_FRAME) {
        frame.clear();
        frame = postcard::to_extend(chunk, frame)?;
        to.write_all(&u32::try_from(frame.len())?.to_le_bytes())?;
        to.write_all(&frame)?;
    }
    Ok(())
}

/// Reads `records` records, which the caller owns from then on, as a new process would.
pub(super) fn read(from: &mut impl Read, records: u64) -> Result<(Received, Vec<Record>)> {
    let mut received = Received { first_ns: 0, all_ns: 0, records: 0, digest: 0 };
    let mut state: Vec<Record> = Vec::with_capacity(records as usize);
    let mut frame = Vec::new();
    while received.records < records {
        let mut len = [0; 4];
        from.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        ensure!(len <= FRAME_LEN_MAX, "a frame of {len} bytes is longer than {FRAME_LEN_MAX}");
        frame.resize(len, 0);
        from.read_exact(&mut frame)?;
        let chunk: Vec<Record> = postcard::from_bytes(&frame)?;
        ensure!(!chunk.is_empty(), "a frame without records");
        if received.records == 0 {
            touch(&chunk[0].value.0);
            received.first_ns = monotonic_ns();
        }
        received.digest = chunk.iter().fold(received.digest, |before, record| digest(before, &record.key.0));
        received.records += chunk.len() as u64;
        state.extend(chunk);
    }
    received.all_ns = monotonic_ns();
    Ok((received, state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::records::make;

    #[test]
    fn what_was_written_is_read() {
        let records = make(2);
        let mut bytes = Vec::new();
        write(&mut bytes, &records).unwrap();
        let (received, state) = read(&mut bytes.as_slice(), records.len() as u64).unwrap();
        assert_eq!(state, records);
        assert_eq!(received.records, records.len() as u64);
        assert_eq!(received.digest, records.iter().fold(0, |before, record| digest(before, &record.key.0)));
        assert!(read(&mut &bytes[..bytes.len() - 1], records.len() as u64).is_err());
    }
}
