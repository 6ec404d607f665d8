//! Programs that never heard of us and speak by the conventions of systemd: `NOTIFY_SOCKET`, the watchdog and the
//! descriptor store.
//!
//! Everything here is untrusted. Only processes of the very container are heard; malformed messages are dropped with a
//! warning; one that says more than [`MESSAGES_PER_S_MAX`] is not listened to for the rest of the second and waits, as
//! its socket is full, so neither a flood nor its warnings cost the supervisor more than that. Nobody is listened to in a
//! blackout.

mod message;
mod socket;
mod store;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use warmswap_backend::{NOTIFY, NamedFd};
use warmswap_model::{Generation, Signal, with_causes};
use warmswap_transfer::message::ToService;

pub(crate) use socket::NotifySocket;
pub(crate) use store::FdStore;

use crate::error::HandoverError;
use crate::member::{Member, Role};
use crate::supervisor::Supervisor;
use message::{Saying, Store, Watchdog};
use socket::Heard;

/// A generation may say so much in a second. An upload of a full descriptor store is less.
const MESSAGES_PER_S_MAX: u32 = 600;
const SECOND: Duration = Duration::from_secs(1);

/// What a generation said of itself, and how it is listened to.
#[derive(Debug)]
pub(crate) struct Spoken {
    socket: Option<NotifySocket>,
    status: Option<String>,
    reloading: bool,
    stopping: bool,
    /// It must say that it lives so often.
    watchdog: Option<Duration>,
    /// Its last sign of life.
    alive_at: Instant,
    /// When it was last asked for one.
    asked_at: Instant,
    /// Why it was ended as dead.
    given_up: Option<String>,
    /// When this second began, how much was said in it, and whether somebody was warned in it.
    second: (Instant, u32, bool),
}

impl Spoken {
    pub(crate) fn new(socket: Option<NotifySocket>, watchdog: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            socket,
            status: None,
            reloading: false,
            stopping: false,
            watchdog,
            alive_at: now,
            asked_at: now,
            given_up: None,
            second: (now, 0, false),
        }
    }

    /// The socket, unless enough was said in this second.
    pub(crate) fn socket(&self) -> Option<&NotifySocket> {
        let (began, said, _) = self.second;
        self.socket.as_ref().filter(|_| said < MESSAGES_PER_S_MAX || began.elapsed() >= SECOND)
    }

    fn hear(&mut self) -> Option<Heard> {
        if self.second.0.elapsed() >= SECOND {
            self.second = (Instant::now(), 0, false);
        }
        let heard = self.socket()?.receive();
        let heard = heard.inspect_err(|error| tracing::warn!("a notification socket cannot be read: {error}"));
        let heard = heard.ok().flatten()?;
        self.second.1 += 1;
        Some(heard)
    }

    /// Whether a warning may be given; one in a second.
    fn may_warn(&mut self) -> bool {
        !std::mem::replace(&mut self.second.2, true)
    }

    /// For a person.
    pub(crate) fn in_words(&self) -> Option<String> {
        let state = match (self.reloading, self.stopping) {
            (_, true) => Some("stopping"),
            (true, false) => Some("reloading"),
            (false, false) => None,
        };
        let words: Vec<&str> = state.into_iter().chain(self.status.as_deref()).collect();
        (!words.is_empty()).then(|| words.join(": "))
    }

    pub(crate) fn given_up(&self) -> Option<&str> {
        self.given_up.as_deref()
    }

    /// A sign of life. The watchdog counts from the last one, or from when a generation was ready, or became owner.
    pub(crate) fn begin_watch(&mut self) {
        self.alive_at = Instant::now();
    }

    /// When a generation with a watchdog is to be asked whether it lives, if nothing is heard of it meanwhile. Half the time
    /// is for its answer.
    fn ask_in(&self) -> Option<Duration> {
        let half = self.watchdog.filter(|_| self.given_up.is_none())? / 2;
        let last = self.alive_at.max(self.asked_at);
        Some(half.saturating_sub(last.elapsed()))
    }
}

