//! The commands, over the state.

use std::time::{SystemTime, UNIX_EPOCH};

use warmswap_sdk::transfer::log::LogError;
use warmswap_sdk::transfer::store::{Map, Store};

use crate::Edition;
use crate::record::{ArchivedSession, Session};
use crate::resp;

/// What the connection does after a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    GoOn,
    Close,
}

/// What a command may look at besides its arguments.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) store: &'a mut Store,
    pub(crate) sessions: Map<Session>,
    pub(crate) edition: Edition,
    pub(crate) now_ms: u64,
    pub(crate) about: About,
}

/// What `INFO` tells besides the state.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct About {
    pub(crate) generation: u32,
    pub(crate) connections: usize,
    pub(crate) commands_processed: u64,
    pub(crate) uptime_s: u64,
}

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// An error reply. Its text follows Redis.
enum Refusal {
    Arity,
    Syntax,
    NotAnInteger,
    Overflow,
    InvalidExpiry,
    UnknownSubcommand(String),
    State(LogError),
}

impl From<LogError> for Refusal {
    fn from(error: LogError) -> Self {
        Self::State(error)
    }
}

impl Refusal {
    fn message(&self, command: &str) -> String {
        let lower = command.to_lowercase();
        match self {
            Self::Arity => format!("ERR wrong number of arguments for '{lower}' command"),
            Self::Syntax => "ERR syntax error".into(),
            Self::NotAnInteger => "ERR value is not an integer or out of range".into(),
            Self::Overflow => "ERR increment or decrement would overflow".into(),
            Self::InvalidExpiry => format!("ERR invalid expire time in '{lower}' command"),
            Self::UnknownSubcommand(sub) => {
                format!("ERR unknown subcommand '{sub}'. Try {} HELP.", command.to_uppercase())
            }
            Self::State(LogError::RecordTooLong { .. } | LogError::KeyTooLong { .. }) => {
                "ERR string exceeds maximum allowed size".into()
            }
            Self::State(error) => format!("OOM command not allowed: {error}"),
        }
    }
}

/// Runs one request and appends its reply.
pub(crate) fn run(context: &mut Context<'_>, arguments: &[&[u8]], out: &mut Vec<u8>) -> After {
    let Some((name, rest)) = arguments.split_first() else { return After::GoOn };
    let mut upper = [0; 16];
    let upper = match upper.get_mut(..name.len()) {
        Some(upper) => {
            upper.copy_from_slice(name);
            upper.make_ascii_uppercase();
            &*upper
        }
        None => &[],
    };
    if upper == b"QUIT" {
        resp::simple(out, "OK");
        return After::Close;
    }
    let begin = out.len();
    let result = match upper {
        b"GET" | b"SET" | b"INCR" | b"DEL" | b"EXISTS" | b"EXPIRE" | b"PEXPIRE" | b"TTL" | b"PTTL" | b"GETDEL"
        | b"OBJECT" => {
            if !context.edition.delay.is_zero() {
                // The mistake of version 3: a data command blocks the only thread. Asleep rather than busy, so that
                // the machine's other work is not slowed as well.
                std::thread::sleep(context.edition.delay);
            }
            data_command(context, upper, rest, out)
        }
        _ => other_command(context, upper, rest, out),
    };
    match result {
        Ok(true) => {}
        Ok(false) => {
            let shown = String::from_utf8_lossy(&name[..name.len().min(128)]);
            let beginning: String = rest
                .iter()
                .take(8)
                .map(|argument| format!("'{}' ", String::from_utf8_lossy(&argument[..argument.len().min(32)])))
                .collect();
            resp::error(out, &format!("ERR unknown command '{shown}', with args beginning with: {beginning}"));
        }
        Err(refusal) => {
            out.truncate(begin);
            resp::error(out, &refusal.message(&String::from_utf8_lossy(name)));
        }
    }
    After::GoOn
}

