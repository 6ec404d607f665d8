//! `miri`: the parsers of what others send, under Miri, which sees undefined behaviour that no sanitizer does. With a nightly
//! toolchain, because Miri comes with none other; for code that asks nothing of the kernel, because Miri is none. The rest of the
//! `unsafe` code runs under AddressSanitizer (`fuzz`).
//!
//! Apart from `test`: it is slow, and it is not worth a second toolchain on every machine.

use std::process::Command;

use anyhow::{Result, bail};

use crate::run;

/// Package, test targets, and words of the names of their tests.
const TESTED: [(&str, &[&str], &[&str]); 2] = [
    ("warmswap-transfer", &["--lib", "--test", "hostile"], &["record::", "_or_refused", "survive_the_round_trip"]),
    ("warmswap-events", &["--lib"], &[]),
];
/// Of each property; a case takes about a second.
const CASES: &str = "8";
/// Tree Borrows is the model that rkyv keeps to.
const FLAGS: &str = "-Zmiri-disable-isolation -Zmiri-tree-borrows";

pub(crate) fn run() -> Result<()> {
    let there = Command::new("cargo").args(["+nightly", "miri", "--version"]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        bail!(
            "Miri is not here, install it: rustup toolchain install nightly --profile minimal --component miri --component rust-src"
        );
    }
    for (package, targets, filters) in TESTED {
        let mut cargo = Command::new("cargo");
        run::clean_environment(&mut cargo);
        // Set by the cargo that runs us, and for another toolchain.
        cargo.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").env_remove("RUSTC").current_dir(run::workspace());
        cargo.env("MIRIFLAGS", FLAGS).env("PROPTEST_CASES", CASES).env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1");
        cargo.args(["+nightly", "miri", "test", "--locked", "--package", package]).args(targets);
        cargo.arg("--target-dir").arg(run::target().join("miri"));
        run::run(cargo.arg("--").args(filters))?;
    }
    Ok(())
}
