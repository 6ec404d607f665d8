//! Any text is a service file or is refused with its place; one that was read can be written to the journal and back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use warmswap_model::ServiceFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match ServiceFile::parse("fuzzed.toml", text) {
        Ok(file) => {
            let json = serde_json::to_string(&file).expect("a service file is plain data");
            let again: ServiceFile = serde_json::from_str(&json).expect("what the journal holds can be read");
            assert_eq!(serde_json::to_string(&again).expect("as before"), json);
        }
        Err(error) => assert!(error.to_string().starts_with("fuzzed.toml"), "{error}"),
    }
});
