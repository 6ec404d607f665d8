//! One layer of an image whose manifest and digests are right: whatever its names and links say, it is unpacked below its
//! folder or refused.
//!
//! The input is read as entries: kind, name and target length, name, target, data. Names are made of few words, so that
//! they meet.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tar::EntryType;
use warmswap_fuzz::{Kiln, docker_save, entry, finish};

const WORDS: [&str; 16] = [
    "a",
    "b",
    "..",
    ".",
    "",
    "/",
    "a/b",
    "../canary",
    ".wh.a",
    ".wh..wh..opq",
    ".wh...",
    "a/..",
    "\u{e9}",
    "b/a",
    "../../canary",
    ".wh.",
];

fuzz_target!(|bytes: &[u8]| {
    let mut layer = Vec::new();
    let mut rest = bytes;
    while let [kind, name, target, len, after @ ..] = rest {
        let data = &after[..after.len().min(usize::from(*len))];
        rest = &after[data.len()..];
        let kind = match kind % 12 {
            0..=2 => EntryType::Regular,
            3 | 4 => EntryType::Directory,
            5 | 6 => EntryType::Symlink,
            7 => EntryType::Link,
            8 => EntryType::Fifo,
            9 => EntryType::Char,
            10 => EntryType::XHeader,
            _ => EntryType::GNULongName,
        };
        entry(&mut layer, kind, &path(*name), &path(*target), data);
    }
    finish(&mut layer);
    let kiln = Kiln::new();
    kiln.write("image", &docker_save(&layer));
    let _ = kiln.prepare("image");
    kiln.assert_untouched();
});

/// Two words, as the halves of the byte say.
fn path(byte: u8) -> String {
    let (first, second) = (WORDS[usize::from(byte >> 4)], WORDS[usize::from(byte & 15)]);
    if second.is_empty() { first.to_owned() } else { format!("{first}/{second}") }
}
