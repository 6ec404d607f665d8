//! A reader of the kernel's BTF: where a field of a struct is, and what arguments a tracepoint passes.
//!
//! Not here: relocation of programs, types of functions, or anything else BTF can do.
//!
//! ```text
//! header │ types: (name, info, size or type) + members, parameters … │ strings
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Where every kernel built with `CONFIG_DEBUG_INFO_BTF` shows its types.
pub(crate) const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("cannot read {path}: the kernel needs CONFIG_DEBUG_INFO_BTF=y")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not BTF as this program knows it: {problem} at byte {offset}")]
    Malformed { path: PathBuf, problem: &'static str, offset: usize },
}

const MAGIC: u16 = 0xeb9f;

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// Anonymous members and typedef chains deeper than this are not followed.
const DEPTH_MAX: u32 = 16;

/// The types of the running kernel.
#[derive(Debug)]
pub(crate) struct Btf {
    bytes: Vec<u8>,
    /// Where the string section begins and ends.
    strings: (usize, usize),
    /// Byte offset of each type; type 0 is `void` and has none.
    types: Vec<usize>,
    structs: HashMap<Vec<u8>, u32>,
    typedefs: HashMap<Vec<u8>, u32>,
}

#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    /// Members or parameters.
    entries: usize,
    /// Member offsets hold a bit-field size in their upper byte.
    flag: bool,
    size_or_type: u32,
    /// Byte offset of what follows the fixed part.
    tail: usize,
}

impl Btf {
    /// Of the running kernel.
    ///
    /// # Errors
    /// When the file is missing or damaged.
    pub(crate) fn of_kernel() -> Result<Self, BtfError> {
        let path = Path::new(KERNEL_BTF);
        let bytes = std::fs::read(path).map_err(|source| BtfError::Read { path: path.to_owned(), source })?;
        Self::parse(bytes).map_err(|(problem, offset)| BtfError::Malformed { path: path.to_owned(), problem, offset })
    }

    fn parse(bytes: Vec<u8>) -> Result<Self, (&'static str, usize)> {
        let word = |at: usize| word(&bytes, at).ok_or(("the header is cut short", at));
        if u16::from_ne_bytes([*bytes.first().unwrap_or(&0), *bytes.get(1).unwrap_or(&0)]) != MAGIC {
            return Err(("no BTF magic in this machine's byte order", 0));
        }
        let header = word(4)? as usize;
        let section = |offset: usize, length: usize| {
            let start = header.checked_add(offset)?;
            let end = start.checked_add(length)?;
            (end <= bytes.len()).then_some((start, end))
        };
        let types_at =
            section(word(8)? as usize, word(12)? as usize).ok_or(("the type section is longer than the file", 8))?;
        let strings = section(word(16)? as usize, word(20)? as usize)
            .ok_or(("the string section is longer than the file", 16))?;

        let mut btf =
            Self { strings, types: vec![0], structs: HashMap::new(), typedefs: HashMap::new(), bytes: Vec::new() };
        btf.bytes = bytes;
        let mut at = types_at.0;
        while at < types_at.1 {
            let id = btf.types.len() as u32;
            btf.types.push(at);
            let ty = btf.type_of(id).ok_or(("a type is cut short", at))?;
            let index = match ty.kind {
                STRUCT => Some(&mut btf.structs),
                TYPEDEF => Some(&mut btf.typedefs),
                _ => None,
            };
            if let Some(index) = index
                && let Some(name) = string(&btf.bytes, btf.strings, ty.name)
                && !name.is_empty()
            {
                index.entry(name.to_vec()).or_insert(id);
            }
            let tail = match ty.kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => ty.entries * 12,
                ENUM | FUNC_PROTO => ty.entries * 8,
                0..=ENUM64 => 0,
                _ => return Err(("a kind of type that is not known", at)),
            };
            at = ty.tail + tail;
        }
        if at == types_at.1 { Ok(btf) } else { Err(("the last type is cut short", at)) }
    }

    fn type_of(&self, id: u32) -> Option<Type> {
        let at = *self.types.get(id as usize)?;
        if at == 0 {
            return None;
        }
        let info = word(&self.bytes, at + 4)?;
        Some(Type {
            name: word(&self.bytes, at)?,
            kind: (info >> 24) & 0x1f,
            entries: (info & 0xffff) as usize,
            flag: info >> 31 != 0,
            size_or_type: word(&self.bytes, at + 8)?,
            tail: at + 12,
        })
    }

    fn name(&self, offset: u32) -> &[u8] {
        string(&self.bytes, self.strings, offset).unwrap_or_default()
    }

    /// Past typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<(u32, Type)> {
        for _ in 0..DEPTH_MAX {
            let ty = self.type_of(id)?;
            match ty.kind {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => id = ty.size_or_type,
                _ => return Some((id, ty)),
            }
        }
        None
    }

    /// Byte offset of a field, also one inside anonymous structs and unions; `path` may name fields of embedded
    /// structs with dots. `None` when there is no such struct or field, or when it is a bit field.
    #[must_use]
    pub(crate) fn field(&self, structure: &str, path: &str) -> Option<u32> {
        let mut id = *self.structs.get(structure.as_bytes())?;
        let mut offset = 0;
        for name in path.split('.') {
            let (bits, ty) = self.member(id, name.as_bytes(), 0)?;
            if bits % 8 != 0 {
                return None;
            }
            offset += bits / 8;
            id = self.resolve(ty)?.0;
        }
        Some(offset)
    }

    /// Offset in bits and type of a member.
    fn member(&self, id: u32, name: &[u8], depth: u32) -> Option<(u32, u32)> {
        let (_, ty) = self.resolve(id)?;
        if !matches!(ty.kind, STRUCT | UNION) || depth > DEPTH_MAX {
            return None;
        }
        for index in 0..ty.entries {
            let at = ty.tail + index * 12;
            let (member_name, member_type) = (word(&self.bytes, at)?, word(&self.bytes, at + 4)?);
            let raw = word(&self.bytes, at + 8)?;
            let (bits, bit_field) = if ty.flag { (raw & 0xff_ffff, raw >> 24 != 0) } else { (raw, false) };
            let member_name = self.name(member_name);
            if member_name == name {
                return (!bit_field).then_some((bits, member_type));
            }
            if member_name.is_empty()
                && let Some((inner, found)) = self.member(member_type, name, depth + 1)
            {
                return Some((bits + inner, found));
            }
        }
        None
    }

    /// Whether the kernel itself (no module) has a tracepoint.
    #[must_use]
    pub(crate) fn has_tracepoint(&self, tracepoint: &str) -> bool {
        self.arguments(tracepoint).is_some()
    }

    /// Position of the `nth` (from 0) argument that is a pointer to `structure`.
    #[must_use]
    pub(crate) fn argument(&self, tracepoint: &str, structure: &str, nth: usize) -> Option<u32> {
        let is_pointer_to = |id: u32| {
            let (_, pointer) = self.resolve(id)?;
            let (_, target) = self.resolve(pointer.size_or_type)?;
            (pointer.kind == PTR && target.kind == STRUCT && self.name(target.name) == structure.as_bytes())
                .then_some(())
        };
        let arguments = self.arguments(tracepoint)?;
        let found = arguments.iter().enumerate().filter(|(_, id)| is_pointer_to(**id).is_some()).nth(nth);
        found.map(|(position, _)| position as u32)
    }

    /// Types of the arguments: those of `typedef void (*btf_trace_NAME)(void *, …)` but the first.
    fn arguments(&self, tracepoint: &str) -> Option<Vec<u32>> {
        let id = *self.typedefs.get(format!("btf_trace_{tracepoint}").as_bytes())?;
        let (_, pointer) = self.resolve(id)?;
        let (_, prototype) = self.resolve(pointer.size_or_type)?;
        if pointer.kind != PTR || prototype.kind != FUNC_PROTO {
            return None;
        }
        (1..prototype.entries).map(|index| word(&self.bytes, prototype.tail + index * 8 + 4)).collect()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(four.try_into().ok()?))
}

