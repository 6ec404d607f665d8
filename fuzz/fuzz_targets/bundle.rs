//! Any `config.json` beside a root file system is an OCI bundle or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use warmswap_fuzz::Kiln;

fuzz_target!(|bytes: &[u8]| {
    let kiln = Kiln::new();
    kiln.write("bundle/rootfs/file", b"");
    kiln.write("bundle/config.json", bytes);
    let _ = kiln.prepare("bundle");
    kiln.assert_untouched();
});
