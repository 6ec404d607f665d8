//! Latency of requests: of all of them, or, while a service answers very many, of those that begin in slices of time.
//!
//! A program that is called for each segment makes a server that does nothing but answer some two percent slower, most of it
//! for being called at all. So with very many requests it is attached for a share of the time:
//!
//! ```text
//!            │ looks on │ requests begin │ the last are answered │ pause …
//!  attached  ├──────────┴────────────────┴───────────────────────┤          ├──
//!  measured             ├────────────────┴───────────────────────┤             as many more are added as there were
//! ```
//!
//! What begins in a slice is measured to its end, so slow requests are in the sample as often as quick ones. When the last
//! is not answered in time everything is measured for a while: it is then not the probe that costs. What was measured is added
//! to the histograms once more for the time until the next slice, so whoever reads them sees as many requests as there were.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use warmswap_events::{BUCKETS, Control, DISTRIBUTIONS, Distribution, Histogram, Places, REQUEST_ROWS, Request};

use crate::bpf;
use crate::drain::monotonic_ns;
use crate::mapped::MappedArray;

/// How often it is looked whether there are very many, while everything is measured; the kernel is asked so often, too, when
/// it does not take the program again.
const LOOK: Duration = Duration::from_secs(1);
/// Before a slice: a request in the middle of which it would begin shows itself.
const LOOK_ON: Duration = Duration::from_millis(20);
/// How long requests begin that are measured.
const SLICE: Duration = Duration::from_millis(100);
/// How long the last of them may take.
const ANSWERED_IN: Duration = Duration::from_millis(100);
/// When it takes longer, so long is everything measured.
const ALL_FOR: Duration = Duration::from_secs(10);
/// Between slices, and how much longer it may be: what happens at regular times is not always met or always missed.
const PAUSE: Duration = Duration::from_millis(300);
const PAUSE_MORE_MS: u64 = 200;
/// Below this share of what is very many requests all of them are measured again.
const ENOUGH_LESS: f64 = 0.7;

/// What is measured.
const OF_REQUESTS: [Distribution; 2] = [Distribution::RequestLatency, Distribution::RequestGap];

/// A program at a tracepoint, and what it shares with us.
pub(crate) struct Tap {
    pub(crate) program: OwnedFd,
    /// `None` for a typed program, which knows it.
    pub(crate) tracepoint: Option<CString>,
    pub(crate) control: Arc<MappedArray<Control>>,
    pub(crate) requests: MappedArray<Places>,
    pub(crate) histograms: Arc<MappedArray<Histogram>>,
    /// By slot, since when it is watched.
    pub(crate) watched_since: Arc<MappedArray<u64>>,
    pub(crate) slots: usize,
    /// Requests a second of one service that are very many.
    pub(crate) very_many: f64,
}

impl Tap {
    fn attach(&self) -> io::Result<OwnedFd> {
        bpf::attach_tracepoint(self.program.as_fd(), self.tracepoint.as_deref())
    }

    /// The buckets of what is measured, slot by slot.
    fn histograms(&self) -> impl Iterator<Item = (usize, &[AtomicU64])> {
        (1..self.slots).flat_map(move |slot| {
            OF_REQUESTS.map(|of| (slot, self.histograms.words(slot * DISTRIBUTIONS as usize + of as usize)))
        })
    }

    /// What the histograms hold, in their order.
    fn counts(&self) -> Vec<u64> {
        self.histograms().flat_map(|(_, buckets)| buckets).map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// Requests a second of the service that has most, from what was counted in this time.
    fn rate(counted: &[u64], time: Duration) -> f64 {
        // The first of each two histograms is of latencies.
        let services = counted.chunks_exact(OF_REQUESTS.len() * BUCKETS);
        let most = services.map(|buckets| buckets[..BUCKETS].iter().sum::<u64>()).max().unwrap_or(0);
        most as f64 / time.as_secs_f64().max(1e-3)
    }

    /// `requests_since` and `requests_closed`.
    fn control(&self) -> Option<[&AtomicU64; 2]> {
        match self.control.words(0) {
            [_epoch, _classes, _everywhere, since, closed, ..] => Some([since, closed]),
            _ => None,
        }
    }
}

/// Dropping it detaches the program.
pub(crate) struct Sampler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    ends: bool,
    /// For how long requests have begun that are measured, until `since`; since then they do, when it is there.
    measured: Duration,
    since_ns: Option<u64>,
}

