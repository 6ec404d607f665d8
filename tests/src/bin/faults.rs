//! Every fault at every step: what `cargo xtask faults` runs. Prints each point as it is done and a summary at the end; the
//! exit status says whether everything held.
//!
//! `faults [EVERY [FIRST]]`: only every EVERYth point, beginning with the FIRST.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use warmswap_tests::faults::{Disturbed, Outcome};
use warmswap_tests::{Requirement, missing};

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let every = arguments.next().transpose().context("EVERY is no number")?.unwrap_or(1).max(1);
    let first = arguments.next().transpose().context("FIRST is no number")?.unwrap_or(1).max(1);
    if let Some(reason) = missing(&[Requirement::Containers]) {
        eprintln!("faults cannot be injected here: {reason}");
        return Ok(ExitCode::FAILURE);
    }
    let mut disturbed = Disturbed::start()?;
    let points: Vec<_> = disturbed.points().into_iter().skip(first - 1).step_by(every).collect();
    let (mut outcome, began) = (Outcome::default(), Instant::now());
    for (number, point) in points.iter().enumerate() {
        let broken = outcome.broken.len();
        let at = Instant::now();
        if let Err(error) = disturbed.disturb(*point, &mut outcome) {
            print!("{outcome}\n{}", disturbed.log());
            return Err(error.context(format!("{point} ended the enumeration")));
        }
        println!("{:4} of {}  {:5.1} s  {point}", number + 1, points.len(), at.elapsed().as_secs_f64());
        outcome.broken[broken..].iter().for_each(|what| println!("     BROKEN {what}"));
    }
    println!("\n{outcome}\n{:.0} s", began.elapsed().as_secs_f64());
    if !outcome.broken.is_empty() {
        eprintln!("the log of the agents:\n{}", disturbed.log());
    }
    disturbed.finish()?;
    Ok(if outcome.broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
