//! What one connection knows about its own keys, and what each answer says about writes it was promised.
//!
//! A connection is the only writer of its keys and the server answers a connection in order, so every answer can be
//! checked exactly: `INCR` must give the value acknowledged before plus one, `GET` must give the last acknowledged
//! value. A write that was sent but not acknowledged when its connection failed is *uncertain*: it may be applied at any
//! later time or never, and both are allowed from then on. Pure: no socket, no clock.

use crate::resp::Reply;

/// One request, as far as its answer has to be checked. `key` counts within its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Increment { key: usize },
    Set { key: usize, sequence: u64 },
    GetCounter { key: usize },
    GetValue { key: usize },
}

impl Operation {
    pub(crate) const fn is_write(self) -> bool {
        matches!(self, Self::Increment { .. } | Self::Set { .. })
    }
}

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Finding {
    Right,
    /// This many acknowledged writes are not there.
    Lost(u64),
    /// This many writes were applied more than once.
    Duplicated(u64),
    /// A value that nobody wrote under this key, or that is newer than anything acknowledged or uncertain.
    WrongRead(String),
    /// The server answered with an error: the request failed.
    Refused(String),
    /// The answer has a type that this request cannot have: requests and answers no longer match.
    Mismatch(String),
}

#[derive(Debug, Clone, Default)]
struct Counter {
    acknowledged: u64,
    uncertain: u64,
}

