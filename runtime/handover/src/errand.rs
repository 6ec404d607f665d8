//! What a back end was asked for and did not do: it is asked again between handovers, until it does or nobody needs it any
//! more. A shim that did not answer in time, say, must not leave a container behind, or a service without its state.

use warmswap_backend::NamedFd;
use warmswap_model::{Generation, with_causes};

use crate::error::HandoverError;
use crate::supervisor::{KEPT_SEGMENT, Supervisor};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Errand {
    /// Remove the container.
    Destroy(Generation),
    /// Keep a segment in the store of the container.
    Keep(Generation, u64),
    /// Let go of a segment there: one that is found later would be taken for a part of the state.
    Drop(Generation, u64),
}

impl Supervisor {
    /// Now, or again later.
    pub(crate) fn run_errand(&mut self, errand: Errand) {
        if let Err(error) = self.try_errand(errand) {
            tracing::error!("{}, {errand:?}: {}; it is tried again", self.service(), with_causes(&error));
            self.errands.push(errand);
        }
    }

    /// What was left to do.
    pub(crate) fn run_errands(&mut self) {
        for errand in std::mem::take(&mut self.errands) {
            if self.try_errand(errand).is_err() {
                self.errands.push(errand);
            }
        }
    }

    fn try_errand(&self, errand: Errand) -> Result<(), HandoverError> {
        let (Errand::Destroy(generation) | Errand::Keep(generation, _) | Errand::Drop(generation, _)) = errand;
        let id = self.container(generation);
        let there = self.members.contains_key(&generation) || self.fallen == Some(generation);
        match errand {
            Errand::Destroy(_) => {
                self.backend.destroy(&id)?;
                // Confirmed dead.
                self.ownership.release(generation.0);
            }
            Errand::Keep(_, index) => {
                // Retired, or its keeper gone, since it was first tried.
                let Some(segment) = self.segments.get(&index).filter(|_| there) else { return Ok(()) };
                let duplicate = segment.try_clone();
                let fd = duplicate.map_err(|source| HandoverError::System { action: "duplicate a segment", source })?;
                self.backend.keep_fd(&id, NamedFd { name: format!("{KEPT_SEGMENT}{index}"), fd })?;
            }
            Errand::Drop(_, index) if there && !self.segments.contains_key(&index) => {
                self.backend.drop_kept_fd(&id, &format!("{KEPT_SEGMENT}{index}"))?;
            }
            Errand::Drop(..) => {}
        }
        Ok(())
    }
}
