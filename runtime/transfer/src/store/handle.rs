//! What the four kinds of collections have in common: a place in a store, and the type that was declared for it.

use std::fmt;
use std::marker::PhantomData;

use rkyv::util::AlignedVec;
use rkyv::{Archived, rancor};

use crate::log::LogError;
use crate::message::LogPosition;
use crate::record::{RecordKind, RecordView};

use super::{Store, Value};

/// A collection with values of type `V`, of the store that made it. Only [`Store::declare`] makes one, so that place and
/// type always belong together.
pub(super) struct Handle<V> {
    pub(super) store: u64,
    pub(super) place: u32,
    pub(super) value: PhantomData<fn() -> V>,
}

impl<V> Clone for Handle<V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Handle<V> {}

impl<V> fmt::Debug for Handle<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "collection {} of store {}", self.place, self.store)
    }
}

impl<V: Value> Handle<V> {
    /// # Panics
    /// With another store than the one that declared the collection: what lies there may have another type.
    pub(super) fn place(self, store: &Store) -> usize {
        assert!(self.store == store.identity, "a collection is used with a store that did not declare it");
        self.place as usize
    }

    /// # Safety
    /// `view` is a living record of this collection in the store's main ledger, and its key is one that has a value.
    unsafe fn value(view: RecordView<'_>) -> &Archived<V> {
        // SAFETY: only records whose value `Types::check` validated as Archived<V> when they came from another process, or
        // that `put` archived from a V, are in the index (the caller's promise); their bytes never change (see
        // `segment`), and their segment stays mapped while it has living records.
        unsafe { rkyv::access_unchecked::<Archived<V>>(view.value) }
    }

    pub(super) fn count(self, store: &Store) -> usize {
        store.main.index.count(self.place(store))
    }

    pub(super) fn get<'s>(self, store: &'s Store, key: &[u8]) -> Option<&'s Archived<V>> {
        // SAFETY: from the index; callers do not ask for the one key without a value, the empty one of a log.
        store.main.get(self.place(store), key).map(|view| unsafe { Self::value(view) })
    }

    pub(super) fn iter(self, store: &Store) -> impl Iterator<Item = (&[u8], &Archived<V>)> {
        // SAFETY: from the index; not called for logs, which have a key without a value.
        store.main.iter(self.place(store)).map(|view| (view.key, unsafe { Self::value(view) }))
    }

    pub(super) fn walk(
        self,
        store: &Store,
        from: LogPosition,
        budget: usize,
        mut visit: impl FnMut(&[u8], &Archived<V>),
    ) -> LogPosition {
        let tag = store.main.index.tag(self.place(store));
        store.main.walk(from, budget, |view| {
            if view.tag == tag {
                // SAFETY: `walk` shows living records only; not called for logs, which have a key without a value.
                visit(view.key, unsafe { Self::value(view) });
            }
        })
    }

    pub(super) fn put(self, store: &mut Store, key: &[u8], value: &V) -> Result<bool, LogError> {
        let place = self.place(store);
        store.writable()?;
        let bytes = archive(value, std::mem::take(&mut store.scratch))?;
        let before = store.append(place, RecordKind::Put, key, &bytes);
        store.scratch = bytes;
        before
    }

    pub(super) fn remove(self, store: &mut Store, key: &[u8]) -> Result<bool, LogError> {
        let place = self.place(store);
        store.writable()?;
        if store.main.get(place, key).is_none() {
            return Ok(false);
        }
        store.append(place, RecordKind::Remove, key, &[])
    }
}

/// Replaces what is in `bytes`.
pub(super) fn archive<V: Value>(value: &V, mut bytes: AlignedVec) -> Result<AlignedVec, LogError> {
    bytes.clear();
    rkyv::api::high::to_bytes_in::<_, rancor::Error>(value, bytes).map_err(LogError::Archive)
}
