//! [`Record`]: one value.

use rkyv::Archived;

use crate::log::LogError;

use super::handle::Handle;
use super::{Store, Value};

/// One value, or none.
#[derive(Debug)]
pub struct Record<V>(pub(super) Handle<V>);

impl<V> Clone for Record<V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Record<V> {}

impl<V: Value> Record<V> {
    /// The value, where it lies.
    #[must_use]
    pub fn get(self, store: &Store) -> Option<&Archived<V>> {
        self.0.get(store, &[])
    }

    /// True when there was a value before.
    ///
    /// # Errors
    /// As [`Map::insert`](super::Map::insert).
    pub fn set(self, store: &mut Store, value: &V) -> Result<bool, LogError> {
        self.0.put(store, &[], value)
    }

    /// True when there was a value.
    ///
    /// # Errors
    /// As [`Map::insert`](super::Map::insert).
    pub fn clear(self, store: &mut Store) -> Result<bool, LogError> {
        self.0.remove(store, &[])
    }
}
