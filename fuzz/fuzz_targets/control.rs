//! Whatever a sealed memory file holds, it is a control page or is refused.
#![no_main]

use std::os::fd::AsFd;

use libfuzzer_sys::fuzz_target;
use warmswap_fuzz::sealed_memory;
use warmswap_transfer::control::{ControlView, ControlWord};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(view) = ControlView::map(sealed_memory(bytes).as_fd()) {
        assert_eq!(bytes.len(), 4096, "nothing else is a page");
        let word = view.load();
        assert_eq!(ControlWord::from_bits(word.to_bits()), word);
    }
});
