//! Clients of the example `scoreboard` that check what was acknowledged.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// Lines that are sent before their answers are read.
const PIPELINE: usize = 16;

/// One connection.
#[derive(Debug)]
pub struct BoardClient(BufReader<TcpStream>);

impl BoardClient {
    /// # Errors
    /// When the connection is refused.
    pub fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).context("cannot connect")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn send(&mut self, line: &str) -> Result<()> {
        self.0.get_mut().write_all(line.as_bytes()).context("cannot send a line")
    }

    fn answer(&mut self) -> Result<String> {
        let mut answer = String::new();
        let len = self.0.read_line(&mut answer).context("no answer")?;
        ensure!(len > 0, "the connection was closed");
        Ok(answer.trim_end().to_owned())
    }

    /// # Errors
    /// When the connection ends.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        self.send(&format!("{line}\n"))?;
        self.answer()
    }

    /// `count` scores with notes of `note_len` bytes.
    ///
    /// # Errors
    /// When one is not acknowledged.
    pub fn fill(&mut self, count: usize, note_len: usize) -> Result<()> {
        let note = "n".repeat(note_len);
        let all: Vec<usize> = (0..count).collect();
        for some in all.chunks(PIPELINE) {
            for n in some {
                self.send(&format!("SET filler:{n} {n} {note}\n"))?;
            }
            for n in some {
                let answer = self.answer()?;
                ensure!(answer == "OK", "SET filler:{n}: {answer}");
            }
        }
        Ok(())
    }

    /// # Errors
    /// When one is not as it was filled in.
    pub fn check_fill(&mut self, count: usize, note_len: usize) -> Result<()> {
        let note = "n".repeat(note_len);
        for n in 0..count {
            let answer = self.ask(&format!("GET filler:{n}"))?;
            ensure!(answer == format!("{n} {note}"), "GET filler:{n}: {} bytes", answer.len());
        }
        Ok(())
    }
}

/// What a writer saw.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    pub acknowledged: u64,
    pub longest_gap: Duration,
}

/// Counts up over one connection until `stop`, each score against the last one that was acknowledged; then reads all
/// its scores again. `name` is its own.
///
/// # Errors
/// When an answer is not what it must be, or the connection ends: a lost write, or a failed request.
pub fn write_and_check(address: SocketAddr, name: &str, stop: &AtomicBool) -> Result<Written> {
    const NAMES: u64 = 50;
    let mut client = BoardClient::connect(address)?;
    let mut written = Written { acknowledged: 0, longest_gap: Duration::ZERO };
    while !stop.load(Ordering::Acquire) {
        let turn = written.acknowledged;
        let (which, expected) = (turn % NAMES, turn / NAMES + 1);
        let asked = Instant::now();
        let answer = client.ask(&format!("ADD {name}:{which} 1 of-{name}"))?;
        written.longest_gap = written.longest_gap.max(asked.elapsed());
        ensure!(answer == expected.to_string(), "ADD {name}:{which} gave {answer:?} instead of {expected}");
        written.acknowledged += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    for which in 0..NAMES.min(written.acknowledged) {
        let expected = (written.acknowledged - which).div_ceil(NAMES);
        let answer = client.ask(&format!("GET {name}:{which}"))?;
        ensure!(answer == format!("{expected} of-{name}"), "GET {name}:{which} gave {answer:?} instead of {expected}");
    }
    Ok(written)
}