impl State {
    fn measured(&self, now_ns: u64) -> Duration {
        self.measured + self.since_ns.map_or(Duration::ZERO, |since| Duration::from_nanos(now_ns.saturating_sub(since)))
    }
}

impl Shared {
    /// Nothing that is done with it leaves it half done.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sampler {
    /// Attaches the program, and measures everything.
    pub(crate) fn start(tap: Tap) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let link = Some(tap.attach()?);
        shared.state().since_ns = Some(monotonic_ns());
        let slices = Slices { tap, link, refused: false, shared: Arc::clone(&shared) };
        let thread = std::thread::Builder::new().name("warmswap-sample".to_owned()).spawn(move || slices.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// For how long requests have begun that are measured, since the start.
    pub(crate) fn measured(&self) -> Duration {
        self.shared.state().measured(monotonic_ns())
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.shared.state().ends = true;
        self.shared.ended.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that samples requests had panicked");
        }
    }
}

/// The thread.
struct Slices {
    tap: Tap,
    link: Option<OwnedFd>,
    /// Whether it was said that the kernel does not take the program again.
    refused: bool,
    shared: Arc<Shared>,
}

/// A slice that is over.
struct Slice {
    begun_ns: u64,
    /// For how long requests began.
    lasted: Duration,
    /// What it measured, as [`Tap::counts`].
    counted: Vec<u64>,
}

/// All is over.
struct Ends;

impl Slices {
    fn run(mut self) {
        while self.measure_all().is_ok() && self.measure_slices().is_ok() {}
    }

    /// Until there are very many.
    fn measure_all(&mut self) -> Result<(), Ends> {
        loop {
            let (before, began) = (self.tap.counts(), Instant::now());
            self.wait(LOOK)?;
            let counted = since(&before, self.tap.counts());
            if self.begin().is_some() && Tap::rate(&counted, began.elapsed()) > self.tap.very_many {
                return Ok(());
            }
        }
    }

    /// Until there are less again.
    fn measure_slices(&mut self) -> Result<(), Ends> {
        let mut last: Option<Slice> = None;
        loop {
            let Some(begun_ns) = self.begin() else {
                self.wait(LOOK)?;
                continue;
            };
            if let Some(last) = last.take() {
                self.add_the_rest(&last, begun_ns);
            }
            let before = self.tap.counts();
            self.wait(SLICE + Duration::from_nanos(begun_ns.saturating_sub(monotonic_ns())))?;
            let lasted = Duration::from_nanos(self.close().saturating_sub(begun_ns));
            let answered = self.are_answered(begun_ns)?;
            if answered {
                self.link = None;
            }
            let slice = Slice { begun_ns, lasted, counted: since(&before, self.tap.counts()) };
            if !answered {
                let open_ns = self.open(monotonic_ns());
                self.add_the_rest(&slice, open_ns);
                self.wait(ALL_FOR)?;
            } else if Tap::rate(&slice.counted, lasted) > ENOUGH_LESS * self.tap.very_many {
                last = Some(slice);
                self.wait(PAUSE + Duration::from_millis(monotonic_ns() % PAUSE_MORE_MS))?;
            } else {
                // It may not be: then the next look sees that everything is measured again.
                if let Some(open_ns) = self.begin() {
                    self.add_the_rest(&slice, open_ns);
                }
                return Ok(());
            }
        }
    }

