//! A terminal for programs that draw: a pseudo terminal, and what would be seen on it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{Termios, tcgetattr};

use crate::wait::within;

/// How soon a reader notices that it is to end.
const READ_PATIENCE_MS: u8 = 50;

/// A program on a terminal of its own. Dropping it kills the program.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    /// `None` once it is hung up.
    keys: Option<File>,
    hung_up: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    /// Held open, so that the terminal outlives the program and can be looked at.
    inside: OwnedFd,
    before: Termios,
    seen: Arc<Mutex<Picture>>,
}

impl Terminal {
    /// # Errors
    /// When there is no pseudo terminal, or the program cannot be started.
    pub fn start(mut command: Command, width: u16, height: u16) -> Result<Self> {
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(&size, None).context("cannot make a pseudo terminal")?;
        // A program that held the other end of its own terminal would never be hung up.
        for end in [&master, &slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let before = tcgetattr(&slave)?;
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave.try_clone()?);
        command.env("TERM", "xterm-256color");
        // SAFETY: only system calls between fork and exec; descriptor 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let child = command.spawn().context("cannot start a program on a terminal")?;
        let seen = Arc::new(Mutex::new(Picture::new(width.into(), height.into())));
        let keys = File::from(master);
        let (mut output, drawn) = (keys.try_clone()?, Arc::clone(&seen));
        let hung_up = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&hung_up);
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while !until.load(Ordering::Acquire) {
                let mut wanted = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
                if !matches!(poll(&mut wanted, READ_PATIENCE_MS), Ok(1..)) {
                    continue;
                }
                let Ok(count @ 1..) = output.read(&mut bytes) else { return };
                drawn.lock().unwrap_or_else(PoisonError::into_inner).take(&bytes[..count]);
            }
        });
        Ok(Self { child, keys: Some(keys), hung_up, reader: Some(reader), inside: slave, before, seen })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What is on the screen, line by line, without blanks at the ends.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).lines()
    }

    /// Whether the program shows another screen than the shell's, or hides the cursor.
    #[must_use]
    pub fn taken(&self) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.other || !seen.cursor
    }

    /// # Errors
    /// When the terminal is gone.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        let terminal = self.keys.as_mut().context("the terminal was hung up")?;
        terminal.write_all(keys.as_bytes()).context("cannot press a key")
    }

    /// Takes the terminal away, as a line that breaks does.
    pub fn hang_up(&mut self) {
        self.hung_up.store(true, Ordering::Release);
        if let Some(reader) = self.reader.take() {
            // A reader that panicked has said so.
            let _ = reader.join();
        }
        self.keys = None;
    }

    /// How the program ended; `None` when it does not within `patience`.
    #[must_use]
    pub fn ended(&mut self, patience: Duration) -> Option<ExitStatus> {
        within(patience, || self.child.try_wait().ok().flatten())
    }

    /// Whether the terminal reads and shows keys as before.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn as_before(&self) -> Result<bool> {
        Ok(tcgetattr(&self.inside)? == self.before)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Fails when it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.hang_up();
    }
}

/// As much of a terminal as full-screen programs need: moving, clearing, text.
#[derive(Debug)]
struct Picture {
    cells: Vec<Vec<char>>,
    at: (usize, usize),
    /// Not the shell's screen.
    other: bool,
    cursor: bool,
    /// Bytes of a sequence or a character whose end has not come yet.
    rest: Vec<u8>,
}

impl Picture {
    fn new(width: usize, height: usize) -> Self {
        Self { cells: vec![vec![' '; width]; height], at: (0, 0), other: false, cursor: true, rest: Vec::new() }
    }

    fn lines(&self) -> Vec<String> {
        self.cells.iter().map(|line| line.iter().collect::<String>().trim_end().to_owned()).collect()
    }

    fn take(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        let rest = std::mem::take(&mut self.rest);
        let whole = match std::str::from_utf8(&rest) {
            Ok(text) => text.len(),
            Err(error) => error.valid_up_to(),
        };
        let text = String::from_utf8_lossy(&rest[..whole]).into_owned();
        let mut left = text.as_str();
        while let Some(first) = left.chars().next() {
            if first != '\x1b' {
                self.put(first);
                left = &left[first.len_utf8()..];
                continue;
            }
            let Some(body) = left.strip_prefix("\x1b[") else {
                // A sequence that has only begun, or one that is none of ours.
                if left.len() == 1 {
                    break;
                }
                left = &left[1..];
                continue;
            };
            let Some(end) = body.find(|c: char| c.is_ascii_alphabetic()) else { break };
            self.obey(&body[..end], &body[end..=end]);
            left = &body[end + 1..];
        }
        self.rest = left.as_bytes().to_vec();
        self.rest.extend_from_slice(&rest[whole..]);
    }

    fn put(&mut self, character: char) {
        let (x, y) = self.at;
        match character {
            '\r' => self.at.0 = 0,
            '\n' => self.at.1 += 1,
            _ => {
                if let Some(cell) = self.cells.get_mut(y).and_then(|line| line.get_mut(x)) {
                    *cell = character;
                }
                self.at.0 += 1;
            }
        }
    }

    fn obey(&mut self, parameters: &str, command: &str) {
        let number = |at: usize| parameters.split(';').nth(at).and_then(|text| text.parse::<usize>().ok()).unwrap_or(1);
        match (command, parameters) {
            ("H", _) => self.at = (number(1).saturating_sub(1), number(0).saturating_sub(1)),
            ("J", "2") => self.cells.iter_mut().for_each(|line| line.fill(' ')),
            ("h", "?1049") => self.other = true,
            ("l", "?1049") => self.other = false,
            ("h", "?25") => self.cursor = true,
            ("l", "?25") => self.cursor = false,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_what_a_terminal_would_show_however_the_bytes_come() {
        let text = "\x1b[?1049h\x1b[2J\x1b[?25l\x1b[2;3H\x1b[0;31må▁x\x1b[1;1Htop\x1b[0m";
        for size in 1..8 {
            let mut picture = Picture::new(6, 2);
            text.as_bytes().chunks(size).for_each(|bytes| picture.take(bytes));
            assert_eq!(picture.lines(), ["top", "  å▁x"], "in pieces of {size}");
            assert!(picture.other && !picture.cursor);
        }
    }

    #[test]
    fn a_program_draws_reads_keys_and_ends() {
        let mut command = Command::new("sh");
        command.args(["-c", "stty raw -echo; printf '\\033[2;2Hready'; head -c 1; exit 3"]);
        let mut terminal = Terminal::start(command, 20, 3).unwrap();
        assert!(within(Duration::from_secs(20), || (terminal.lines()[1] == " ready").then_some(())).is_some());
        terminal.press("k").unwrap();
        assert_eq!(terminal.ended(Duration::from_secs(20)).and_then(|status| status.code()), Some(3));
        assert!(!terminal.as_before().unwrap(), "it was left raw");
    }
}
