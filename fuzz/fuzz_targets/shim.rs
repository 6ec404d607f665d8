//! Any packet between the back end and its helper processes is a message or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| warmswap_backend::fuzz_wire(bytes));
