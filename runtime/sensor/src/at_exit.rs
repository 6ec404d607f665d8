//! The program at the end of every system call: attached only while it is needed, because every call of the host pays for it.
//!
//! ```text
//!  a watched process has a terminal or an input device open ┐
//!  somebody wants events of input or orientation            ├▶ attached
//!  the kernel shows handover marks nowhere else             ┘
//! ```

use aya::Ebpf;
use aya::programs::raw_trace_point::RawTracePointLink;
use aya::programs::tp_btf::BtfTracePointLink;
use aya::programs::{Program, ProgramError};

use crate::load::refusal;

const TRACEPOINT: &str = "sys_exit";
const TYPED: &str = "system_call_typed";
const RAW: &str = "system_call";

/// Detaches when dropped.
enum Link {
    Typed(#[expect(dead_code, reason = "held")] BtfTracePointLink),
    Raw(#[expect(dead_code, reason = "held")] RawTracePointLink),
}

/// Loaded, and attached or not.
pub(crate) struct AtExit {
    typed: bool,
    link: Option<Link>,
    /// Marks need it; it stays attached.
    always: bool,
}

impl AtExit {
    /// The typed variant where the kernel takes it (and `types` are given), else the raw one.
    pub(crate) fn load(object: &mut Ebpf, types: Option<&aya::Btf>) -> Result<Self, String> {
        if let (Some(types), Some(Program::BtfTracePoint(program))) = (types, object.program_mut(TYPED)) {
            match program.load(TRACEPOINT, types) {
                Ok(()) => return Ok(Self { typed: true, link: None, always: false }),
                Err(error) => {
                    tracing::info!(reason = refusal(&error), "typed variant of input refused, trying the raw one");
                }
            }
        }
        let Some(Program::RawTracePoint(program)) = object.program_mut(RAW) else {
            return Err(format!("the object has no program {RAW}"));
        };
        program.load().map_err(|error| refusal(&error))?;
        Ok(Self { typed: false, link: None, always: false })
    }

    pub(crate) const fn is_typed(&self) -> bool {
        self.typed
    }

    pub(crate) const fn is_attached(&self) -> bool {
        self.link.is_some()
    }

    /// Whether it stays attached, whoever reads input.
    pub(crate) const fn is_kept(&self) -> bool {
        self.always
    }

    /// Attached from now on, whoever needs it.
    pub(crate) fn keep(&mut self, object: &mut Ebpf) -> Result<(), String> {
        self.need(object, true)?;
        self.always = true;
        Ok(())
    }

    /// Attaches it when it is needed and detaches it when it is not.
    pub(crate) fn need(&mut self, object: &mut Ebpf, needed: bool) -> Result<(), String> {
        match (&self.link, needed || self.always) {
            (None, true) => self.link = Some(self.attach(object).map_err(|error| refusal(&error))?),
            (Some(_), false) => self.link = None,
            _ => {}
        }
        Ok(())
    }

    fn attach(&self, object: &mut Ebpf) -> Result<Link, ProgramError> {
        match object.program_mut(if self.typed { TYPED } else { RAW }) {
            Some(Program::BtfTracePoint(program)) => {
                program.attach().and_then(|id| program.take_link(id)).map(Link::Typed)
            }
            Some(Program::RawTracePoint(program)) => {
                program.attach(TRACEPOINT).and_then(|id| program.take_link(id)).map(Link::Raw)
            }
            _ => Err(ProgramError::NotLoaded),
        }
    }
}
