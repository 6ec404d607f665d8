//! A store for sessions that speaks the Redis protocol and can be updated while it serves: the example of a service that
//! cooperates fully with warmswap. State lives in a [`Store`](warmswap_sdk::transfer::store::Store), established
//! connections move with their half-read requests and half-sent replies.
//!
//! Five programs are built from it, to be updated into one another:
//!
//! * `session-store-v1`;
//! * `session-store-v2`: one command more (`GETDEL`) and one field more in each record (when it was written last, shown by
//!   `OBJECT IDLETIME`), readable by v1, see [`record`];
//! * `session-store-v3`: v2 with a mistake in it: every command that touches data blocks for 0.4 ms;
//! * `session-store-v4`: v2 with another layout of its records, schema 2; reads schema 1 and can write it as well;
//! * `session-store-v5`: v4 as it were without the way back to schema 1, so that an update to it cannot be rolled back.
//!
//! Not here: persistence on disk, replication, any data type but strings.

mod commands;
mod connection;
mod epoll;
pub mod record;
pub mod resp;
mod server;
mod sessions;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use warmswap_sdk::{Service, is_supervised};

use crate::sessions::Sessions;

/// Where the store listens when nobody passes it a listener and no address is given.
const ADDRESS_DEFAULT: &str = "127.0.0.1:6380";

/// In which layout an edition keeps its records, see [`record`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schema {
    First,
    /// `back`: it can write the first as well.
    Second {
        back: bool,
    },
}

/// What distinguishes the programs.
#[derive(Debug, Clone, Copy)]
pub struct Edition {
    pub version: &'static str,
    /// Knows `GETDEL` and `OBJECT`, and writes the time of the last write into each record.
    pub second: bool,
    /// How long every command on data blocks.
    pub delay: Duration,
    pub schema: Schema,
}

impl Edition {
    pub const V1: Self = Self { version: "1.0.0", second: false, delay: Duration::ZERO, schema: Schema::First };
    pub const V2: Self = Self { version: "2.0.0", second: true, ..Self::V1 };
    pub const V3: Self = Self { version: "3.0.0", delay: Duration::from_micros(400), ..Self::V2 };
    pub const V4: Self = Self { version: "4.0.0", schema: Schema::Second { back: true }, ..Self::V2 };
    pub const V5: Self = Self { version: "5.0.0", schema: Schema::Second { back: false }, ..Self::V2 };
}

/// Runs until the process is told to end: as part of a warmswap service, with the listeners of `LISTEN_FDS` (TCP or unix
/// stream sockets, any number), or alone on the address that is the first argument.
///
/// # Errors
/// When the environment, the address or the memory cannot be used.
pub fn run(edition: Edition) -> anyhow::Result<()> {
    let signal = server::termination_signals().context("cannot receive signals")?;
    let (state, sessions) = Sessions::prepare(edition).context("cannot prepare the state")?;
    let service = if is_supervised() || std::env::var_os("LISTEN_FDS").is_some() {
        warmswap_sdk::join(state).context("cannot join the service")?
    } else {
        let text = std::env::args().nth(1).unwrap_or_else(|| ADDRESS_DEFAULT.to_owned());
        let address: SocketAddr =
            text.parse().with_context(|| format!("{text:?} is no address like {ADDRESS_DEFAULT}"))?;
        Service::standalone(state, &[("resp", address)])?
    };
    server::Server::new(service, sessions, edition, signal)?.run()
}