/// As the program is told in `WATCHDOG_USEC`, which outlives the supervisor with the container.
pub(crate) const WATCHDOG_USEC: &str = "WATCHDOG_USEC";

impl Member {
    /// Tells a program without the SDK to finish.
    pub(crate) fn stop_signal(&self) -> i32 {
        self.image.stop_signal.unwrap_or(Signal::TERM).number()
    }
}

impl Supervisor {
    /// The environment of a program with a watchdog.
    pub(crate) fn watchdog_env(&self) -> Vec<(String, String)> {
        let watchdog = self.watchdog();
        watchdog.map_or_else(Vec::new, |watchdog| {
            vec![(WATCHDOG_USEC.into(), watchdog.as_micros().to_string()), ("WATCHDOG_PID".into(), "1".into())]
        })
    }

    pub(crate) fn watchdog(&self) -> Option<Duration> {
        self.record.file.watchdog_s.map(Duration::from_secs_f64)
    }

    /// What a new generation begins with: a copy of what the owner, or the one that died, has stored.
    pub(crate) fn heritage(&self) -> Result<FdStore, HandoverError> {
        let ancestor = self.owner().or(self.fallen).and_then(|ancestor| self.stores.get(&ancestor));
        let copied = ancestor.map_or_else(|| Ok(FdStore::default()), FdStore::duplicate);
        copied.map_err(|source| HandoverError::System { action: "duplicate a stored descriptor", source })
    }

    /// What a generation has stored that its successor was not given, because it had begun already.
    pub(crate) fn stored_too_late(&self, from: Generation, to: Generation) -> Option<String> {
        let (old, new) = (self.stores.get(&from)?, self.stores.get(&to)?);
        let count = old.unknown_to(new);
        (count > 0).then(|| format!("what {from} stored after {to} had begun does not move (descriptors: {count})"))
    }

    /// Takes in what has been said, a bounded amount from each generation.
    pub(crate) fn hear_all(&mut self) {
        for generation in self.members.keys().copied().collect::<Vec<_>>() {
            while let Some(heard) = self.members.get_mut(&generation).and_then(|member| member.spoken.hear()) {
                if let Err(problem) = self.heed(generation, heard) {
                    self.warn(generation, &problem);
                }
            }
        }
    }

    fn warn(&mut self, generation: Generation, problem: &str) {
        let Some(member) = self.members.get_mut(&generation) else { return };
        if member.spoken.may_warn() {
            tracing::warn!("a notification of {} is not heard: {problem}", member.id);
        }
    }

