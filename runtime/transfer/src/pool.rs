//! A thread that makes segments before they are needed and unmaps them after: both take milliseconds, and neither
//! may happen while a client waits.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use crate::segment::{BlankSegment, SegmentError};

/// How long an append waits for a segment before it gives up: far longer than faulting one in takes.
const WAIT_MAX: Duration = Duration::from_secs(10);

enum Job {
    Make,
    Drop(Box<dyn Send>),
}

/// Keeps `spares` blank segments ready. The thread ends when the pool is dropped.
#[derive(Debug)]
pub(crate) struct SegmentPool {
    jobs: Sender<Job>,
    made: Receiver<Result<BlankSegment, SegmentError>>,
    /// Taken out of `made` by [`Self::is_ready`].
    seen: VecDeque<Result<BlankSegment, SegmentError>>,
    stalls: u64,
}

impl SegmentPool {
    pub(crate) fn start(segment_len: usize, spares: usize) -> Result<Self, SegmentError> {
        let (jobs, jobs_in) = channel();
        let (made_out, made) = channel();
        let work = move || {
            for job in jobs_in {
                match job {
                    Job::Make => {
                        if made_out.send(BlankSegment::create(segment_len)).is_err() {
                            return;
                        }
                    }
                    Job::Drop(thing) => drop(thing),
                }
            }
        };
        thread::Builder::new().name("warmswap-pool".into()).spawn(work).map_err(|source| SegmentError::System {
            what: "start the thread that makes",
            len: 0,
            source,
        })?;
        let pool = Self { jobs, made, seen: VecDeque::new(), stalls: 0 };
        for _ in 0..spares.max(1) {
            pool.order(Job::Make);
        }
        Ok(pool)
    }

    fn order(&self, job: Job) {
        // The thread ends only after this sender; if it panicked, `take` reports it.
        let _ = self.jobs.send(job);
    }

    /// Whether [`Self::take`] would not wait.
    pub(crate) fn is_ready(&mut self) -> bool {
        self.seen.extend(self.made.try_recv());
        !self.seen.is_empty()
    }

    /// A blank segment; orders its replacement. Waits only when segments are used up faster than the kernel gives memory.
    pub(crate) fn take(&mut self) -> Result<BlankSegment, SegmentError> {
        let dead = || SegmentError::System {
            what: "get",
            len: 0,
            source: std::io::Error::other("the thread that makes segments does not answer"),
        };
        let made = match self.seen.pop_front().map_or_else(|| self.made.try_recv(), Ok) {
            Ok(made) => made,
            Err(TryRecvError::Disconnected) => return Err(dead()),
            Err(TryRecvError::Empty) => {
                self.stalls += 1;
                self.made.recv_timeout(WAIT_MAX).map_err(|error| match error {
                    RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected => dead(),
                })?
            }
        };
        self.order(Job::Make);
        made
    }

    /// Drops a segment, or something that holds segments, on the thread.
    pub(crate) fn discard(&self, thing: impl Send + 'static) {
        self.order(Job::Drop(Box::new(thing)));
    }

    /// How often [`Self::take`] had to wait.
    pub(crate) fn stalls(&self) -> u64 {
        self.stalls
    }
}
