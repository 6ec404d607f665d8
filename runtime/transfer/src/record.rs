//! One record of the log: a put or a removal of one key of one collection.
//!
//! ```text
//!  byte 0        4         6      7        8           12           16
//!  ┌───────┬─────────┬──────┬────────┬───────────┬────────────┬─────────────────┬──────────┬─────────┐
//!  │ crc   │ key_len │ kind │ shape  │ value_len │ collection │ value (rkyv)    │ key      │ 0 … 15  │
//!  └───────┴─────────┴──────┴────────┴───────────┴────────────┴─────────────────┴──────────┴─────────┘
//! ```
//!
//! The value begins at a multiple of 16 bytes, so that rkyv can read it where it lies. The CRC-32 covers everything
//! after itself except the padding.

use std::fmt;

/// Bytes before the value.
pub const RECORD_HEADER_LEN: usize = 16;
const ALIGNMENT: usize = 16;

/// Longest key, bytes.
pub const KEY_LEN_MAX: usize = u16::MAX as usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// The key has this value from here on.
    Put,
    /// The key has no value from here on; the record's own value is empty.
    Remove,
}

/// What a collection is. In every record, so that a process that does not declare the collection keeps alive what is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shape {
    /// Keys are bytes of the service's choice.
    Map,
    /// As a map; values are `i64`.
    Counters,
    /// Keys are sequence numbers, big-endian `u64`. The record with an empty key holds the first number that is kept.
    Log,
    /// One record, with an empty key.
    Record,
}

impl Shape {
    fn from_byte(byte: u8) -> Result<Self, RecordError> {
        match byte {
            1 => Ok(Self::Map),
            2 => Ok(Self::Counters),
            3 => Ok(Self::Log),
            4 => Ok(Self::Record),
            found => Err(RecordError::Shape { found }),
        }
    }

    fn to_byte(self) -> u8 {
        match self {
            Self::Map => 1,
            Self::Counters => 2,
            Self::Log => 3,
            Self::Record => 4,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Map => "a map",
            Self::Counters => "counters",
            Self::Log => "a log",
            Self::Record => "a record",
        })
    }
}

/// Which collection a record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    pub collection: u32,
    pub shape: Shape,
}

/// What is wrong with the bytes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("it ends before its own length")]
    Short,
    #[error("its checksum is wrong")]
    Checksum,
    #[error("kind {found} is unknown")]
    Kind { found: u8 },
    #[error("it belongs to a collection of unknown shape {found}")]
    Shape { found: u8 },
}

/// A record where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordView<'a> {
    pub kind: RecordKind,
    pub tag: Tag,
    pub key: &'a [u8],
    pub value: &'a [u8],
    /// Bytes from this record to the next.
    pub len: usize,
}

/// Bytes that a record takes in a segment.
#[must_use]
pub fn record_len(key_len: usize, value_len: usize) -> usize {
    (RECORD_HEADER_LEN + key_len + value_len).next_multiple_of(ALIGNMENT)
}

/// What [`record_len`] was for the record with this header.
pub(crate) fn len_from_header(header: &[u8; RECORD_HEADER_LEN]) -> usize {
    let value_len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    record_len(usize::from(u16::from_le_bytes([header[4], header[5]])), value_len)
}

/// The header for a record; value and key are written after it.
pub(crate) fn encode_header(kind: RecordKind, tag: Tag, key: &[u8], value: &[u8]) -> [u8; RECORD_HEADER_LEN] {
    debug_assert!(key.len() <= KEY_LEN_MAX && u32::try_from(value.len()).is_ok());
    let mut header = [0; RECORD_HEADER_LEN];
    header[4..6].copy_from_slice(&(key.len() as u16).to_le_bytes());
    header[6] = match kind {
        RecordKind::Put => 1,
        RecordKind::Remove => 2,
    };
    header[7] = tag.shape.to_byte();
    header[12..].copy_from_slice(&tag.collection.to_le_bytes());
    header[8..12].copy_from_slice(&(value.len() as u32).to_le_bytes());
    let crc = checksum(&header, value, key);
    header[..4].copy_from_slice(&crc.to_le_bytes());
    header
}

fn checksum(header: &[u8; RECORD_HEADER_LEN], value: &[u8], key: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[4..]);
    hasher.update(value);
    hasher.update(key);
    hasher.finalize()
}

/// Reads an untrusted record from the start of `bytes`.
///
/// # Errors
/// [`RecordError`] for the first thing that cannot be.
pub fn parse(bytes: &[u8]) -> Result<RecordView<'_>, RecordError> {
    let (view, header) = split(bytes)?;
    let crc = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    if crc != checksum(header, view.value, view.key) {
        return Err(RecordError::Checksum);
    }
    Ok(view)
}

/// As [`parse`], without the checksum: for a record that was parsed, or written by this process, before.
pub(crate) fn parse_trusted(bytes: &[u8]) -> Result<RecordView<'_>, RecordError> {
    split(bytes).map(|(view, _)| view)
}

fn split(bytes: &[u8]) -> Result<(RecordView<'_>, &[u8; RECORD_HEADER_LEN]), RecordError> {
    let (header, rest) = bytes.split_first_chunk::<RECORD_HEADER_LEN>().ok_or(RecordError::Short)?;
    let key_len = usize::from(u16::from_le_bytes([header[4], header[5]]));
    let kind = match header[6] {
        1 => RecordKind::Put,
        2 => RecordKind::Remove,
        found => return Err(RecordError::Kind { found }),
    };
    let collection = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
    let tag = Tag { collection, shape: Shape::from_byte(header[7])? };
    let value_len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    let len = len_from_header(header);
    if len > bytes.len() {
        return Err(RecordError::Short);
    }
    let (value, rest) = rest.split_at(value_len);
    Ok((RecordView { kind, tag, key: &rest[..key_len], value, len }, header))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TAG: Tag = Tag { collection: 0x0102_0304, shape: Shape::Log };

    fn encoded(kind: RecordKind, key: &[u8], value: &[u8]) -> Vec<u8> {
        let mut bytes = encode_header(kind, TAG, key, value).to_vec();
        bytes.extend_from_slice(value);
        bytes.extend_from_slice(key);
        bytes.resize(record_len(key.len(), value.len()), 0);
        bytes
    }

    proptest! {
        #[test]
        fn records_survive_the_round_trip(key: Vec<u8>, value: Vec<u8>) {
            let bytes = encoded(RecordKind::Put, &key, &value);
            let view = parse(&bytes).unwrap();
            prop_assert_eq!((view.key, view.value, view.len), (&key[..], &value[..], bytes.len()));
            prop_assert_eq!(view.tag, TAG);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_damaged_record_is_refused(key: Vec<u8>, value: Vec<u8>, at: prop::sample::Index, bit in 0..8_u32) {
            let mut bytes = encoded(RecordKind::Put, &key, &value);
            let covered = RECORD_HEADER_LEN + key.len() + value.len();
            bytes[at.index(covered)] ^= 1 << bit;
            prop_assert!(parse(&bytes).is_err());
        }
    }
}
