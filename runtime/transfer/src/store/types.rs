//! What a service declares: the name of each collection and the type of its values, now and in older schemas. The trust boundary: a value of another
//! process is checked here once, when its record is taken in, and read unchecked afterwards.

use rkyv::api::high::{HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Archived, Serialize, rancor};

use crate::log::{LogConfig, LogError};
use crate::message::LogPosition;
use crate::record::{RecordKind, RecordView, Shape, Tag};

use super::evolution::{ConvertError, Evolution, Older};

/// A type that can be a value of a collection. Implemented for every fitting rkyv type.
pub trait Value:
    Archive<Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>> + 'static>
    + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
    + 'static
{
}

impl<V> Value for V where
    V: Archive<Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>> + 'static>
        + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
        + 'static
{
}

/// Why a collection cannot be declared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeclareError {
    #[error("the collection {name:?} is declared twice")]
    Twice { name: String },
    #[error("the names {name:?} and {other:?} give the same number: rename one of the collections")]
    Collision { name: String, other: String },
    #[error(
        "the collection {name:?} says what its values are in schema {schema}, which is not an older one that is read"
    )]
    Schema { name: String, schema: u32 },
    #[error("the collection {name:?} is declared after the state has arrived: declare it before the service joins")]
    Late { name: String },
}

pub(super) type Check = fn(&[u8]) -> Result<(), rancor::Error>;

pub(super) fn check_as<V: Value>(bytes: &[u8]) -> Result<(), rancor::Error> {
    rkyv::access::<Archived<V>, rancor::Error>(bytes).map(drop)
}

#[derive(Debug)]
struct Declared {
    name: String,
    tag: Tag,
    check: Check,
    older: Vec<Older>,
}

impl Declared {
    fn in_schema(&self, schema: u32) -> Option<&Older> {
        self.older.iter().find(|older| older.schema == schema)
    }
}

/// The declared collections, in order.
#[derive(Debug, Default)]
pub(super) struct Types(Vec<Declared>);

impl Types {
    pub(super) fn declare<V: Value>(
        &mut self,
        name: &str,
        shape: Shape,
        evolution: Evolution<V>,
        schemas: &LogConfig,
    ) -> Result<Tag, DeclareError> {
        let known = |schema| schemas.schemas_read.contains(&schema) && schema != schemas.schema_written;
        if let Some(Older { schema, .. }) = evolution.older.iter().find(|older| !known(older.schema)) {
            return Err(DeclareError::Schema { name: name.to_owned(), schema: *schema });
        }
        let collection = crc32fast::hash(name.as_bytes());
        if let Some(declared) = self.0.iter().find(|declared| declared.tag.collection == collection) {
            let (name, other) = (name.to_owned(), declared.name.clone());
            return Err(if name == other {
                DeclareError::Twice { name }
            } else {
                DeclareError::Collision { name, other }
            });
        }
        let tag = Tag { collection, shape };
        self.0.push(Declared { name: name.to_owned(), tag, check: check_as::<V>, older: evolution.older });
        Ok(tag)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Tag, &str)> {
        self.0.iter().map(|declared| (declared.tag, declared.name.as_str()))
    }

    /// Whether everything that this program writes can be written in an older schema too.
    pub(super) fn write_back(&self, schema: u32) -> bool {
        self.0.iter().all(|declared| declared.in_schema(schema).is_none_or(|older| older.down.is_some()))
    }

    /// The value of a record of an older schema as it is now, in `buffer`; `None` when it is the same.
    pub(super) fn up(
        &self,
        place: usize,
        schema: u32,
        view: &RecordView<'_>,
        buffer: &mut AlignedVec,
    ) -> Option<Result<(), ConvertError>> {
        let older = self.0.get(place).filter(|_| has_value(view.kind, view.tag, view.key))?.in_schema(schema)?;
        Some(replace(buffer, |bytes| (older.up)(view.value, bytes)))
    }

    /// A value of now as it is in an older schema, in `buffer`; `None` when it is the same.
    pub(super) fn down(
        &self,
        place: usize,
        schema: u32,
        (kind, key, value): (RecordKind, &[u8], &[u8]),
        buffer: &mut AlignedVec,
    ) -> Option<Result<(), ConvertError>> {
        let declared = self.0.get(place).filter(|declared| has_value(kind, declared.tag, key))?;
        let down = declared.in_schema(schema)?.down.as_ref()?;
        Some(replace(buffer, |bytes| down(value, bytes)))
    }

    /// Whether the value of a record has the type that its collection was declared with for this schema. A collection that
    /// is not declared is not read, so its values are not checked.
    pub(super) fn check(
        &self,
        place: usize,
        schema: u32,
        view: &RecordView<'_>,
        at: LogPosition,
    ) -> Result<(), LogError> {
        let has_value = has_value(view.kind, view.tag, view.key);
        let Some(declared) = self.0.get(place).filter(|_| has_value) else { return Ok(()) };
        let check = declared.in_schema(schema).map_or(declared.check, |older| older.check);
        check(view.value).map_err(|source| LogError::Value { at, schema, source })
    }
}

/// Not the first number that a log keeps, nor a removal.
fn has_value(kind: RecordKind, tag: Tag, key: &[u8]) -> bool {
    kind == RecordKind::Put && (tag.shape != Shape::Log || !key.is_empty())
}

fn replace(
    buffer: &mut AlignedVec,
    make: impl FnOnce(AlignedVec) -> Result<AlignedVec, ConvertError>,
) -> Result<(), ConvertError> {
    *buffer = make(std::mem::take(buffer))?;
    Ok(())
}