fn string(bytes: &[u8], section: (usize, usize), offset: u32) -> Option<&[u8]> {
    let text = bytes.get(section.0.checked_add(offset as usize)?..section.1)?;
    let end = text.iter().position(|byte| *byte == 0)?;
    text.get(..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct s { int a; struct { int pad; int *b; }; };` and `typedef void (*btf_trace_t)(void *, int, struct s *)`.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0s\0a\0pad\0b\0btf_trace_t\0";
        let name = |text: &str| {
            let mut needle = vec![0];
            needle.extend(text.as_bytes());
            needle.push(0);
            strings.windows(needle.len()).position(|w| w == needle).expect("in the table") as u32 + 1
        };
        let info = |kind: u32, entries: u32| (kind << 24) | entries;
        let mut types: Vec<u32> = Vec::new();
        types.extend([name("int"), info(INT, 0), 4, 32]); // 1
        types.extend([0, info(PTR, 0), 1]); // 2: int *
        types.extend([0, info(STRUCT, 2), 16, name("pad"), 1, 0, name("b"), 2, 64]); // 3
        types.extend([name("s"), info(STRUCT, 2), 24, name("a"), 1, 0, 0, 3, 64]); // 4
        types.extend([0, info(PTR, 0), 4]); // 5: struct s *
        types.extend([0, info(PTR, 0), 0]); // 6: void *
        types.extend([0, info(FUNC_PROTO, 3), 0, 0, 6, 0, 1, 0, 5]); // 7
        types.extend([0, info(PTR, 0), 7]); // 8
        types.extend([name("btf_trace_t"), info(TYPEDEF, 0), 8]); // 9
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_ne_bytes());
        bytes.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn fields_are_found_through_anonymous_members() {
        let btf = Btf::parse(sample()).expect("well formed");
        assert_eq!(btf.field("s", "a"), Some(0));
        assert_eq!(btf.field("s", "b"), Some(16));
        assert_eq!(btf.field("s", "c"), None);
        assert_eq!(btf.field("t", "a"), None);
    }

    #[test]
    fn arguments_are_told_by_type() {
        let btf = Btf::parse(sample()).expect("well formed");
        assert!(btf.has_tracepoint("t"));
        assert!(!btf.has_tracepoint("u"));
        assert_eq!(btf.argument("t", "s", 0), Some(1));
        assert_eq!(btf.argument("t", "s", 1), None);
    }

    #[test]
    fn cut_or_damaged_bytes_are_refused_not_read() {
        let whole = sample();
        for length in 0..whole.len() {
            let _ = Btf::parse(whole[..length].to_vec()).map(|btf| btf.field("s", "b"));
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0xff;
            let _ = Btf::parse(damaged).map(|btf| (btf.field("s", "b"), btf.argument("t", "s", 0)));
        }
        assert!(Btf::parse(b"nonsense".to_vec()).is_err());
    }
}
