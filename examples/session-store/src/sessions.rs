//! The sessions of the state, in the schema of this edition.

use warmswap_sdk::transfer::log::{LogConfig, LogError};
use warmswap_sdk::transfer::message::LogPosition;
use warmswap_sdk::transfer::store::{Map, Store};

use crate::record::{ArchivedDatedSession, ArchivedSession, DatedSession, Session};
use crate::{Edition, Schema};

const NAME: &str = "sessions";

/// Where the sessions are in the store. A real service has one schema in its code, and the types of older ones in
/// evolutions only; here several versions are built from the same code.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sessions {
    First(Map<Session>),
    Second(Map<DatedSession>),
}

/// A session where it lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) expires_at_ms: u64,
    pub(crate) updated_ms: Option<u64>,
}

impl Found<'_> {
    pub(crate) fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_at_ms != 0 && self.expires_at_ms <= now_ms
    }
}

impl<'a> From<&'a ArchivedSession> for Found<'a> {
    fn from(session: &'a ArchivedSession) -> Self {
        let (expires_at_ms, updated_ms) = (session.expires_at_ms.to_native(), session.updated_ms());
        Self { data: &session.data, expires_at_ms, updated_ms }
    }
}

impl<'a> From<&'a ArchivedDatedSession> for Found<'a> {
    fn from(session: &'a ArchivedDatedSession) -> Self {
        let updated_ms = session.updated_ms.as_ref().map(|at| at.to_native());
        Self { data: &session.data, expires_at_ms: session.expires_at_ms.to_native(), updated_ms }
    }
}

impl Sessions {
    /// The state of an edition, with its sessions declared.
    pub(crate) fn prepare(edition: Edition) -> anyhow::Result<(Store, Self)> {
        match edition.schema {
            Schema::First => {
                let mut store = Store::new(LogConfig::new(1))?;
                let sessions = Self::First(store.map(NAME)?);
                Ok((store, sessions))
            }
            Schema::Second { back } => {
                let mut store = Store::new(LogConfig { schemas_read: vec![1, 2], ..LogConfig::new(2) })?;
                let sessions = Self::Second(store.map_evolved(NAME, DatedSession::evolution(back))?);
                Ok((store, sessions))
            }
        }
    }

    pub(crate) fn len(self, store: &Store) -> usize {
        match self {
            Self::First(map) => map.len(store),
            Self::Second(map) => map.len(store),
        }
    }

    pub(crate) fn get<'s>(self, store: &'s Store, key: &[u8]) -> Option<Found<'s>> {
        match self {
            Self::First(map) => map.get(store, key).map(Found::from),
            Self::Second(map) => map.get(store, key).map(Found::from),
        }
    }

    pub(crate) fn put(
        self,
        store: &mut Store,
        key: &[u8],
        data: Vec<u8>,
        expires_at_ms: u64,
        updated_ms: Option<u64>,
    ) -> Result<(), LogError> {
        match self {
            Self::First(map) => {
                let tail = updated_ms.map_or_else(Vec::new, Session::tail_of);
                map.insert(store, key, &Session { data, expires_at_ms, tail }).map(drop)
            }
            Self::Second(map) => map.insert(store, key, &DatedSession { data, expires_at_ms, updated_ms }).map(drop),
        }
    }

    /// Changes when a session expires and nothing else, not the fields either that only later versions know. False when it
    /// is not there.
    pub(crate) fn expire(self, store: &mut Store, key: &[u8], expires_at_ms: u64) -> Result<bool, LogError> {
        match self {
            Self::First(map) => {
                let Some(session) = map.get(store, key) else { return Ok(false) };
                let (data, tail) = (session.data.to_vec(), session.tail.to_vec());
                map.insert(store, key, &Session { data, expires_at_ms, tail })
            }
            Self::Second(map) => {
                let Some(session) = map.get(store, key) else { return Ok(false) };
                let (data, updated_ms) = (session.data.to_vec(), Found::from(session).updated_ms);
                map.insert(store, key, &DatedSession { data, expires_at_ms, updated_ms })
            }
        }
    }

    pub(crate) fn remove(self, store: &mut Store, key: &[u8]) -> Result<bool, LogError> {
        match self {
            Self::First(map) => map.remove(store, key),
            Self::Second(map) => map.remove(store, key),
        }
    }

    /// As [`Map::walk`].
    pub(crate) fn walk(
        self,
        store: &Store,
        from: LogPosition,
        budget: usize,
        mut visit: impl FnMut(&[u8], Found<'_>),
    ) -> LogPosition {
        match self {
            Self::First(map) => map.walk(store, from, budget, |key, session| visit(key, session.into())),
            Self::Second(map) => map.walk(store, from, budget, |key, session| visit(key, session.into())),
        }
    }
}
