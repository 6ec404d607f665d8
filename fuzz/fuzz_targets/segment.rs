//! Any bytes are a segment header and records, or are refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use warmswap_transfer::record;
use warmswap_transfer::segment::{HEADER_LEN, Header};

fuzz_target!(|bytes: &[u8]| {
    let Some((header, mut rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return };
    if let Ok(header) = Header::parse(header) {
        assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    }
    while let Ok(view) = record::parse(rest) {
        assert!(view.len > 0 && view.len <= rest.len());
        rest = &rest[view.len..];
    }
});
