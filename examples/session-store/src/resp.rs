//! The Redis protocol, version 2: requests in, replies out. Errors are worded as Redis words them, because clients match on
//! the words.

use std::ops::Range;

/// Longest argument, bytes.
pub const BULK_LEN_MAX: usize = 1 << 20;
/// Most arguments of one request.
pub const ARGUMENTS_MAX: usize = 1024;
/// Longest request in the inline form, and longest line of a length, bytes.
pub const INLINE_LEN_MAX: usize = 64 << 10;
/// Longest request altogether, bytes.
pub const REQUEST_LEN_MAX: usize = 2 << 20;

/// One request: where its arguments lie in the input, and how much of the input it takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    pub arguments: Vec<Range<usize>>,
    pub len: usize,
}

/// Why the input is no request; the connection ends after the reply that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProtocolError {
    InvalidMultibulkLength,
    InvalidBulkLength,
    ExpectedDollar(u8),
    TooBigInline,
    TooBigCount,
    UnbalancedQuotes,
    TooBig,
}

impl ProtocolError {
    #[must_use]
    pub fn message(&self) -> String {
        let what = match self {
            Self::InvalidMultibulkLength => "invalid multibulk length".to_owned(),
            Self::InvalidBulkLength => "invalid bulk length".to_owned(),
            Self::ExpectedDollar(found) => format!("expected '$', got '{}'", found.escape_ascii()),
            Self::TooBigInline => "too big inline request".to_owned(),
            Self::TooBigCount => "too big mbulk count string".to_owned(),
            Self::UnbalancedQuotes => "unbalanced quotes in request".to_owned(),
            Self::TooBig => "too big request".to_owned(),
        };
        format!("ERR Protocol error: {what}")
    }
}

/// Reads the request at the start of `input`; `None` when it is not whole yet. A request without arguments (an empty
/// line) is to be skipped.
///
/// # Errors
/// [`ProtocolError`] when no continuation of `input` can be a request.
pub fn parse(input: &[u8]) -> Result<Option<Request>, ProtocolError> {
    match input.first() {
        None => Ok(None),
        Some(b'*') => parse_multibulk(input),
        Some(_) => parse_inline(input),
    }
}

/// The line that starts at `from`, without its end, and where the next begins.
fn line(input: &[u8], from: usize) -> Option<(&[u8], usize)> {
    let end = from + input[from..].iter().take(INLINE_LEN_MAX + 1).position(|byte| *byte == b'\n')?;
    let text = &input[from..end];
    Some((text.strip_suffix(b"\r").unwrap_or(text), end + 1))
}

