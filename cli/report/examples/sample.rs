//! Writes a report of a made-up run, to look at: `cargo run -p warmswap-report --example sample > report.html`.

#[path = "../tests/sample/mod.rs"]
mod sample;

fn main() {
    print!("{}", warmswap_report::render(&sample::sample()));
}