    fn wait(&self, time: Duration) -> Result<(), Ends> {
        let state = self.shared.state();
        let ended = self.shared.ended.wait_timeout_while(state, time, |state| !state.ends);
        let (state, _) = ended.unwrap_or_else(PoisonError::into_inner);
        if state.ends { Err(Ends) } else { Ok(()) }
    }

    /// Has requests measured that begin from now on, or, when nobody has looked on until now, from a moment later on: from when, in
    /// ns. `None` when the kernel does not take the program.
    fn begin(&mut self) -> Option<u64> {
        if self.link.is_some() {
            return Some(monotonic_ns());
        }
        match self.tap.attach() {
            Ok(link) => self.link = Some(link),
            Err(error) => {
                if !std::mem::replace(&mut self.refused, true) {
                    tracing::warn!(%error, "the kernel does not take the program again: latencies are not measured for now");
                }
                return None;
            }
        }
        let begun_ns = monotonic_ns() + LOOK_ON.as_nanos() as u64;
        if let Some([since, _]) = self.tap.control() {
            since.store(begun_ns, Ordering::Relaxed);
        }
        Some(self.open(begun_ns))
    }

    fn open(&self, since_ns: u64) -> u64 {
        if let Some([_, closed]) = self.tap.control() {
            closed.store(0, Ordering::Release);
        }
        self.shared.state().since_ns = Some(since_ns);
        since_ns
    }

    /// The time from which on requests that begin are not measured, in ns.
    fn close(&self) -> u64 {
        let now_ns = monotonic_ns();
        if let Some([_, closed]) = self.tap.control() {
            closed.store(1, Ordering::Relaxed);
        }
        let mut state = self.shared.state();
        state.measured = state.measured(now_ns);
        state.since_ns = None;
        now_ns
    }

    /// Whether all requests that are measured, of those that began after this, are answered in time.
    fn are_answered(&self, begun_ns: u64) -> Result<bool, Ends> {
        let until = Instant::now() + ANSWERED_IN;
        let mut pause = Duration::from_millis(1);
        while self.somebody_waits(begun_ns) {
            if Instant::now() >= until {
                return Ok(false);
            }
            self.wait(pause)?;
            pause *= 2;
        }
        Ok(true)
    }

    fn somebody_waits(&self, begun_ns: u64) -> bool {
        const WORDS: usize = size_of::<Request>() / size_of::<u64>();
        (0..REQUEST_ROWS as usize).flat_map(|row| self.tap.requests.words(row).chunks_exact(WORDS)).any(|request| {
            let [sock, since_ns, ..] = request else { return false };
            sock.load(Ordering::Relaxed) != 0 && since_ns.load(Ordering::Relaxed) >= begun_ns
        })
    }

    /// What the time from the end of a slice to the begin of what is measured next would have added, if it was like the slice.
    fn add_the_rest(&self, slice: &Slice, next_ns: u64) {
        let all = Duration::from_nanos(next_ns.saturating_sub(slice.begun_ns));
        let more = (all.as_secs_f64() / slice.lasted.as_secs_f64().max(1e-3) - 1.0).max(0.0);
        for ((slot, buckets), counted) in self.tap.histograms().zip(slice.counted.chunks_exact(BUCKETS)) {
            let watched =
                self.tap.watched_since.words(slot).first().map_or(u64::MAX, |since| since.load(Ordering::Relaxed));
            if watched > slice.begun_ns {
                // Somebody else's by now.
                continue;
            }
            // What is less than one request goes to the next bucket.
            let mut rest = 0.5;
            for (bucket, counted) in buckets.iter().zip(counted).filter(|(_, counted)| **counted > 0) {
                rest += *counted as f64 * more;
                bucket.fetch_add(rest as u64, Ordering::Relaxed);
                rest = rest.fract();
            }
        }
    }
}

fn since(before: &[u64], mut now: Vec<u64>) -> Vec<u64> {
    for (now, before) in now.iter_mut().zip(before) {
        *now = now.saturating_sub(*before);
    }
    now
}
