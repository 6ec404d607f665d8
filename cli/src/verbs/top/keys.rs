//! Keys, from the bytes of a terminal. crossterm's reader is not used: when a terminal is hung up, it reads nothing without
//! end and takes a whole CPU for it (0.29).

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context as _, Result};
use warmswap_model::Resource;

use super::feed::Told;
use super::state::{Command, Sort};

/// After an Esc that stands alone. The rest of what a key sends comes sooner, also over a slow line.
pub(super) const ESC_TIME: Duration = Duration::from_millis(100);
/// No key sends more.
const SEQUENCE_MAX: usize = 32;
/// SIGHUP.
const HANGUP: u8 = 1;

/// Passes bytes on until the terminal is gone, and then says so as the kernel would.
///
/// # Errors
/// When there is no terminal to read from.
pub(super) fn listen(sender: Sender<Told>) -> Result<()> {
    let stdin = io::stdin();
    let mut terminal = match stdin.is_terminal() {
        true => File::from(stdin.as_fd().try_clone_to_owned()?),
        false => File::open("/dev/tty").context("there is no terminal to read keys from")?,
    };
    let read = move || {
        let mut bytes = [0; 64];
        loop {
            let told = match terminal.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => Told::Signal(HANGUP),
                Ok(count) => Told::Pressed(bytes[..count].to_vec()),
            };
            let gone = matches!(told, Told::Signal(_));
            if sender.send(told).is_err() || gone {
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".into()).spawn(read).context("cannot start a thread")?;
    Ok(())
}

/// Takes whole keys from the front; `over`: nothing more has come for [`ESC_TIME`].
pub(super) fn commands(pending: &mut Vec<u8>, over: bool) -> Vec<Command> {
    let mut commands = Vec::new();
    while let Some(first) = pending.first().copied() {
        let (taken, command) = match (first, pending.get(1)) {
            (0x1b, Some(b'[' | b'O')) => {
                let end = pending.iter().skip(2).position(|byte| (0x40..=0x7e).contains(byte)).map(|at| at + 2);
                match end {
                    Some(end) => (end + 1, sequence(&pending[2..=end])),
                    None if over || pending.len() > SEQUENCE_MAX => (pending.len(), None),
                    None => break,
                }
            }
            (0x1b, None) if !over => break,
            (0x1b, _) => (1, Some(Command::Close)),
            _ => (1, key(first)),
        };
        pending.drain(..taken);
        commands.extend(command);
    }
    commands
}

fn key(byte: u8) -> Option<Command> {
    Some(match byte {
        // In raw mode Ctrl-C is a key like any other.
        0x03 | b'q' => Command::Quit,
        b'?' | b'h' => Command::Help,
        b'c' => Command::Sort(Sort::Usage(Resource::Cpu)),
        b'm' => Command::Sort(Sort::Usage(Resource::Memory)),
        b'n' => Command::Sort(Sort::Usage(Resource::Network)),
        b'd' => Command::Sort(Sort::Usage(Resource::Disk)),
        b'i' => Command::Sort(Sort::Input),
        b'l' => Command::Sort(Sort::Launches),
        b'k' => Command::Move(-1),
        b'j' => Command::Move(1),
        _ => return None,
    })
}

/// What follows `ESC [` or `ESC O`.
fn sequence(bytes: &[u8]) -> Option<Command> {
    Some(match bytes {
        b"A" => Command::Move(-1),
        b"B" => Command::Move(1),
        b"5~" => Command::Move(-10),
        b"6~" => Command::Move(10),
        b"H" | b"1~" | b"7~" => Command::Move(isize::MIN),
        b"F" | b"4~" | b"8~" => Command::Move(isize::MAX),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_understood_however_their_bytes_come() {
        let text = b"c\x1b[A\x1bOB\x1b[5~\x1b[1;5C\xc3\xa4q";
        let all = [
            Command::Sort(Sort::Usage(Resource::Cpu)),
            Command::Move(-1),
            Command::Move(1),
            Command::Move(-10),
            Command::Quit,
        ];
        for size in 1..=text.len() {
            let (mut pending, mut got) = (Vec::new(), Vec::new());
            for bytes in text.chunks(size) {
                pending.extend_from_slice(bytes);
                got.extend(commands(&mut pending, false));
            }
            assert_eq!((got.as_slice(), pending.len()), (all.as_slice(), 0), "in pieces of {size}");
        }
    }

    #[test]
    fn esc_is_a_key_once_nothing_follows() {
        let mut pending = b"\x1b".to_vec();
        assert_eq!((commands(&mut pending, false), pending.len()), (Vec::new(), 1));
        assert_eq!((commands(&mut pending, true), pending.len()), (vec![Command::Close], 0));
        pending = b"\x1b\x1b".to_vec();
        assert_eq!(commands(&mut pending, true), [Command::Close, Command::Close]);
        pending = b"\x1b[1".to_vec();
        assert_eq!((commands(&mut pending, false), pending.len()), (Vec::new(), 3));
        assert_eq!((commands(&mut pending, true), pending.len()), (Vec::new(), 0));
        pending = [b"\x1b[".as_slice(), &[b'0'; 100]].concat();
        assert_eq!((commands(&mut pending, false), pending.len()), (Vec::new(), 0), "no key is that long");
    }
}
