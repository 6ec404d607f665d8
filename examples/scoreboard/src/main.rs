//! Scores by name, kept in ordinary maps: the example of a service whose state does not live in the shared log, and moves
//! in one of two ways ([`board`]): pre-copied while it serves, or as a snapshot when it has stopped.
//!
//! ```text
//! scoreboard --state precopied|snapshot [ADDRESS]
//! ```
//!
//! The protocol is lines ([`server`]). Not here: anything that a real scoreboard would need.

mod board;
mod server;

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail};
use warmswap_sdk::transfer::log::LogConfig;
use warmswap_sdk::transfer::precopy::Precopied;
use warmswap_sdk::transfer::snapshot::Snapshotted;
use warmswap_sdk::{Service, is_supervised};

use board::{Board, Ordered, SCHEMA, Sharded};

/// Where it listens when nobody passes it a listener and no address is given.
const ADDRESS_DEFAULT: &str = "127.0.0.1:6390";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let way = arguments.iter().position(|argument| argument == "--state").and_then(|at| arguments.get(at + 1));
    let address = arguments.get(2).map_or(ADDRESS_DEFAULT, String::as_str);
    match way.map(String::as_str) {
        Some("precopied") => serve(Precopied::new(Ordered::default(), LogConfig::new(SCHEMA)), address),
        Some("snapshot") => serve(Snapshotted::new(Sharded::default(), LogConfig::new(SCHEMA)), address),
        _ => bail!("usage: scoreboard --state precopied|snapshot [ADDRESS]"),
    }
}

fn serve(board: impl Board, address: &str) -> Result<()> {
    let service = if is_supervised() || std::env::var_os("LISTEN_FDS").is_some() {
        warmswap_sdk::join(board).context("cannot join the service")?
    } else {
        let address: SocketAddr = address.parse().with_context(|| format!("{address:?} is no address"))?;
        Service::standalone(board, &[("scores", address)])?
    };
    server::Server::new(service).run()
}
