//! The terminal as a drawing surface, and how it is given back: at the end, after a panic, after an error.
//!
//! ratatui's own back end over crossterm is not used: it wants features of crossterm that change what burn is compiled
//! with. What is drawn here needs little: cells, sixteen colours, three attributes.

use std::io::{self, Stdout, Write};

use crossterm::terminal::{disable_raw_mode, enable_raw_mode};
use ratatui::backend::{Backend, ClearType, WindowSize};
use ratatui::buffer::Cell;
use ratatui::layout::{Position, Size};
use ratatui::style::{Color, Modifier};

/// Another screen, so that the shell's comes back as it was; no cursor; no wrapping at the right edge.
const ENTER: &str = "\x1b[?1049h\x1b[2J\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l";
/// A frame appears at once where the terminal knows how; others ignore it.
const FRAME_BEGINS: &[u8] = b"\x1b[?2026h";
const FRAME_ENDS: &[u8] = b"\x1b[?2026l";

/// The terminal is ours as long as this lives.
pub(super) struct Taken;

impl Taken {
    /// # Errors
    /// When there is no terminal to read keys from.
    pub(super) fn take() -> io::Result<Self> {
        enable_raw_mode()?;
        let taken = Self;
        let mut out = io::stdout();
        out.write_all(ENTER.as_bytes())?;
        out.flush()?;
        let ours = std::thread::current().id();
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // Before its message, which would go with the other screen.
            if std::thread::current().id() == ours {
                give_back();
            }
            before(panic);
        }));
        Ok(taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        give_back();
    }
}

/// May be done twice. Whether it works cannot be told to anybody.
fn give_back() {
    let mut out = io::stdout();
    let _ = out.write_all(LEAVE.as_bytes());
    let _ = out.flush();
    let _ = disable_raw_mode();
}

/// A frame is put together here and written in one piece.
pub(super) struct Screen {
    out: Stdout,
    frame: Vec<u8>,
    colour: bool,
    cursor: Position,
}

impl Screen {
    pub(super) fn new(colour: bool) -> Self {
        Self { out: io::stdout(), frame: Vec::new(), colour, cursor: Position::ORIGIN }
    }

    fn say(&mut self, text: &str) {
        self.frame.extend_from_slice(text.as_bytes());
    }
}

impl Backend for Screen {
    type Error = io::Error;

    fn draw<'a, I>(&mut self, content: I) -> io::Result<()>
    where
        I: Iterator<Item = (u16, u16, &'a Cell)>,
    {
        let mut at = None;
        let mut style = None;
        for (x, y, cell) in content {
            if at != Some((x, y)) {
                self.say(&format!("\x1b[{};{}H", y + 1, x + 1));
            }
            let wanted = sgr(cell, self.colour);
            if style.as_ref() != Some(&wanted) {
                self.say(&wanted);
                style = Some(wanted);
            }
            self.say(cell.symbol());
            // Two cells wide: the cursor is not where the next cell is, or it is moved anyway.
            at = cell.symbol().is_ascii().then(|| (x + 1, y));
        }
        self.say("\x1b[0m");
        Ok(())
    }

    fn hide_cursor(&mut self) -> io::Result<()> {
        self.say("\x1b[?25l");
        Ok(())
    }

    fn show_cursor(&mut self) -> io::Result<()> {
        self.say("\x1b[?25h");
        Ok(())
    }

    fn get_cursor_position(&mut self) -> io::Result<Position> {
        Ok(self.cursor)
    }

    fn set_cursor_position<P: Into<Position>>(&mut self, position: P) -> io::Result<()> {
        self.cursor = position.into();
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.clear_region(ClearType::All)
    }

    fn clear_region(&mut self, kind: ClearType) -> io::Result<()> {
        self.say(match kind {
            ClearType::All => "\x1b[2J",
            ClearType::AfterCursor => "\x1b[J",
            ClearType::BeforeCursor => "\x1b[1J",
            ClearType::CurrentLine => "\x1b[2K",
            ClearType::UntilNewLine => "\x1b[K",
        });
        Ok(())
    }

    fn size(&self) -> io::Result<Size> {
        let (width, height) = crossterm::terminal::size()?;
        Ok(Size { width, height })
    }

    fn window_size(&mut self) -> io::Result<WindowSize> {
        Ok(WindowSize { columns_rows: self.size()?, pixels: Size { width: 0, height: 0 } })
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.frame.is_empty() {
            self.out.write_all(&[FRAME_BEGINS, &self.frame, FRAME_ENDS].concat())?;
            self.frame.clear();
        }
        self.out.flush()
    }
}

/// Select Graphic Rendition for a cell, from scratch.
fn sgr(cell: &Cell, colour: bool) -> String {
    let mut codes = String::from("\x1b[0");
    for (modifier, code) in [(Modifier::BOLD, ";1"), (Modifier::DIM, ";2"), (Modifier::REVERSED, ";7")] {
        if cell.modifier.contains(modifier) {
            codes.push_str(code);
        }
    }
    if colour {
        codes.extend(number(cell.fg).map(|number| format!(";{}", 30 + number)));
        codes.extend(number(cell.bg).map(|number| format!(";{}", 40 + number)));
    }
    codes.push('m');
    codes
}

/// 0 to 7; the brighter eight come 60 later. Other colours are not used, and not shown.
fn number(colour: Color) -> Option<u8> {
    const PLAIN: [Color; 8] =
        [Color::Black, Color::Red, Color::Green, Color::Yellow, Color::Blue, Color::Magenta, Color::Cyan, Color::Gray];
    let plain = PLAIN.iter().position(|plain| *plain == colour).and_then(|at| u8::try_from(at).ok());
    plain.or((colour == Color::DarkGray).then_some(60))
}

#[cfg(test)]
mod tests {
    use ratatui::style::Style;

    use super::*;

    #[test]
    fn colours_are_left_out_when_they_are_not_wanted_and_attributes_are_not() {
        let mut cell = Cell::new("x");
        cell.set_style(
            Style::new().fg(Color::Red).bg(Color::DarkGray).add_modifier(Modifier::REVERSED | Modifier::BOLD),
        );
        assert_eq!(sgr(&cell, true), "\x1b[0;1;7;31;100m");
        assert_eq!(sgr(&cell, false), "\x1b[0;1;7m");
        assert_eq!(sgr(&Cell::new("x"), true), "\x1b[0m");
    }

    #[test]
    fn neighbours_are_written_without_moving_the_cursor() {
        let mut screen = Screen::new(false);
        let (a, wide, b) = (Cell::new("a"), Cell::new("█"), Cell::new("b"));
        screen.draw([(3, 1, &a), (4, 1, &wide), (5, 1, &b), (0, 2, &a)].into_iter()).expect("drawn");
        let text = String::from_utf8(screen.frame.clone()).expect("text");
        assert_eq!(text, "\x1b[2;4H\x1b[0ma█\x1b[2;6Hb\x1b[3;1Ha\x1b[0m");
    }
}