fn number(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn parse_multibulk(input: &[u8]) -> Result<Option<Request>, ProtocolError> {
    let Some((count, mut at)) = line(input, 1) else {
        return if input.len() > INLINE_LEN_MAX { Err(ProtocolError::TooBigCount) } else { Ok(None) };
    };
    let count = number(count).ok_or(ProtocolError::InvalidMultibulkLength)?;
    if count <= 0 {
        return Ok(Some(Request { arguments: Vec::new(), len: at }));
    }
    let count = usize::try_from(count)
        .ok()
        .filter(|count| *count <= ARGUMENTS_MAX)
        .ok_or(ProtocolError::InvalidMultibulkLength)?;
    let mut arguments = Vec::with_capacity(count);
    for _ in 0..count {
        match input.get(at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(other) => return Err(ProtocolError::ExpectedDollar(*other)),
        }
        let Some((len, begin)) = line(input, at + 1) else {
            return if input.len() - at > INLINE_LEN_MAX { Err(ProtocolError::InvalidBulkLength) } else { Ok(None) };
        };
        let len = number(len)
            .and_then(|len| usize::try_from(len).ok())
            .filter(|len| *len <= BULK_LEN_MAX)
            .ok_or(ProtocolError::InvalidBulkLength)?;
        let end = begin + len + 2;
        if end > REQUEST_LEN_MAX {
            return Err(ProtocolError::TooBig);
        }
        if end > input.len() {
            return Ok(None);
        }
        arguments.push(begin..begin + len);
        at = end;
    }
    Ok(Some(Request { arguments, len: at }))
}

fn parse_inline(input: &[u8]) -> Result<Option<Request>, ProtocolError> {
    let Some((text, next)) = line(input, 0) else {
        return if input.len() > INLINE_LEN_MAX { Err(ProtocolError::TooBigInline) } else { Ok(None) };
    };
    let mut arguments = Vec::new();
    let mut at = 0;
    while at < text.len() {
        if text[at].is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if matches!(text[at], b'"' | b'\'') {
            // Quotes without escapes inside; whoever needs escapes sends the other form.
            let quote = text[at];
            let begin = at + 1;
            let len = text[begin..].iter().position(|byte| *byte == quote).ok_or(ProtocolError::UnbalancedQuotes)?;
            at = begin + len + 1;
            if text.get(at).is_some_and(|byte| !byte.is_ascii_whitespace()) {
                return Err(ProtocolError::UnbalancedQuotes);
            }
            arguments.push(begin..begin + len);
        } else {
            let len = text[at..].iter().position(u8::is_ascii_whitespace).unwrap_or(text.len() - at);
            arguments.push(at..at + len);
            at += len;
        }
        if arguments.len() > ARGUMENTS_MAX {
            return Err(ProtocolError::TooBigInline);
        }
    }
    Ok(Some(Request { arguments, len: next }))
}

pub fn simple(out: &mut Vec<u8>, text: &str) {
    out.push(b'+');
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

pub fn error(out: &mut Vec<u8>, text: &str) {
    out.push(b'-');
    // A reply is one line.
    out.extend(text.bytes().map(|byte| if byte == b'\r' || byte == b'\n' { b' ' } else { byte }));
    out.extend_from_slice(b"\r\n");
}

pub fn integer(out: &mut Vec<u8>, value: i64) {
    out.push(b':');
    out.extend_from_slice(value.to_string().as_bytes());
    out.extend_from_slice(b"\r\n");
}

pub fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'$');
    out.extend_from_slice(bytes.len().to_string().as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

pub fn null(out: &mut Vec<u8>) {
    out.extend_from_slice(b"$-1\r\n");
}

pub fn array(out: &mut Vec<u8>, len: usize) {
    out.push(b'*');
    out.extend_from_slice(len.to_string().as_bytes());
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arguments(input: &[u8]) -> Vec<&[u8]> {
        parse(input).unwrap().unwrap().arguments.into_iter().map(|range| &input[range]).collect()
    }

    #[test]
    fn both_forms_of_a_request_are_read() {
        assert_eq!(arguments(b"*2\r\n$3\r\nGET\r\n$1\r\na\r\nrest"), [&b"GET"[..], b"a"]);
        assert_eq!(arguments(b"  SET key \"two words\" \r\n"), [&b"SET"[..], b"key", b"two words"]);
        assert_eq!(arguments(b"\r\n"), [b"" as &[u8]; 0]);
        assert_eq!(arguments(b"*0\r\n"), [b"" as &[u8]; 0]);
    }

    #[test]
    fn what_can_never_be_a_request_is_refused() {
        let cases: [(&[u8], ProtocolError); 6] = [
            (b"*x\r\n", ProtocolError::InvalidMultibulkLength),
            (b"*99999999\r\n", ProtocolError::InvalidMultibulkLength),
            (b"*1\r\nGET\r\n", ProtocolError::ExpectedDollar(b'G')),
            (b"*1\r\n$-1\r\n", ProtocolError::InvalidBulkLength),
            (b"*1\r\n$99999999\r\n", ProtocolError::InvalidBulkLength),
            (b"GET \"a\r\n", ProtocolError::UnbalancedQuotes),
        ];
        for (input, error) in cases {
            assert_eq!(parse(input), Err(error), "{}", input.escape_ascii());
        }
        assert_eq!(parse(&vec![b'a'; INLINE_LEN_MAX + 2]), Err(ProtocolError::TooBigInline));
    }

    proptest! {
        #[test]
        fn any_prefix_of_a_request_waits_for_the_rest(
            values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6),
            cut: prop::sample::Index,
        ) {
            let mut input = Vec::new();
            array(&mut input, values.len());
            for value in &values {
                bulk(&mut input, value);
            }
            let request = parse(&input).unwrap().unwrap();
            prop_assert_eq!(request.len, input.len());
            for (range, value) in request.arguments.into_iter().zip(&values) {
                prop_assert_eq!(&input[range], &value[..]);
            }
            prop_assert_eq!(parse(&input[..cut.index(input.len())]), Ok(None));
        }

        #[test]
        fn any_bytes_are_read_or_refused(input: Vec<u8>) {
            if let Ok(Some(request)) = parse(&input) {
                prop_assert!(request.len > 0 && request.len <= input.len());
                prop_assert!(request.arguments.iter().all(|range| range.end <= request.len));
            }
        }
    }
}
