//! The one place where the agent draws randomness; decisions get it as an argument.

use std::hash::{BuildHasher, Hasher};

/// A source of numbers uniform in 0 to 1 (SplitMix64), seeded by the operating system. For exploration, not for secrets.
pub(crate) fn uniform() -> impl FnMut() -> f64 {
    let mut state = std::collections::hash_map::RandomState::new().build_hasher().finish();
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}
