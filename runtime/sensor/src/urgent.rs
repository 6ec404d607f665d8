//! Urgent events: a thread for each CPU, woken on the CPU where one happens, because waking somebody elsewhere takes an
//! interrupt there, and of a busy virtual machine that takes longer than all else.
//!
//! ```text
//!  urgent ring ◀── record ── probe ──wakes──▶ thread of this CPU ──▶ takers of marks
//!                                                    └──▶ draining thread ──▶ subscribers
//! ```
//!
//! What cannot be woken so (a CPU that came later) wakes the draining thread, which does the same.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use aya::maps::perf::PerfEventArrayBuffer;
use aya::maps::{MapData, PerfEventArray};
use crossbeam::channel::Sender;
use warmswap_events::{Class, Record};

use crate::account::Tally;
use crate::drain::{BATCH_RECORDS, MarkTaker, Taken, become_realtime, event_fd, tell, wait_for};
use crate::event::{Mark, decode};
use crate::ring::Ring;

/// A record from the urgent ring, and whether somebody has taken it for a mark.
pub(crate) type Passed = (Record, bool);

/// The ring and who takes marks from it.
pub(crate) struct Urgent {
    ring: Ring,
    takers: Vec<MarkTaker>,
    tally: Arc<Tally>,
}

impl Urgent {
    pub(crate) fn new(ring: Ring, tally: Arc<Tally>) -> Self {
        Self { ring, takers: Vec::new(), tally }
    }

    pub(crate) fn add(&mut self, taker: MarkTaker) {
        self.takers.push(taker);
    }

    pub(crate) fn raw_fd(&self) -> i32 {
        self.ring.fd().as_raw_fd()
    }

    /// Gives every mark to its takers, and passes every record on.
    pub(crate) fn drain(&mut self, mut pass: impl FnMut(Passed)) {
        let Self { ring, takers, tally } = self;
        while ring.drain(BATCH_RECORDS, |bytes| match decode(bytes) {
            Some((record, _)) => pass((record, give(takers, &record))),
            None => tally.count_malformed(),
        }) == BATCH_RECORDS
        {}
    }
}

fn give(takers: &mut Vec<MarkTaker>, record: &Record) -> bool {
    let Some(mark) = Mark::of(record) else { return false };
    let mut given = false;
    takers.retain_mut(|taker| {
        // One that panics must not end the threads that call it, one after the other.
        let taken = catch_unwind(AssertUnwindSafe(|| taker(mark))).unwrap_or_else(|_| {
            tracing::error!("a taker of marks panicked, and is given no more");
            Taken::NoMore
        });
        given |= taken == Taken::Yes;
        taken != Taken::NoMore
    });
    given
}

/// Nothing that is done with it leaves it half done.
pub(crate) fn lock(urgent: &Mutex<Urgent>) -> MutexGuard<'_, Urgent> {
    urgent.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The threads. Dropping it ends them.
pub(crate) struct Watchmen {
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

/// What each of them needs.
pub(crate) struct Post {
    pub(crate) urgent: Arc<Mutex<Urgent>>,
    pub(crate) passed: Sender<Passed>,
    /// Wakes the draining thread.
    pub(crate) wake: Arc<OwnedFd>,
    pub(crate) realtime_priority: Option<i32>,
}

impl Watchmen {
    /// One per CPU that can be woken; where none can be, the draining thread does all of it.
    pub(crate) fn start(mut wakers: PerfEventArray<MapData>, cpus: usize, post: &Post) -> io::Result<Self> {
        let mut watchmen = Self { stop: Arc::new(event_fd()?), threads: Vec::with_capacity(cpus) };
        for cpu in 0..cpus {
            let buffer = match wakers.open(cpu as u32, Some(1)) {
                Ok(buffer) => buffer,
                Err(error) => {
                    tracing::debug!(cpu, %error, "urgent events of this CPU wake the draining thread");
                    continue;
                }
            };
            let watchman = Watchman {
                cpu,
                buffer,
                stop: Arc::clone(&watchmen.stop),
                urgent: Arc::clone(&post.urgent),
                passed: post.passed.clone(),
                wake: Arc::clone(&post.wake),
            };
            let priority = post.realtime_priority;
            let thread = std::thread::Builder::new().name(format!("warmswap-mark/{cpu}")).stack_size(STACK_BYTES);
            watchmen.threads.push(thread.spawn(move || watchman.run(priority))?);
        }
        Ok(watchmen)
    }

    pub(crate) fn cpu_time(&self) -> Duration {
        self.threads.iter().filter_map(|thread| crate::cost::cpu_time(thread.as_pthread_t())).sum()
    }
}

/// They call takers, which do not wait and keep little.
const STACK_BYTES: usize = 256 * 1024;

impl Drop for Watchmen {
    fn drop(&mut self) {
        tell(&self.stop);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread for urgent events had panicked");
            }
        }
    }
}

struct Watchman {
    cpu: usize,
    buffer: PerfEventArrayBuffer<MapData>,
    stop: Arc<OwnedFd>,
    urgent: Arc<Mutex<Urgent>>,
    passed: Sender<Passed>,
    wake: Arc<OwnedFd>,
}

impl Watchman {
    fn run(mut self, priority: Option<i32>) {
        // Without either it is later, and as right; the draining thread says why it has no priority.
        stay_on(self.cpu);
        if let Some(priority) = priority {
            let _ = become_realtime(priority);
        }
        loop {
            let [woken, stopped] = wait_for(self.buffer.as_raw_fd(), self.stop.as_raw_fd());
            if stopped {
                return;
            }
            if !woken {
                continue;
            }
            // What woke us says nothing but that.
            self.buffer.for_each(|_| {});
            let mut any = false;
            let mut urgent = lock(&self.urgent);
            let tally = Arc::clone(&urgent.tally);
            urgent.drain(|passed| {
                any = true;
                if let Err(refused) = self.passed.try_send(passed) {
                    // The draining thread is behind, or gone: marks have been taken, subscribers go without.
                    let (record, taken) = refused.into_inner();
                    if let Some(class) = Class::from_number(record.class) {
                        tally.count(class, taken);
                    }
                }
            });
            drop(urgent);
            if any {
                tell(&self.wake);
            }
        }
    }
}

/// Keeps the calling thread on one CPU.
fn stay_on(cpu: usize) {
    // SAFETY: a zeroed set of CPUs is empty; one beyond it is not set, which leaves the set empty and the call refused.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if cpu < libc::CPU_SETSIZE as usize {
            libc::CPU_SET(cpu, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}
