//! `warmswap`: update running containers with no dropped connection, no lost state and no cold-start dip.
//!
//! One file per verb in `verbs/`; each asks the agent over its API ([`client`]) and prints a table for people or, with
//! `--json`, one document for programs.
//!
//! Exit codes: 0 done; 1 it failed; 2 wrong arguments; 3 the handover was rolled back or aborted and the service runs as before.

mod args;
mod client;
mod output;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // Containers are created by single-threaded re-executions of this binary; they must not reach anything below.
    if let Some(code) = warmswap_backend::internal_main() {
        return code;
    }
    let args = args::Args::parse();
    let json = args.json;
    match verbs::run(args) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error, json);
            ExitCode::FAILURE
        }
    }
}
