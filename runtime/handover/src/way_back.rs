//! Whether there is a way back: what the old generation must be able to do to serve again, and what is said when it cannot.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use warmswap_model::{Generation, Rung};
use warmswap_transfer::segment::segment_schema;

use crate::attempt::Attempt;
use crate::supervisor::{Stop, Supervisor};

/// How long a generation that is worse than the old one may take to hand back. Far above the usual budget: it may be slow
/// to finish what it has in flight, and ending it by force would cost its connections.
pub(crate) const HAND_BACK_TIME_MAX: Duration = Duration::from_secs(2);

impl Supervisor {
    /// Why the new generation stays, whatever VERIFY found. Going back would end the only generation that serves, or lose
    /// what was acknowledged: the state has moved on to a schema that the old generation cannot read, whether the new one
    /// lives or not. `None` when the old one can take back.
    pub(crate) fn why_kept(&mut self, attempt: &mut Attempt) -> Option<String> {
        if !attempt.promoted {
            return None;
        }
        let from = attempt.from;
        // What the new one has announced, and nobody has read yet, may be what the old one cannot read.
        match self.is_dead(attempt.to) {
            true => self.read_rest(attempt.to),
            false => self.pump(Duration::ZERO, None),
        }
        if let Some(schema) = self.outgrown(from).filter(|_| attempt.rung >= Rung::Fds) {
            return Some(format!("there is no state rollback: {from} cannot read what is written in schema {schema}"));
        }
        if self.is_dead(attempt.to) {
            return None;
        }
        let why = self.can_take_back(attempt).err()?.reason;
        let became = if self.is_dead(from) { "died" } else { "has not kept up" };
        Some(format!("{from} {became} and cannot take back ({why})"))
    }

    /// Whether the old generation lives and knows what it must know. When it is the new one that does not answer, what
    /// the old one was told has to do.
    fn can_take_back(&mut self, attempt: &mut Attempt) -> Result<(), Stop> {
        let (from, to) = (attempt.from, attempt.to);
        if self.is_dead(from) {
            return Err(self.obituary(from));
        }
        if attempt.rung < Rung::Fds {
            return Ok(());
        }
        let deadline = Instant::now() + HAND_BACK_TIME_MAX;
        // It may have begun just after it was given up, and has connections to hand back then.
        attempt.answers |= self.ownership.holder() == to.0 && self.ownership.servings() != attempt.servings;
        let newest = attempt.answers.then(|| self.ask_caught_up(to, None, &[to], deadline).ok()).flatten();
        attempt.answers = newest.is_some();
        self.informed(from)?;
        match newest {
            Some(commit) => self.ask_caught_up(from, commit, &[from, to], deadline).map(drop),
            None if self.members.get(&from).is_none_or(|member| member.closed) => Err(self.obituary(from)),
            None => Ok(()),
        }
    }

    /// After SYNC, for people: what becomes of the state's layout, and whether it can come back.
    pub(crate) fn schema_change(&self, attempt: &mut Attempt) -> String {
        let (Some(old), Some(new)) = (self.greeting_of(attempt.from), self.greeting_of(attempt.to)) else {
            return String::new();
        };
        if attempt.rung != Rung::Full || old.schema_written == new.schema_written {
            return String::new();
        }
        let mut said = format!(", schema {} to {}", old.schema_written, new.schema_written);
        if let Some(reason) = new.no_state_rollback(&old) {
            said.push_str(&format!("; {reason}"));
            attempt.lost.push(reason);
        }
        said
    }

    /// A follower that cannot read what the owner writes from now on does not follow any more.
    pub(crate) fn leave_behind(&mut self, schema: Option<u32>) {
        let Some(schema) = schema else { return };
        for member in self.members.values_mut().filter(|member| member.follows()) {
            if member.greeting.as_ref().is_some_and(|greeting| !greeting.schemas_read.contains(&schema)) {
                tracing::info!("{} cannot read schema {schema} and is left behind", member.id);
                member.informed = false;
            }
        }
    }

    /// The schema of the state, when this generation cannot read it.
    fn outgrown(&self, generation: Generation) -> Option<u32> {
        let greeting = self.members.get(&generation)?.greeting.as_ref()?;
        let mut schemas = self.segments.values().filter_map(|fd| segment_schema(fd.as_fd()));
        schemas.find(|schema| !greeting.schemas_read.contains(schema))
    }
}
