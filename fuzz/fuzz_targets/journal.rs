//! Any text is a journal or is refused with its line; what was read survives being written and read again.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use warmswap_handover::Journal;
use warmswap_model::Generation;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(Some(mut recovered)) = Journal::parse(Path::new("fuzzed"), text) {
        let owner = recovered.service.owner.unwrap_or(Generation(1));
        recovered.believe(owner);
        if recovered.open.is_some() {
            assert!(recovered.service.owner == Some(owner) || recovered.service.owner.is_none());
        }
        recovered.believe(Generation(u32::MAX));
    }
});
