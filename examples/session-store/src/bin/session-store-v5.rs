//! Version 5 of the example store.

fn main() -> anyhow::Result<()> {
    session_store::run(session_store::Edition::V5)
}