impl Counter {
    /// Compares a value with `expected` up to `expected + uncertain` and goes on from what was seen, so that one
    /// fault is counted once.
    fn observe(&mut self, expected: u64, seen: u64) -> Finding {
        let highest = expected + self.uncertain;
        self.acknowledged = seen;
        if seen < expected {
            Finding::Lost(expected - seen)
        } else if seen > highest {
            self.uncertain = 0;
            Finding::Duplicated(seen - highest)
        } else {
            self.uncertain -= seen - expected;
            Finding::Right
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Value {
    /// Sequence number of the last acknowledged write; 0 when there was none (no value).
    acknowledged: u64,
    last_sent: u64,
    uncertain: Vec<u64>,
}

impl Value {
    fn observe(&mut self, seen: u64) -> Finding {
        if seen == self.acknowledged {
            Finding::Right
        } else if self.uncertain.contains(&seen) {
            // The uncertain write was applied, possibly late and over a newer one: from now on it is what stands.
            self.acknowledged = seen;
            Finding::Right
        } else if seen < self.acknowledged {
            self.acknowledged = seen;
            Finding::Lost(1)
        } else {
            let newest = self.acknowledged;
            self.acknowledged = seen;
            Finding::WrongRead(format!("write {seen} is there, but {newest} is the last acknowledged"))
        }
    }
}

/// All keys of one connection.
#[derive(Debug)]
pub(crate) struct Ledger {
    key_prefix: String,
    value_bytes: usize,
    counters: Vec<Counter>,
    values: Vec<Value>,
}

impl Ledger {
    /// `owner` makes the keys different from those of every other connection.
    pub(crate) fn new(prefix: &str, owner: usize, counters: usize, values: usize, value_bytes: usize) -> Self {
        Self {
            key_prefix: format!("{prefix}:{owner}"),
            value_bytes,
            counters: vec![Counter::default(); counters],
            values: vec![Value::default(); values],
        }
    }

    pub(crate) fn counters(&self) -> usize {
        self.counters.len()
    }

    pub(crate) fn values(&self) -> usize {
        self.values.len()
    }

    pub(crate) fn counter_key(&self, key: usize) -> String {
        format!("{}:c{key}", self.key_prefix)
    }

    pub(crate) fn value_key(&self, key: usize) -> String {
        format!("{}:v{key}", self.key_prefix)
    }

    pub(crate) fn key(&self, operation: Operation) -> String {
        match operation {
            Operation::Increment { key } | Operation::GetCounter { key } => self.counter_key(key),
            Operation::Set { key, .. } | Operation::GetValue { key } => self.value_key(key),
        }
    }

    /// A new write of a value.
    pub(crate) fn next_set(&mut self, key: usize) -> Operation {
        let value = &mut self.values[key];
        value.last_sent += 1;
        Operation::Set { key, sequence: value.last_sent }
    }

    /// The bytes that write `sequence` of value `key` stores: the key and number in clear, then a filling that differs
    /// for every write, so that a torn or exchanged value is seen.
    pub(crate) fn content(&self, key: usize, sequence: u64) -> Vec<u8> {
        let mut bytes = format!("{sequence}@{}@", self.value_key(key)).into_bytes();
        let mut state = sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key as u64;
        while bytes.len() < self.value_bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes.push(b'a' + ((state >> 40) % 26) as u8);
        }
        bytes
    }

    /// Checks the answer to `operation`. To be called in the order in which the requests were sent.
    pub(crate) fn answer(&mut self, operation: Operation, reply: &Reply) -> Finding {
        if let Reply::Error(text) = reply {
            // A refusal should mean "not applied", but a server that fails after it applied answers alike.
            self.give_up(operation);
            return Finding::Refused(text.clone());
        }
        match (operation, reply) {
            (Operation::Increment { key }, Reply::Integer(seen)) => match u64::try_from(*seen) {
                Ok(seen) => {
                    let expected = self.counters[key].acknowledged + 1;
                    self.counters[key].observe(expected, seen)
                }
                Err(_) => Finding::WrongRead(format!("counter is {seen}")),
            },
            (Operation::Set { key, sequence }, Reply::Simple(text)) if text == "OK" => {
                self.values[key].acknowledged = sequence;
                Finding::Right
            }
            (Operation::GetCounter { key }, Reply::Bulk(bytes)) => {
                let seen = match bytes {
                    None => Some(0),
                    Some(bytes) => std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok()),
                };
                match seen {
                    Some(seen) => {
                        let expected = self.counters[key].acknowledged;
                        self.counters[key].observe(expected, seen)
                    }
                    None => Finding::WrongRead(format!("counter is {reply}")),
                }
            }
            (Operation::GetValue { key }, Reply::Bulk(bytes)) => match self.sequence_of(key, bytes.as_deref()) {
                Some(seen) => self.values[key].observe(seen),
                None => Finding::WrongRead(format!("value is {reply}")),
            },
            _ => Finding::Mismatch(format!("{operation:?} was answered with {reply}")),
        }
    }

    /// The write that stored these bytes, `None` when none of ours did.
    fn sequence_of(&self, key: usize, bytes: Option<&[u8]>) -> Option<u64> {
        let Some(bytes) = bytes else { return Some(0) };
        let digits = bytes.split(|b| *b == b'@').next()?;
        let sequence = std::str::from_utf8(digits).ok()?.parse().ok()?;
        (self.content(key, sequence) == bytes).then_some(sequence)
    }

    /// The operation was sent and will not be answered any more.
    pub(crate) fn give_up(&mut self, operation: Operation) {
        match operation {
            Operation::Increment { key } => self.counters[key].uncertain += 1,
            Operation::Set { key, sequence } => self.values[key].uncertain.push(sequence),
            Operation::GetCounter { .. } | Operation::GetValue { .. } => {}
        }
    }

    /// A read of every key, for the final comparison.
    pub(crate) fn read_back(&self) -> Vec<Operation> {
        let counters = (0..self.counters.len()).map(|key| Operation::GetCounter { key });
        counters.chain((0..self.values.len()).map(|key| Operation::GetValue { key })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INCREMENT: Operation = Operation::Increment { key: 0 };
    const GET: Operation = Operation::GetValue { key: 0 };

    fn ledger() -> Ledger {
        Ledger::new("t", 3, 1, 1, 40)
    }

    fn ok() -> Reply {
        Reply::Simple("OK".into())
    }

    fn bulk(bytes: Vec<u8>) -> Reply {
        Reply::Bulk(Some(bytes))
    }

    #[test]
    fn a_lost_increment_and_a_doubled_one_are_each_counted_once() {
        let mut ledger = ledger();
        assert_eq!(ledger.answer(INCREMENT, &Reply::Integer(1)), Finding::Right);
        assert_eq!(ledger.answer(INCREMENT, &Reply::Integer(1)), Finding::Lost(1));
        assert_eq!(ledger.answer(INCREMENT, &Reply::Integer(2)), Finding::Right);
        assert_eq!(ledger.answer(INCREMENT, &Reply::Integer(4)), Finding::Duplicated(1));
        assert_eq!(ledger.answer(INCREMENT, &Reply::Integer(5)), Finding::Right);
        assert_eq!(ledger.answer(Operation::GetCounter { key: 0 }, &bulk(b"5".to_vec())), Finding::Right);
        assert_eq!(ledger.answer(Operation::GetCounter { key: 0 }, &Reply::Bulk(None)), Finding::Lost(5));
    }

    #[test]
    fn an_uncertain_increment_may_have_happened_or_not_but_not_twice() {
        for (seen, finding) in
            [(1, Finding::Lost(1)), (2, Finding::Right), (3, Finding::Right), (4, Finding::Duplicated(1))]
        {
            let mut ledger = ledger();
            assert_eq!(ledger.answer(INCREMENT, &Reply::Integer(1)), Finding::Right);
            ledger.give_up(INCREMENT);
            assert_eq!(ledger.answer(INCREMENT, &Reply::Integer(seen)), finding, "{seen}");
        }
    }

    #[test]
    fn an_uncertain_value_may_stand_or_not() {
        for applied in [1, 2] {
            let mut ledger = ledger();
            let first = ledger.next_set(0);
            assert_eq!(ledger.answer(first, &ok()), Finding::Right);
            let second = ledger.next_set(0);
            ledger.give_up(second);
            let content = ledger.content(0, applied);
            assert_eq!(ledger.answer(GET, &bulk(content)), Finding::Right);
        }
    }

    #[test]
    fn an_older_value_is_a_lost_write_and_foreign_bytes_are_a_wrong_read() {
        let mut ledger = ledger();
        for _ in 0..2 {
            let set = ledger.next_set(0);
            assert_eq!(ledger.answer(set, &ok()), Finding::Right);
        }
        let first = ledger.content(0, 1);
        assert_eq!(ledger.answer(GET, &bulk(first.clone())), Finding::Lost(1));
        let mut torn = first;
        *torn.last_mut().unwrap() ^= 1;
        assert!(matches!(ledger.answer(GET, &bulk(torn)), Finding::WrongRead(_)));
        let other = Ledger::new("t", 4, 1, 1, 40).content(0, 1);
        assert!(matches!(ledger.answer(GET, &bulk(other)), Finding::WrongRead(_)));
        assert!(matches!(ledger.answer(GET, &Reply::Integer(1)), Finding::Mismatch(_)));
        assert!(matches!(ledger.answer(GET, &Reply::Error("ERR".into())), Finding::Refused(_)));
    }

    proptest! {
        /// Against a server that executes in order, whatever fails and whether or not failed writes are applied.
        #[test]
        fn a_correct_server_is_never_accused(steps in prop::collection::vec((0_u8..4, any::<bool>(), any::<bool>()), 1..80)) {
            let mut ledger = ledger();
            let (mut counter, mut value) = (0_u64, None::<Vec<u8>>);
            for (kind, fails, applied_anyway) in steps {
                let operation = match kind {
                    0 => INCREMENT,
                    1 => ledger.next_set(0),
                    2 => Operation::GetCounter { key: 0 },
                    _ => GET,
                };
                if !fails || applied_anyway {
                    match operation {
                        Operation::Increment { .. } => counter += 1,
                        Operation::Set { sequence, .. } => value = Some(ledger.content(0, sequence)),
                        _ => {}
                    }
                }
                if fails {
                    ledger.give_up(operation);
                    continue;
                }
                let reply = match operation {
                    Operation::Increment { .. } => Reply::Integer(counter as i64),
                    Operation::Set { .. } => ok(),
                    Operation::GetCounter { .. } if counter == 0 => Reply::Bulk(None),
                    Operation::GetCounter { .. } => bulk(counter.to_string().into_bytes()),
                    Operation::GetValue { .. } => Reply::Bulk(value.clone()),
                };
                prop_assert_eq!(ledger.answer(operation, &reply), Finding::Right);
            }
        }
    }
}