/// `false` when this edition does not know the command.
fn data_command(
    context: &mut Context<'_>,
    name: &[u8],
    arguments: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<bool, Refusal> {
    match (name, arguments) {
        (b"GET", [key]) => match live(context, key)? {
            Some(session) => resp::bulk(out, &session.data),
            None => resp::null(out),
        },
        (b"SET", [key, value, options @ ..]) => set(context, key, value, options, out)?,
        (b"INCR", [key]) => {
            let (number, expires_at_ms) = match live(context, key)? {
                Some(session) => (parse_integer(&session.data)?, session.expires_at_ms.to_native()),
                None => (0, 0),
            };
            let number = number.checked_add(1).ok_or(Refusal::Overflow)?;
            put(context, key, number.to_string().into_bytes(), expires_at_ms)?;
            resp::integer(out, number);
        }
        (b"DEL", [_, ..]) => {
            let mut removed = 0;
            for key in arguments {
                let there = live(context, key)?.is_some();
                context.sessions.remove(context.store, key)?;
                removed += i64::from(there);
            }
            resp::integer(out, removed);
        }
        (b"EXISTS", [_, ..]) => {
            let mut found = 0;
            for key in arguments {
                found += i64::from(live(context, key)?.is_some());
            }
            resp::integer(out, found);
        }
        (b"EXPIRE", [key, seconds]) => expire(context, key, seconds, 1000, out)?,
        (b"PEXPIRE", [key, milliseconds]) => expire(context, key, milliseconds, 1, out)?,
        (b"TTL", [key]) => time_to_live(context, key, 1000, out)?,
        (b"PTTL", [key]) => time_to_live(context, key, 1, out)?,
        (b"GETDEL", [key]) if context.edition.second => {
            match live(context, key)?.map(|session| session.data.to_vec()) {
                Some(data) => {
                    context.sessions.remove(context.store, key)?;
                    resp::bulk(out, &data);
                }
                None => resp::null(out),
            }
        }
        (b"OBJECT", [sub, key]) if context.edition.second => {
            if !sub.eq_ignore_ascii_case(b"IDLETIME") {
                return Err(Refusal::UnknownSubcommand(String::from_utf8_lossy(sub).into_owned()));
            }
            let now_ms = context.now_ms;
            match live(context, key)? {
                // Written by version 1, which does not know when: taken as just now.
                Some(session) => {
                    let since_ms = now_ms.saturating_sub(session.updated_ms().unwrap_or(now_ms));
                    resp::integer(out, i64::try_from(since_ms / 1000).unwrap_or(i64::MAX));
                }
                None => resp::null(out),
            }
        }
        (b"GETDEL" | b"OBJECT", _) if !context.edition.second => return Ok(false),
        _ => return Err(Refusal::Arity),
    }
    Ok(true)
}

fn other_command(
    context: &mut Context<'_>,
    name: &[u8],
    arguments: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<bool, Refusal> {
    match (name, arguments) {
        (b"PING", []) => resp::simple(out, "PONG"),
        (b"PING" | b"ECHO", [text]) => resp::bulk(out, text),
        (b"SELECT", [b"0"]) => resp::simple(out, "OK"),
        (b"SELECT", [index]) => {
            parse_integer(index)?;
            resp::error(out, "ERR DB index is out of range");
        }
        (b"DBSIZE", []) => resp::integer(out, context.sessions.len(context.store) as i64),
        (b"INFO", [] | [_]) => resp::bulk(out, info(context).as_bytes()),
        // redis-cli asks for its help, redis-benchmark for two settings; neither needs an answer with content.
        (b"COMMAND", [sub, ..]) if sub.eq_ignore_ascii_case(b"COUNT") => resp::integer(out, 20),
        (b"COMMAND", _) => resp::array(out, 0),
        (b"CONFIG", [sub, name]) if sub.eq_ignore_ascii_case(b"GET") => {
            resp::array(out, 2);
            resp::bulk(out, name);
            resp::bulk(out, b"");
        }
        (b"CONFIG", [sub, ..]) => {
            return Err(Refusal::UnknownSubcommand(String::from_utf8_lossy(sub).into_owned()));
        }
        (b"CLIENT", [sub, ..]) if sub.eq_ignore_ascii_case(b"SETNAME") || sub.eq_ignore_ascii_case(b"SETINFO") => {
            resp::simple(out, "OK");
        }
        (b"PING" | b"ECHO" | b"SELECT" | b"DBSIZE" | b"INFO" | b"CONFIG", _) => return Err(Refusal::Arity),
        // HELLO is unknown here, as it is to Redis before version 6: clients fall back to version 2 of the protocol.
        _ => return Ok(false),
    }
    Ok(true)
}

/// The value of a key that has not expired; removes it when it has.
fn live<'a>(context: &'a mut Context<'_>, key: &[u8]) -> Result<Option<&'a ArchivedSession>, LogError> {
    if context.sessions.get(context.store, key).is_some_and(|session| session.is_expired(context.now_ms)) {
        context.sessions.remove(context.store, key)?;
    }
    Ok(context.sessions.get(context.store, key))
}

fn put(context: &mut Context<'_>, key: &[u8], data: Vec<u8>, expires_at_ms: u64) -> Result<(), LogError> {
    let tail = if context.edition.second { Session::tail_of(context.now_ms) } else { Vec::new() };
    context.sessions.insert(context.store, key, &Session { data, expires_at_ms, tail }).map(drop)
}

fn parse_integer(text: &[u8]) -> Result<i64, Refusal> {
    let text = std::str::from_utf8(text).map_err(|_| Refusal::NotAnInteger)?;
    // Rust's parser accepts a plus sign, Redis does not.
    if text.starts_with('+') {
        return Err(Refusal::NotAnInteger);
    }
    text.parse().map_err(|_| Refusal::NotAnInteger)
}

/// `amount` units of `unit_ms` from now, as Unix ms.
fn deadline(context: &Context<'_>, amount: i64, unit_ms: i64) -> Option<u64> {
    amount.checked_mul(unit_ms)?.checked_add(i64::try_from(context.now_ms).ok()?).and_then(|at| u64::try_from(at).ok())
}

fn set(
    context: &mut Context<'_>,
    key: &[u8],
    value: &[u8],
    options: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let mut expires_at_ms = None;
    let (mut only_new, mut only_old, mut keep) = (false, false, false);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.to_ascii_uppercase().as_slice() {
            unit @ (b"EX" | b"PX") if expires_at_ms.is_none() && !keep => {
                let amount = parse_integer(options.next().ok_or(Refusal::Syntax)?)?;
                let unit_ms = if unit == b"EX" { 1000 } else { 1 };
                let at = (amount > 0).then(|| deadline(context, amount, unit_ms)).flatten();
                expires_at_ms = Some(at.ok_or(Refusal::InvalidExpiry)?);
            }
            b"NX" if !only_old => only_new = true,
            b"XX" if !only_new => only_old = true,
            b"KEEPTTL" if expires_at_ms.is_none() => keep = true,
            _ => return Err(Refusal::Syntax),
        }
    }
    let before = live(context, key)?.map(|session| session.expires_at_ms.to_native());
    if (only_new && before.is_some()) || (only_old && before.is_none()) {
        resp::null(out);
        return Ok(());
    }
    let kept = if keep { before.unwrap_or(0) } else { 0 };
    put(context, key, value.to_vec(), expires_at_ms.unwrap_or(kept))?;
    resp::simple(out, "OK");
    Ok(())
}

fn expire(
    context: &mut Context<'_>,
    key: &[u8],
    amount: &[u8],
    unit_ms: i64,
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let amount = parse_integer(amount)?;
    let at = deadline(context, amount, unit_ms);
    if amount > 0 && at.is_none() {
        return Err(Refusal::InvalidExpiry);
    }
    let Some(session) = live(context, key)? else {
        resp::integer(out, 0);
        return Ok(());
    };
    // The tail goes along, known or not: expiry is no change of the data.
    let (data, tail) = (session.data.to_vec(), session.tail.to_vec());
    match at.filter(|_| amount > 0) {
        Some(expires_at_ms) => {
            context.sessions.insert(context.store, key, &Session { data, expires_at_ms, tail })?;
        }
        None => drop(context.sessions.remove(context.store, key)?),
    }
    resp::integer(out, 1);
    Ok(())
}

fn time_to_live(context: &mut Context<'_>, key: &[u8], unit_ms: u64, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let now_ms = context.now_ms;
    let left = match live(context, key)?.map(|session| session.expires_at_ms.to_native()) {
        None => -2,
        Some(0) => -1,
        // Rounded as Redis does.
        Some(at) => i64::try_from((at.saturating_sub(now_ms) + unit_ms / 2) / unit_ms).unwrap_or(i64::MAX),
    };
    resp::integer(out, left);
    Ok(())
}

fn info(context: &Context<'_>) -> String {
    let about = context.about;
    let state = context.store.statistics();
    format!(
        "# Server\r\nredis_version:6.0.0\r\nsession_store_version:{}\r\nprocess_id:{}\r\nuptime_in_seconds:{}\r\n\
         # Clients\r\nconnected_clients:{}\r\n# Stats\r\ntotal_commands_processed:{}\r\n\
         # Warmswap\r\ngeneration:{}\r\nstate_living_bytes:{}\r\nstate_segment_bytes:{}\r\nstate_segments:{}\r\n\
         state_copied_bytes:{}\r\nstate_segments_retired:{}\r\n# Keyspace\r\ndb0:keys={}\r\n",
        context.edition.version,
        std::process::id(),
        about.uptime_s,
        about.connections,
        about.commands_processed,
        about.generation,
        state.living_bytes,
        state.segment_bytes,
        state.segments,
        state.copied_bytes,
        state.segments_retired,
        context.sessions.len(context.store),
    )
}
