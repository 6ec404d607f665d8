//! [`Log`]: entries in order.

use rkyv::Archived;

use crate::log::LogError;
use crate::record::RecordKind;

use super::handle::Handle;
use super::{Store, Value};

/// Entries that are appended, read in order, and dropped from the front. Each has a sequence number that is never given
/// twice, not by a successor either.
#[derive(Debug)]
pub struct Log<V>(pub(super) Handle<V>);

impl<V> Clone for Log<V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Log<V> {}

impl<V: Value> Log<V> {
    /// The number of the first entry that is kept; of the next one when there is none.
    #[must_use]
    pub fn first(self, store: &Store) -> u64 {
        store.main.index.sequence(self.0.place(store)).0
    }

    /// The number that the next entry gets.
    #[must_use]
    pub fn next(self, store: &Store) -> u64 {
        store.main.index.sequence(self.0.place(store)).1
    }

    #[must_use]
    pub fn len(self, store: &Store) -> usize {
        self.0.count(store)
    }

    #[must_use]
    pub fn is_empty(self, store: &Store) -> bool {
        self.len(store) == 0
    }

    #[must_use]
    pub fn get(self, store: &Store, number: u64) -> Option<&Archived<V>> {
        self.0.get(store, &number.to_be_bytes())
    }

    /// Returns the number of the entry.
    ///
    /// # Errors
    /// As [`Map::insert`](super::Map::insert).
    pub fn append(self, store: &mut Store, value: &V) -> Result<u64, LogError> {
        let number = self.next(store);
        self.0.put(store, &number.to_be_bytes(), value)?;
        Ok(number)
    }

    /// Drops every entry below `number`, at most all there are.
    ///
    /// # Errors
    /// As [`Map::insert`](super::Map::insert).
    pub fn trim_before(self, store: &mut Store, number: u64) -> Result<(), LogError> {
        let place = self.0.place(store);
        store.writable()?;
        let (first, next) = store.main.index.sequence(place);
        let floor = number.min(next);
        if floor > first {
            store.append(place, RecordKind::Put, &[], &floor.to_le_bytes())?;
        }
        Ok(())
    }

    /// Entries with their numbers, in order.
    pub fn iter(self, store: &Store) -> impl DoubleEndedIterator<Item = (u64, &Archived<V>)> {
        self.iter_from(store, 0)
    }

    /// As [`Self::iter`], from entry `number` on.
    pub fn iter_from(self, store: &Store, number: u64) -> impl DoubleEndedIterator<Item = (u64, &Archived<V>)> {
        let (first, next) = (self.first(store), self.next(store));
        (first.max(number)..next).filter_map(move |number| Some((number, self.get(store, number)?)))
    }
}
