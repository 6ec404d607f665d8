//! What a service declares: the name of each collection and the type of its values. The trust boundary: a value of another
//! process is checked here once, when its record is taken in, and read unchecked afterwards.

use rkyv::api::high::{HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Archived, Serialize, rancor};

use crate::log::LogError;
use crate::message::LogPosition;
use crate::record::{RecordKind, RecordView, Shape, Tag};

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
    #[error("the collection {name:?} is declared after the state has arrived: declare it before the service joins")]
    Late { name: String },
}

type Check = fn(&[u8]) -> Result<(), rancor::Error>;

fn check_as<V: Value>(bytes: &[u8]) -> Result<(), rancor::Error> {
    rkyv::access::<Archived<V>, rancor::Error>(bytes).map(drop)
}

#[derive(Debug)]
struct Declared {
    name: String,
    tag: Tag,
    check: Check,
}

/// The declared collections, in order.
#[derive(Debug, Default)]
pub(super) struct Types(Vec<Declared>);

impl Types {
    pub(super) fn declare<V: Value>(&mut self, name: &str, shape: Shape) -> Result<Tag, DeclareError> {
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
        self.0.push(Declared { name: name.to_owned(), tag, check: check_as::<V> });
        Ok(tag)
    }

    /// Whether the value of a record has the type that its collection was declared with. A collection that is not
    /// declared is not read, so its values are not checked.
    pub(super) fn check(
        &self,
        place: usize,
        schema: u32,
        view: &RecordView<'_>,
        at: LogPosition,
    ) -> Result<(), LogError> {
        let Some(declared) = self.0.get(place).filter(|_| has_value(view)) else { return Ok(()) };
        (declared.check)(view.value).map_err(|source| LogError::Value { at, schema, source })
    }
}

/// Not the first number that a log keeps, nor a removal.
fn has_value(view: &RecordView<'_>) -> bool {
    view.kind == RecordKind::Put && (view.tag.shape != Shape::Log || !view.key.is_empty())
}
