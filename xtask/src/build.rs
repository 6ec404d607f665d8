//! `build`: everything a user runs, optimised. There is one profile for the demo, the tests and the benchmark, so
//! that burn, by far the longest compile, is compiled once.

use anyhow::Result;

use crate::run;

pub(crate) fn run() -> Result<()> {
    run::run(run::cargo().args(["build", "--release"]))
}
