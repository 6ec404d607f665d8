//! [`Counters`]: from bytes to a number that is added to.

use crate::log::LogError;

use super::Store;
use super::handle::Handle;

/// Numbers by name. One that was never added to is 0.
#[derive(Debug, Clone, Copy)]
pub struct Counters(pub(super) Handle<i64>);

impl Counters {
    /// How many there are, those that came back to 0 included.
    #[must_use]
    pub fn len(self, store: &Store) -> usize {
        self.0.count(store)
    }

    #[must_use]
    pub fn is_empty(self, store: &Store) -> bool {
        self.len(store) == 0
    }

    #[must_use]
    pub fn get(self, store: &Store, name: &[u8]) -> i64 {
        self.0.get(store, name).map_or(0, |value| value.to_native())
    }

    /// Returns the new value.
    ///
    /// # Errors
    /// [`LogError::CounterOverflow`]; else as [`Map::insert`](super::Map::insert).
    pub fn add(self, store: &mut Store, name: &[u8], by: i64) -> Result<i64, LogError> {
        let value = self.get(store, name).checked_add(by).ok_or(LogError::CounterOverflow)?;
        self.set(store, name, value)?;
        Ok(value)
    }

    /// # Errors
    /// As [`Map::insert`](super::Map::insert).
    pub fn set(self, store: &mut Store, name: &[u8], value: i64) -> Result<(), LogError> {
        self.0.put(store, name, &value).map(drop)
    }

    /// Forgets a counter; true when it was there.
    ///
    /// # Errors
    /// As [`Map::insert`](super::Map::insert).
    pub fn remove(self, store: &mut Store, name: &[u8]) -> Result<bool, LogError> {
        self.0.remove(store, name)
    }

    /// Every counter, in no order.
    pub fn iter(self, store: &Store) -> impl Iterator<Item = (&[u8], i64)> {
        self.0.iter(store).map(|(name, value)| (name, value.to_native()))
    }
}
