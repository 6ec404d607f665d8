//! Handovers for people: a text table for the terminal ([`text_table`]) and one HTML file that opens without a network
//! ([`render`]).
//!
//! Everything shown is in [`ReportInput`], which can be kept as JSON and rendered again. Charts are inline SVG of our own
//! (two hundred lines; a chart library would bring more code than it saves and less control over the look), drawn once
//! for wide and once for narrow screens, in colours that follow the reader's light or dark setting. No script.
//!
//! Not here: measuring, reading files, asking the machine what it is.

mod charts;
mod format;
mod input;
mod page;
mod svg;
mod table;
mod timeline;

pub use format::{bytes, count, duration_us, utc};
pub use input::{
    ClientLoad, ClientView, ForecastPoint, ForecastSeries, HandoverView, LatencyPoint, Machine, ReportInput,
};
pub use page::render;
pub use table::text_table;
