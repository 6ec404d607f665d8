//! Handover marks: a `prctl` that no kernel knows, made by whoever stops or starts serving. Its time is the kernel's,
//! so a blackout is measured with one clock whoever took part. Marks are sent from every cgroup, watched or not.

use warmswap_events::{Class, MARK_OPTION};

use crate::cgroup::Owner;
use crate::emit::{Context, emit};
use crate::maps::layout;
use crate::syscall::{Registers, argument};
use crate::trouble;

/// `prctl(MARK_OPTION, mark, handover, generation, 0)`
#[inline(always)]
pub(crate) fn on_prctl(regs: Registers, owner: Owner) {
    let Some(option) = argument(regs, layout!(regs_arg[0])) else { return };
    // The kernel takes the option as an int.
    if option & 0xffff_ffff != MARK_OPTION {
        return;
    }
    let (Some(mark), Some(handover), Some(generation)) = (
        argument(regs, layout!(regs_arg[1])),
        argument(regs, layout!(regs_arg[2])),
        argument(regs, layout!(regs_arg[3])),
    ) else {
        trouble::unread_mark(owner.cgroup);
        return;
    };
    emit(Class::Mark, owner, Context::Process, [(mark << 32) | (generation & 0xffff_ffff), handover]);
}