    fn heed(&mut self, from: Generation, heard: Heard) -> Result<(), String> {
        let Heard { bytes, sender, fds, whole } = heard;
        let sender = sender.filter(|pid| *pid > 0).ok_or("nobody attests its sender")?;
        match self.backend.has_process(&self.container(from), sender) {
            Ok(true) => {}
            Ok(false) => return Err(format!("process {sender} is not, or no longer, of that container")),
            Err(error) => return Err(with_causes(&error)),
        }
        if !whole {
            return Err(format!("it is longer than {} bytes, or lost descriptors", message::BYTES_MAX));
        }
        let saying = Saying::parse(&bytes).map_err(|problem| problem.to_string())?;
        let Some(member) = self.members.get_mut(&from) else { return Ok(()) };
        let spoken = &mut member.spoken;
        if saying.ready {
            spoken.reloading = false;
            spoken.begin_watch();
            // One that links the SDK is ready when it says so there.
            member.ready |= member.greeting.is_none();
        }
        spoken.reloading |= saying.reloading;
        spoken.stopping |= saying.stopping;
        if saying.status.is_some() {
            spoken.status = saying.status.filter(|status| !status.is_empty());
        }
        match saying.watchdog {
            Some(Watchdog::Ping) => spoken.alive_at = Instant::now(),
            Some(Watchdog::Trigger) => self.give_up(from, "wanted its watchdog to end it".into()),
            None => {}
        }
        match saying.store {
            Some(Store::Add) => self.store(from, saying.name.as_deref(), fds),
            Some(Store::Remove) => {
                self.unstore(from, saying.name.as_deref().unwrap_or_default());
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn store(&mut self, from: Generation, name: Option<&str>, fds: Vec<OwnedFd>) -> Result<(), String> {
        let member = self.members.get(&from).filter(|member| member.role != Role::Draining);
        let id = &member.ok_or("it drains, and nobody begins with what it stores")?.id;
        let bytes_max = (self.record.file.resources.memory_mb_max * f64::from(1 << 20)) as u64;
        let store = self.stores.entry(from).or_default();
        for fd in fds {
            let stored = store.add(name, fd, bytes_max).map_err(|refusal| format!("not stored: {refusal}"))?;
            let Some(stored) = stored else { continue };
            let kept = stored.duplicate().map_err(|error| error.to_string());
            kept.and_then(|kept| self.backend.keep_fd(id, kept).map_err(|error| with_causes(&error)))
                .map_err(|problem| format!("what it stores is not kept for a crash: {problem}"))?;
        }
        Ok(())
    }

    fn unstore(&mut self, from: Generation, name: &str) {
        let id = self.container(from);
        for kept in self.stores.get_mut(&from).map(|store| store.remove(name)).unwrap_or_default() {
            if let Err(error) = self.backend.drop_kept_fd(&id, &kept) {
                tracing::warn!("{}", with_causes(&error));
            }
        }
    }

    /// Ends the owner if it has missed its watchdog. Whoever notices its death does the rest.
    pub(crate) fn watch_owner(&mut self) {
        if let Some(owner) = self.owner()
            && self.watch(owner).is_some()
            && let Some(member) = self.members.get_mut(&owner)
        {
            // A helper of it may hold the conversation open still.
            member.closed = true;
        }
    }

    /// Ends a generation that has missed its watchdog; why it was ended, if so.
    pub(crate) fn watch(&mut self, generation: Generation) -> Option<String> {
        self.ask_for_life(generation);
        let member = self.members.get(&generation)?;
        let spoken = &member.spoken;
        if let Some(reason) = spoken.given_up() {
            return Some(reason.to_owned());
        }
        let missed = spoken.watchdog.filter(|watchdog| spoken.alive_at.elapsed() > *watchdog)?.as_secs_f64();
        let reason = match member.cooperates() {
            true => format!("did not answer within {missed} s"),
            false => format!("did not say WATCHDOG=1 within {missed} s"),
        };
        self.give_up(generation, reason.clone());
        Some(reason)
    }

    /// A program says by itself that it lives; a service that links the SDK has only to answer.
    fn ask_for_life(&mut self, generation: Generation) {
        let due = |member: &&mut Member| member.cooperates() && member.spoken.ask_in() == Some(Duration::ZERO);
        let Some(member) = self.members.get_mut(&generation).filter(due) else { return };
        member.spoken.asked_at = Instant::now();
        self.round += 1;
        // One that cannot even be told has its time to answer all the same.
        let _ = self.tell(generation, &ToService::CaughtUp { round: self.round, commit: None }, &[]);
    }

    /// When the owner must have spoken at the latest, or is to be asked.
    pub(crate) fn watchdog_due(&self) -> Option<Duration> {
        let member = self.members.get(&self.owner()?)?;
        let watchdog = member.spoken.watchdog.filter(|_| member.spoken.given_up.is_none())?;
        let missed = watchdog.saturating_sub(member.spoken.alive_at.elapsed());
        let ask = member.spoken.ask_in().filter(|_| member.cooperates());
        Some(ask.map_or(missed, |ask| ask.min(missed)))
    }

    fn give_up(&mut self, generation: Generation, reason: String) {
        let id = self.container(generation);
        tracing::error!("{id} {reason}; it is ended");
        // Fails when it has ended, which is as good.
        let _ = self.backend.signal(&id, libc::SIGKILL);
        if let Some(member) = self.members.get_mut(&generation) {
            member.spoken.given_up = Some(reason);
        }
    }
}

/// For the container's store: the supervisor's end of the socket.
pub(crate) fn kept(fd: OwnedFd) -> NamedFd {
    NamedFd { name: NOTIFY.into(), fd }
}
