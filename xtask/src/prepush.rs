//! `prepush`: what must hold before a push.

use anyhow::Result;

use crate::{lint, setup, test};

pub(crate) fn run() -> Result<()> {
    setup::run()?;
    lint::run()?;
    test::run(&test::Options::default())
}
