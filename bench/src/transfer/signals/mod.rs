//! Ways to tell another process something: there and back, one signal at a time.
//!
//! Two kinds that must not be mixed up: the one that is told sleeps and is woken, or it looks again and again. Waking costs a
//! scheduler's time, looking costs a CPU.

mod channel;
mod futex;
#[cfg(feature = "iceoryx2")]
mod iceoryx;
mod word;

use anyhow::{Result, bail};
use warmswap_load::monotonic_ns;
use warmswap_transfer::channel::{ServiceChannel, SupervisorChannel};

use super::line::{Answer, Command, Line, Signal};

pub(super) const ICEORYX_EVENT: &str = "iceoryx2 event";
pub(super) const ICEORYX_SAMPLE: &str = "iceoryx2 publish and subscribe";
pub(super) const FUTEX: &str = "futex";

/// Its forty packages are compiled only for who wants to see it.
pub(super) const WITHOUT_ICEORYX: &str = "this program is built without it: \
    `cargo build --release -p warmswap-bench --features iceoryx2` builds it with it";

/// Of one round trip each, µs.
pub(super) fn measure(
    signal: &Signal,
    count: u32,
    channel: &mut SupervisorChannel,
    line: &mut Line,
) -> Result<Vec<f64>> {
    let times = match signal {
        Signal::Channel => channel::ping(count, channel, line),
        Signal::Word => word::ping(count, channel, line),
        Signal::Futex => futex::ping(count, channel, line),
        #[cfg(feature = "iceoryx2")]
        Signal::IceoryxEvent { folder } => iceoryx::ping_event(folder, count, line),
        #[cfg(feature = "iceoryx2")]
        Signal::IceoryxSample { folder } => iceoryx::ping_sample(folder, count, line),
        #[cfg(not(feature = "iceoryx2"))]
        Signal::IceoryxEvent { .. } | Signal::IceoryxSample { .. } => bail!(WITHOUT_ICEORYX),
    }?;
    match line.hear()? {
        Answer::Echoed => Ok(times),
        Answer::Failed { what } => bail!("the receiver failed: {what}"),
        other => bail!("the receiver said {other:?} after {count} signals"),
    }
}

/// The other side.
pub(super) fn echo(signal: &Signal, count: u32, channel: &mut ServiceChannel, line: &mut Line) -> Result<()> {
    match signal {
        Signal::Channel => channel::echo(count, channel, line),
        Signal::Word => word::echo(count, channel, line),
        Signal::Futex => futex::echo(count, channel, line),
        #[cfg(feature = "iceoryx2")]
        Signal::IceoryxEvent { folder } => iceoryx::echo_event(folder, count, line),
        #[cfg(feature = "iceoryx2")]
        Signal::IceoryxSample { folder } => iceoryx::echo_sample(folder, count, line),
        #[cfg(not(feature = "iceoryx2"))]
        Signal::IceoryxEvent { .. } | Signal::IceoryxSample { .. } => bail!(WITHOUT_ICEORYX),
    }
}

/// Asks the receiver to answer `count` signals, and waits until it can.
fn begin(signal: Signal, count: u32, line: &mut Line) -> Result<()> {
    line.tell(&Command::Echo { signal, count })
}

/// Calls `there_and_back` with 1 to `count`; how long each call took, µs.
fn timed(count: u32, mut there_and_back: impl FnMut(u32) -> Result<()>) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(count as usize);
    for round in 1..=count {
        let began = monotonic_ns();
        there_and_back(round)?;
        times.push((monotonic_ns() - began) as f64 / 1e3);
    }
    Ok(times)
}

/// Looks again and again. Gives up the CPU now and then, because with all of them busy the other process may need it.
fn look_until(mut there: impl FnMut() -> Result<bool>) -> Result<()> {
    const LOOKS_PER_YIELD: u32 = 200;
    const GIVE_UP_NS: u64 = 20_000_000_000;
    let mut began = None;
    loop {
        for _ in 0..LOOKS_PER_YIELD {
            if there()? {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        std::thread::yield_now();
        let now = monotonic_ns();
        if now - *began.get_or_insert(now) > GIVE_UP_NS {
            bail!("no signal for {} s", GIVE_UP_NS / 1_000_000_000);
        }
    }
}
