//! The contract of the header, called from C (`contract.c`, under the sanitizers of the compiler) and from Python
//! (`contract.py`).

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::process::Command;

use support::{Sdk, package, said};

#[test]
fn the_library_does_what_the_header_says() {
    let sdk = Sdk::install();
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]);
    // Not the leak check: it wants to trace the process, which a sandbox may forbid.
    compiler.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o"]);
    compiler.arg(sdk.path("contract")).arg(package().join("tests/contract.c"));
    said(compiler.args(sdk.flags(&["--cflags", "--libs"])));
    for part in ["alone", "passed"] {
        let mut run = Command::new(sdk.path("contract"));
        run.arg(part).env("LD_LIBRARY_PATH", sdk.path("lib")).env("ASAN_OPTIONS", "detect_leaks=0");
        assert_eq!(said(&mut run), format!("{part}: as the header says\n"));
    }
}

#[test]
fn the_python_module_does_what_the_header_says() {
    let sdk = Sdk::install();
    // Debian's, as in the container of the example.
    let mut run = Command::new("/usr/bin/python3");
    run.args(["-X", "dev", "-W", "error"]).arg(package().join("tests/contract.py")).arg(env!("CARGO_PKG_VERSION"));
    run.env("LD_LIBRARY_PATH", sdk.path("lib")).env("PYTHONPATH", sdk.path("share/warmswap/python"));
    run.env("PYTHONDONTWRITEBYTECODE", "1");
    assert_eq!(said(&mut run), "as the header says\n");
}
