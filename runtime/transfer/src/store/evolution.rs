//! How the values of a collection change from schema to schema.

use std::fmt;
use std::marker::PhantomData;

use rkyv::util::AlignedVec;
use rkyv::{Archived, rancor};

use crate::log::LogError;
use crate::message::LogPosition;

use super::handle::archive;
use super::types::{Check, Value, check_as};

/// The types that the values of a collection had in older schemas, and the ways between them and the current type `V`.
///
/// A collection whose values are the same in an older schema needs nothing here.
///
/// ```
/// # use warmswap_transfer::{log::LogConfig, store::{Evolution, Store}};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = LogConfig { schemas_read: vec![1, 2, 3], ..LogConfig::new(3) };
/// let mut store = Store::new(config)?;
/// let names = Evolution::<(String, u64)>::new()
///     // Schema 1 had no number, and nobody needs to go back there.
///     .one_way::<String>(1, |name| (name.as_str().to_owned(), 0))
///     .both_ways::<(String, u32)>(
///         2,
///         |old| (old.0.as_str().to_owned(), old.1.to_native().into()),
///         |new| (new.0.as_str().to_owned(), u32::try_from(new.1.to_native()).unwrap_or(u32::MAX)),
///     );
/// let names = store.map_evolved("names", names)?;
/// # let _ = names;
/// # Ok(())
/// # }
/// ```
pub struct Evolution<V> {
    pub(super) older: Vec<Older>,
    value: PhantomData<fn(V)>,
}

impl<V: Value> Default for Evolution<V> {
    fn default() -> Self {
        Self { older: Vec::new(), value: PhantomData }
    }
}

impl<V: Value> Evolution<V> {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// In `schema` the values have type `Old`, and a current value has no equal there: a handover from a version that writes
    /// that schema can not be rolled back.
    #[must_use]
    pub fn one_way<Old: Value>(mut self, schema: u32, up: impl Fn(&Archived<Old>) -> V + Send + 'static) -> Self {
        self.older.push(Older::new::<Old>(schema, convert::<Old, V>(up), None));
        self
    }

    /// In `schema` the values have type `Old`. When every collection that changed since can go `down`, what this program
    /// writes after a handover from that schema is written there too, until the handover is decided: so a rollback
    /// carries it.
    #[must_use]
    pub fn both_ways<Old: Value>(
        mut self,
        schema: u32,
        up: impl Fn(&Archived<Old>) -> V + Send + 'static,
        down: impl Fn(&Archived<V>) -> Old + Send + 'static,
    ) -> Self {
        self.older.push(Older::new::<Old>(schema, convert::<Old, V>(up), Some(convert::<V, Old>(down))));
        self
    }
}

impl<V> fmt::Debug for Evolution<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.older).finish()
    }
}

/// From the archived bytes of one type to those of another, in a buffer that is used again.
type Convert = Box<dyn Fn(&[u8], AlignedVec) -> Result<AlignedVec, ConvertError> + Send>;

/// Why a value cannot be converted.
pub(super) enum ConvertError {
    /// It is not of the type that it is to be converted from.
    Value(rancor::Error),
    /// The result cannot be archived.
    Log(LogError),
}

impl ConvertError {
    pub(super) fn at(self, at: LogPosition, schema: u32) -> LogError {
        match self {
            Self::Value(source) => LogError::Value { at, schema, source },
            Self::Log(error) => error,
        }
    }
}

fn convert<From: Value, To: Value>(way: impl Fn(&Archived<From>) -> To + Send + 'static) -> Convert {
    Box::new(move |bytes, buffer| {
        let from = rkyv::access::<Archived<From>, rancor::Error>(bytes).map_err(ConvertError::Value)?;
        archive(&way(from), buffer).map_err(ConvertError::Log)
    })
}

/// What the values of a collection are in one older schema.
pub(super) struct Older {
    pub(super) schema: u32,
    pub(super) check: Check,
    pub(super) up: Convert,
    pub(super) down: Option<Convert>,
}

impl Older {
    fn new<Old: Value>(schema: u32, up: Convert, down: Option<Convert>) -> Self {
        Self { schema, check: check_as::<Old>, up, down }
    }
}

impl fmt::Debug for Older {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ways = if self.down.is_some() { "both ways" } else { "one way" };
        write!(f, "schema {}, {ways}", self.schema)
    }
}
