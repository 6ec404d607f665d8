//! Understands what the machine's first program says on the console. See `init.sh` for the other side.

use std::collections::BTreeMap;
use std::time::Duration;

/// One command's way through the machine.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct CommandOutcome {
    /// As the shell gives it; 128 + n after signal n.
    pub(crate) status: Option<i32>,
    pub(crate) lines: Vec<String>,
    /// By the host's clock.
    pub(crate) time: Duration,
}

#[derive(Debug)]
pub(super) struct Console {
    word: String,
    pub(super) release: Option<String>,
    pub(super) done: bool,
    current: Option<usize>,
    pub(super) commands: BTreeMap<usize, CommandOutcome>,
    /// What was said outside any command: the kernel, the first program.
    pub(super) other: Vec<String>,
}

/// What a line was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Begin(usize),
    End(usize),
    Control,
    Output,
    Other,
}

impl Console {
    pub(super) fn new(word: String) -> Self {
        Self { word, release: None, done: false, current: None, commands: BTreeMap::new(), other: Vec::new() }
    }

    pub(super) fn line(&mut self, line: &str) -> Heard {
        if let Some((_, message)) = line.split_once(&self.word) {
            let words: Vec<&str> = message.split_whitespace().collect();
            match words.as_slice() {
                ["up", release] => self.release = Some((*release).to_owned()),
                ["begin", number] => {
                    self.current = number.parse().ok();
                    if let Some(number) = self.current {
                        self.commands.insert(number, CommandOutcome::default());
                        return Heard::Begin(number);
                    }
                }
                ["end", number, status] => {
                    if let Some(command) = number.parse().ok().and_then(|n: usize| self.commands.get_mut(&n)) {
                        command.status = status.parse().ok();
                        // The line break before each message, in case the command did not end its last line.
                        while command.lines.last().is_some_and(|line| line.is_empty()) {
                            command.lines.pop();
                        }
                    }
                    if let Some(number) = self.current.take() {
                        return Heard::End(number);
                    }
                }
                ["done"] => self.done = true,
                _ => self.other.push(line.to_owned()),
            }
            return Heard::Control;
        }
        if let Some(command) = self.current.and_then(|number| self.commands.get_mut(&number)) {
            command.lines.push(line.to_owned());
            return Heard::Output;
        }
        self.other.push(line.to_owned());
        Heard::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_told_from_what_the_machine_says() {
        let mut console = Console::new("Xyz".to_owned());
        let said = "boot\nXyz up 6.1.0\n\nXyz begin 0\nhello\nend 0 0\nno newline\nXyz end 0 3\n\nXyz begin 1\nlast";
        for line in said.lines() {
            console.line(line);
        }
        assert_eq!(console.release.as_deref(), Some("6.1.0"));
        let first = &console.commands[&0];
        assert_eq!((first.status, first.lines.join("|").as_str()), (Some(3), "hello|end 0 0|no newline"));
        // Cut off: no status, not done.
        assert_eq!((console.commands[&1].status, console.done), (None, false));
        console.line("Xyz done");
        assert!(console.done);
    }
}
