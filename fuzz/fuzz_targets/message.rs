//! Any bytes are a message or are refused; what was a message can be sent again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use warmswap_transfer::message::{Message, ToService, ToSupervisor};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = ToService::decode(bytes) {
        let again = message.encode().expect("a decoded message can be encoded");
        assert_eq!(ToService::decode(&again).expect("what was encoded can be decoded"), message);
    }
    if let Ok(message) = ToSupervisor::decode(bytes) {
        let again = message.encode().expect("a decoded message can be encoded");
        assert_eq!(ToSupervisor::decode(&again).expect("what was encoded can be decoded"), message);
    }
});
