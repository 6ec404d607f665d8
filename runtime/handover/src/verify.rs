//! VERIFY: is the new owner as good as the old one was?

use std::time::{Duration, Instant};

use warmswap_model::Rung;

use crate::attempt::Attempt;
use crate::conditions::Judgement;
use crate::standstill::Looks;
use crate::supervisor::{Notice, Stop, Supervisor};

/// How often VERIFY looks.
const VERIFY_STEP: Duration = Duration::from_millis(200);
/// VERIFY, and once more what follows a doubt, ends after this many times its shortest duration, whatever was seen.
const VERIFY_STRETCH: f64 = 10.0;
/// An owner that is about to be left without a predecessor must answer within this time.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(crate) fn verify(&mut self, attempt: &mut Attempt) -> Result<String, Stop> {
        let to = attempt.to;
        let began = Instant::now();
        self.conditions.begin_measuring();
        let limits = self.record.file.handover;
        let longest = Duration::from_secs_f64(limits.verify_s_min * VERIFY_STRETCH);
        let mut stretch_began = began;
        let mut doubted = false;
        let mut looks = Looks::begin();
        loop {
            let step_ends = Instant::now() + VERIFY_STEP;
            while let Some(left) = step_ends.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                self.pump_and_hear(left, None);
                for (who, notice) in std::mem::take(&mut self.notices) {
                    match notice {
                        Notice::Closed if who == to && self.is_dead(to) => return Err(self.obituary(to)),
                        Notice::Failed { what } if who == to => return Err(Stop::new(format!("{to} failed: {what}"))),
                        _ => {}
                    }
                }
            }
            if let Some(reason) = self.watch(to) {
                return Err(Stop::new(format!("{to} {reason}")));
            }
            // Asked again, because a channel closes a moment before it is known that its process has died; and a program
            // without the SDK may have closed the channel it did not know.
            let closed = self.members.get(&to).is_none_or(|member| member.closed);
            if (closed || attempt.rung < Rung::Fds) && self.is_dead(to) {
                return Err(self.obituary(to));
            }
            if looks.look(self, &[to]).is_some() {
                return Err(Stop::new(format!("{to} is stopped by a signal")));
            }
            if let Some(reason) = self.conditions.cancelled(&self.record.file.name) {
                return Err(Stop::new(reason));
            }
            // Of a program that says nothing it is only known that it runs; until it listens there is nothing to judge.
            if self.joined_no_port(attempt) {
                if began.elapsed() < longest {
                    continue;
                }
                return Err(Stop::new(format!("{to} listens at no port of {}: {}", attempt.from, attempt.ports)));
            }
            attempt.after = self.conditions.measure(&self.record.file.name, stretch_began.elapsed());
            match self.conditions.judge(attempt.before.as_ref(), attempt.after.as_ref(), &limits) {
                Judgement::Worse { certain: false, .. } if !doubted => {
                    doubted = true;
                    stretch_began = Instant::now();
                }
                Judgement::Worse { reason, .. } => return Err(Stop::new(reason)),
                Judgement::Accept => {
                    self.still_answers(attempt)?;
                    let requests = attempt.after.map_or(0, |after| after.requests);
                    return Ok(format!("as good as before over {requests} requests"));
                }
                // A doubt has as long to be dispelled as it had to arise.
                Judgement::Continue if stretch_began.elapsed() >= longest => {
                    self.still_answers(attempt)?;
                    return Ok(format!("nothing worse seen in {:.0} s", longest.as_secs_f64()));
                }
                Judgement::Continue => {}
            }
        }
    }

    /// What was measured is over; after COMMIT nobody could take back.
    fn still_answers(&mut self, attempt: &Attempt) -> Result<(), Stop> {
        if attempt.rung < Rung::Fds {
            return Ok(());
        }
        let to = attempt.to;
        self.ask_caught_up(to, None, &[to], Instant::now() + ANSWER_TIME_MAX).map(drop)
    }
}
