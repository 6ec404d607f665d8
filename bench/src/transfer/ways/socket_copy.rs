//! The state as bytes through a unix socket, as restart libraries do it.
//!
//! With serde and postcard. bincode, which one would think of first, ended: its last release, 3.0.0, contains nothing but
//! a compiler error that says so.

use std::os::unix::net::UnixStream;

use anyhow::Result;

use super::frames;
use crate::transfer::line::Received;
use crate::transfer::records::Record;

pub(in crate::transfer) const NAME: &str = "copy through a unix socket, serde and postcard";

pub(in crate::transfer) fn send(stream: &mut UnixStream, records: &[Record]) -> Result<()> {
    frames::write(stream, records)
}

pub(in crate::transfer) fn receive(stream: &mut UnixStream, records: u64) -> Result<(Received, Vec<Record>)> {
    frames::read(stream, records)
}
