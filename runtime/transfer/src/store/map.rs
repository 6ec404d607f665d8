//! [`Map`]: from bytes to a type.

use rkyv::Archived;

use crate::log::LogError;
use crate::message::LogPosition;

use super::handle::Handle;
use super::{Store, Value};

/// A map from bytes to `V`. Not for values that need order or ranges.
#[derive(Debug)]
pub struct Map<V>(pub(super) Handle<V>);

impl<V> Clone for Map<V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Map<V> {}

impl<V: Value> Map<V> {
    #[must_use]
    pub fn len(self, store: &Store) -> usize {
        self.0.count(store)
    }

    #[must_use]
    pub fn is_empty(self, store: &Store) -> bool {
        self.len(store) == 0
    }

    /// The value of `key`, where it lies.
    #[must_use]
    pub fn get<'s>(self, store: &'s Store, key: &[u8]) -> Option<&'s Archived<V>> {
        self.0.get(store, key)
    }

    #[must_use]
    pub fn contains(self, store: &Store, key: &[u8]) -> bool {
        self.get(store, key).is_some()
    }

    /// Sets the value of `key`; true when it had one before. Not visible to others before
    /// [`commit`](crate::state::State::commit).
    ///
    /// # Errors
    /// Nothing is changed when the record is too long, memory is missing, or this process is no owner.
    pub fn insert(self, store: &mut Store, key: &[u8], value: &V) -> Result<bool, LogError> {
        self.0.put(store, key, value)
    }

    /// Removes `key`; true when it was there.
    ///
    /// # Errors
    /// As [`Self::insert`].
    pub fn remove(self, store: &mut Store, key: &[u8]) -> Result<bool, LogError> {
        self.0.remove(store, key)
    }

    /// Every key and value, in no order.
    pub fn iter(self, store: &Store) -> impl Iterator<Item = (&[u8], &Archived<V>)> {
        self.0.iter(store)
    }

    /// Walks over living entries in the order of the log, for work that spreads over time (expiry): looks at up to
    /// `budget` bytes from `from` and returns where to go on, beginning again at the oldest after the end. Records of
    /// other collections count too.
    pub fn walk(
        self,
        store: &Store,
        from: LogPosition,
        budget: usize,
        visit: impl FnMut(&[u8], &Archived<V>),
    ) -> LogPosition {
        self.0.walk(store, from, budget, visit)
    }
}
