//! The state that is transferred: records with a short key and a value of one kibibyte.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub(super) const VALUE_BYTES: usize = 1024;

/// Bytes that serde treats as such; a plain `Vec<u8>` would be a sequence of numbers and several times slower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blob(pub(super) Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl de::Visitor<'_> for Bytes {
            type Value = Blob;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }

            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Blob, E> {
                Ok(Blob(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) key: Blob,
    pub(super) value: Blob,
}

pub(super) fn count(mib: u64) -> u64 {
    mib * (1 << 20) / VALUE_BYTES as u64
}

pub(super) fn make(mib: u64) -> Vec<Record> {
    let record = |number: u64| Record {
        key: Blob(format!("session:{number:012}").into_bytes()),
        value: Blob(vec![number as u8; VALUE_BYTES]),
    };
    (0..count(mib)).map(record).collect()
}

/// Reads a key; two receivers that read the same keys in the same order come to the same number.
pub(super) fn digest(before: u64, key: &[u8]) -> u64 {
    before.rotate_left(5) ^ key.iter().map(|byte| u64::from(*byte)).sum::<u64>()
}

/// Reads a value: its first and last byte, which lie on different pages or cache lines.
pub(super) fn touch(value: &[u8]) {
    std::hint::black_box((value.first(), value.last()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_postcard() {
        let records = make(1);
        assert_eq!(records.len() as u64, count(1));
        let bytes = postcard::to_stdvec(&records).unwrap();
        assert!(bytes.len() > 1 << 20);
        assert_eq!(postcard::from_bytes::<Vec<Record>>(&bytes).unwrap(), records);
    }

    #[test]
    fn another_order_is_another_digest() {
        let of = |keys: [&[u8]; 2]| keys.iter().fold(0, |before, key| digest(before, key));
        assert_ne!(of([b"ab", b"c"]), of([b"c", b"ab"]));
    }
}
