//! Any file is an image archive or is refused, and nothing appears outside the folder for layers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use warmswap_fuzz::Kiln;

fuzz_target!(|bytes: &[u8]| {
    let kiln = Kiln::new();
    kiln.write("image", bytes);
    if let Ok(prepared) = kiln.prepare("image") {
        assert!(!prepared.layers.is_empty() && prepared.working_dir.is_absolute());
    }
    kiln.assert_untouched();
});
