//! The state, twice: as it must be to be pre-copied, and as it must be to be told as a snapshot.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::Bound;

use rkyv::{Archive, Deserialize, Serialize, rancor};
use warmswap_sdk::transfer::log::LogError;
use warmswap_sdk::transfer::precopy::{Precopied, Precopy};
use warmswap_sdk::transfer::snapshot::{ArchivedShard, Snapshot, Snapshotted, to_shards};
use warmswap_sdk::transfer::state::State;

pub(crate) const SCHEMA: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Score {
    pub(crate) points: i64,
    pub(crate) note: String,
}

/// What the server does with the state, however it moves.
pub(crate) trait Board: State {
    fn score(&self, name: &str) -> Option<&Score>;
    fn set(&mut self, name: String, score: Option<Score>) -> Result<(), LogError>;
    fn names(&self) -> usize;
}

/// To be pre-copied: ordered by name, so that a name says how far the base has got whatever changes meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Ordered(BTreeMap<String, Score>);

/// What the score of a name is from now on; `None` when it has none.
#[derive(Debug, Archive, Serialize, Deserialize)]
pub(crate) struct Entry {
    name: String,
    score: Option<Score>,
}

impl Precopy for Ordered {
    type Piece = Entry;
    /// The name that was told last.
    type Cursor = Option<String>;

    fn begin(&self) -> Option<String> {
        None
    }

    fn next(&self, cursor: &mut Option<String>) -> Option<Entry> {
        let after = cursor.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let (name, score) = self.0.range::<str, _>((after, Bound::Unbounded)).next()?;
        *cursor = Some(name.clone());
        Some(Entry { name: name.clone(), score: Some(score.clone()) })
    }

    fn apply(&mut self, Entry { name, score }: Entry) {
        match score {
            Some(score) => drop(self.0.insert(name, score)),
            None => drop(self.0.remove(&name)),
        }
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

impl Board for Precopied<Ordered> {
    fn score(&self, name: &str) -> Option<&Score> {
        self.get().0.get(name)
    }

    fn set(&mut self, name: String, score: Option<Score>) -> Result<(), LogError> {
        self.change(Entry { name, score })
    }

    fn names(&self) -> usize {
        self.get().0.len()
    }
}

/// Enough for any number of processors to have something to do.
const SHARDS: usize = 16;
/// What an entry takes in the archive beside its text, roughly.
const ENTRY_LEN: usize = 40;

/// To be told as a snapshot: divided by a hash of the name.
#[derive(Debug)]
pub(crate) struct Sharded {
    shards: Vec<HashMap<String, Score>>,
    /// Of all entries, archived, roughly.
    len: usize,
}

impl Default for Sharded {
    fn default() -> Self {
        Self { shards: vec![HashMap::new(); SHARDS], len: 0 }
    }
}

fn shard_of(name: &str) -> usize {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish() as usize % SHARDS
}

fn len_of(name: &str, score: &Score) -> usize {
    ENTRY_LEN + name.len() + score.note.len()
}

impl Snapshot for Sharded {
    type Shard = HashMap<String, Score>;

    fn shards(&self) -> Vec<&Self::Shard> {
        self.shards.iter().collect()
    }

    fn len_hint(&self) -> usize {
        self.len
    }

    fn restore(&mut self, shards: Vec<ArchivedShard<Self::Shard>>) -> Result<(), rancor::Error> {
        // Names would be looked for in the wrong shards.
        if shards.len() != SHARDS {
            rancor::fail!(WrongShards);
        }
        self.shards = to_shards(&shards)?;
        self.len = self.shards.iter().flatten().map(|(name, score)| len_of(name, score)).sum();
        Ok(())
    }
}

#[derive(Debug)]
struct WrongShards;

impl std::fmt::Display for WrongShards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it is not divided into {SHARDS} shards")
    }
}

impl std::error::Error for WrongShards {}

impl Board for Snapshotted<Sharded> {
    fn score(&self, name: &str) -> Option<&Score> {
        self.get().shards[shard_of(name)].get(name)
    }

    fn set(&mut self, name: String, score: Option<Score>) -> Result<(), LogError> {
        let Sharded { shards, len } = self.get_mut();
        let shard = &mut shards[shard_of(&name)];
        if let Some(old) = shard.remove(&name) {
            *len -= len_of(&name, &old);
        }
        if let Some(score) = score {
            *len += len_of(&name, &score);
            shard.insert(name, score);
        }
        Ok(())
    }

    fn names(&self) -> usize {
        self.get().shards.iter().map(HashMap::len).sum()
    }
}
