//! From the kernel's time stamp of an urgent event to the moment that somebody has it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::json;
use warmswap_load::monotonic_ns;
use warmswap_sensor::{Mark, Sensor, SensorConfig, Taken};

use super::Ground;
use super::jobs::HANDOVER;
use super::worker::{Task, Worker};
use crate::hogs::Hogs;
use crate::interrupt;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::quantile;

const P50: &str = "probes.urgent_p50_us";
const P99: &str = "probes.urgent_p99_us";
const P99_HOGS: &str = "probes.urgent_p99_us_hogs";
const TARGET_US: f64 = 20.0;

const HOGS: usize = 2;
const PAUSE: Duration = Duration::from_millis(1);
const MARKS_QUICK: u32 = 400;
const MARKS_WHOLE: u32 = 5000;
const LAST_MARK_TIME_MAX: Duration = Duration::from_secs(5);

/// How the receiver runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Receiver {
    /// Called in the sensor's thread of the CPU, as whoever fills a queue is; the agent's queue, too.
    Called,
    /// Another thread of ordinary priority, which reads a queue.
    Ordinary,
    /// The same with the draining thread's priority.
    RealTime,
}

impl Receiver {
    const fn name(self) -> &'static str {
        match self {
            Self::Called => "called",
            Self::Ordinary => "ordinary thread",
            Self::RealTime => "real-time thread",
        }
    }
}

pub(super) fn run(ground: &Ground, quick: bool) -> Result<Vec<Row>> {
    let count = if quick { MARKS_QUICK } else { MARKS_WHOLE };
    let mut progress = Progress::begin("how long an urgent event takes");
    // Where the scheduler puts it.
    let mut worker = Worker::start(&ground.cgroup)?;
    let mut rows = Vec::new();
    for hogs in [0, HOGS] {
        let neighbours = Hogs::start(hogs)?;
        for receiver in [Receiver::Called, Receiver::Ordinary, Receiver::RealTime] {
            interrupt::check()?;
            rows.extend(measure(&mut worker, receiver, hogs, count)?);
            progress.at(format_args!("{hogs} hogs"));
        }
        drop(neighbours);
    }
    Ok(rows)
}

fn measure(worker: &mut Worker, receiver: Receiver, hogs: usize, count: u32) -> Result<Vec<Row>> {
    let mut sensor = Sensor::load(SensorConfig::default()).context("the sensor does not load")?;
    let (took_us, priority) = receive(&mut sensor, worker, receiver, count)?;
    let mut conditions = Conditions::new();
    conditions.insert("hogs".into(), json!(hogs));
    conditions.insert("receiver".into(), json!(receiver.name()));
    let note = match sensor.realtime() {
        Some(Ok(priority)) => format!("draining thread: SCHED_FIFO {priority}"),
        Some(Err(reason)) => format!("draining thread: ordinary ({reason})"),
        None => "the draining thread has not run".to_owned(),
    };
    let worst = format!("max {:.0} µs", quantile(&took_us, 1.0).unwrap_or(0.0));
    let note = [Some(note), priority, Some(worst)].into_iter().flatten().collect::<Vec<_>>().join("; ");
    let row =
        |id: &str, q| Row::new(id, quantile(&took_us, q), "µs", took_us.len(), &conditions).note(Some(note.clone()));
    let p99 = row(if hogs == 0 { P99 } else { P99_HOGS }, 0.99);
    // The claim is about the sensor; a thread that is woken adds what the scheduler takes for it.
    Ok(vec![row(P50, 0.5), if hogs > 0 && receiver == Receiver::Called { p99.at_most(TARGET_US) } else { p99 }])
}

/// How long each mark took, µs, and why the receiver did not run as it should.
fn receive(
    sensor: &mut Sensor,
    worker: &mut Worker,
    receiver: Receiver,
    count: u32,
) -> Result<(Vec<f64>, Option<String>)> {
    if receiver == Receiver::Called {
        let took_us = Arc::new(Mutex::new(Vec::with_capacity(count as usize)));
        let taken = Arc::clone(&took_us);
        sensor.on_marks(move |mark| {
            note(&mut taken.lock().unwrap_or_else(PoisonError::into_inner), &mark);
            Taken::Yes
        })?;
        worker.work(&Task::Marks { count, pause: PAUSE })?;
        sensor.flush()?;
        let took_us = std::mem::take(&mut *took_us.lock().unwrap_or_else(PoisonError::into_inner));
        ensure!(took_us.len() == count as usize, "{} of {count} marks came", took_us.len());
        return Ok((took_us, None));
    }
    let marks = sensor.marks()?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        let refused = if receiver == Receiver::RealTime { become_realtime().err() } else { None };
        let mut took_us = Vec::with_capacity(count as usize);
        while took_us.len() < count as usize && !stopped.load(Ordering::Relaxed) {
            // Only a pause, or the sensor's end, which comes after the flag.
            let Ok(mark) = marks.recv_timeout(Duration::from_millis(100)) else { continue };
            note(&mut took_us, &mark);
        }
        (took_us, refused.map(|error| format!("receiver: ordinary ({error})")))
    });
    let worked = worker.work(&Task::Marks { count, pause: PAUSE });
    crate::process::within(LAST_MARK_TIME_MAX, || thread.is_finished().then_some(()));
    stop.store(true, Ordering::Relaxed);
    let (took_us, refused) = thread.join().map_err(|_| anyhow!("the receiver of marks panicked"))?;
    worked?;
    ensure!(took_us.len() == count as usize, "{} of {count} marks came", took_us.len());
    Ok((took_us, refused))
}

/// How old a mark of ours is.
fn note(took_us: &mut Vec<f64>, mark: &Mark) {
    let now_ns = monotonic_ns();
    if mark.handover == HANDOVER {
        took_us.push(now_ns.saturating_sub(mark.time_ns) as f64 / 1e3);
    }
}

/// The priority of the draining thread.
fn become_realtime() -> std::io::Result<()> {
    let parameters = libc::sched_param { sched_priority: SensorConfig::default().realtime_priority.unwrap_or(1) };
    // SAFETY: a live structure; 0 is the calling thread.
    let result =
        unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
