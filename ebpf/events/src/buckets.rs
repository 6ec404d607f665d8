//! Log-linear buckets: every power of two is cut into 8 equal parts, so a bucket is at most 12.5 % wide.

/// Parts of each power of two.
pub const SUB_BUCKETS_PER_OCTAVE: u32 = 8;

/// 2^36 ns (69 s) and more share the last bucket.
const EXPONENT_MAX: u32 = 36;

/// Number of buckets.
pub const BUCKETS: usize = ((EXPONENT_MAX - 2) * SUB_BUCKETS_PER_OCTAVE + 1) as usize;

/// The bucket of a duration. Without loops or divisions, for the BPF verifier.
#[inline(always)]
#[must_use]
pub const fn bucket_of_ns(ns: u64) -> usize {
    if ns < SUB_BUCKETS_PER_OCTAVE as u64 {
        return ns as usize;
    }
    if ns >> EXPONENT_MAX != 0 {
        return BUCKETS - 1;
    }
    let exponent = log2(ns);
    let part = (ns >> (exponent - 3)) & 7;
    (exponent as usize - 2) * SUB_BUCKETS_PER_OCTAVE as usize + part as usize
}

/// The largest duration in a bucket, ns; `u64::MAX` for the last.
#[must_use]
pub const fn bucket_upper_ns(bucket: usize) -> u64 {
    if bucket >= BUCKETS - 1 {
        return u64::MAX;
    }
    if bucket < SUB_BUCKETS_PER_OCTAVE as usize {
        return bucket as u64;
    }
    let exponent = (bucket / SUB_BUCKETS_PER_OCTAVE as usize + 2) as u32;
    let part = (bucket % SUB_BUCKETS_PER_OCTAVE as usize) as u64;
    ((8 + part + 1) << (exponent - 3)) - 1
}

/// Position of the highest bit by halving: BPF before its fourth instruction set has no count-leading-zeros.
#[inline(always)]
const fn log2(mut value: u64) -> u32 {
    let mut result = 0;
    if value >> 32 != 0 {
        value >>= 32;
        result += 32;
    }
    if value >> 16 != 0 {
        value >>= 16;
        result += 16;
    }
    if value >> 8 != 0 {
        value >>= 8;
        result += 8;
    }
    if value >> 4 != 0 {
        value >>= 4;
        result += 4;
    }
    if value >> 2 != 0 {
        value >>= 2;
        result += 2;
    }
    if value >> 1 != 0 {
        result += 1;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_bounds_are_tight() {
        let mut lower = 0;
        for bucket in 0..BUCKETS - 1 {
            let upper = bucket_upper_ns(bucket);
            assert!(upper >= lower, "bucket {bucket}");
            assert_eq!(bucket_of_ns(lower), bucket, "lower bound {lower}");
            assert_eq!(bucket_of_ns(upper), bucket, "upper bound {upper}");
            if lower >= 8 {
                assert!((upper - lower + 1) * 8 <= lower, "bucket {bucket} is wider than an eighth: {lower}..={upper}");
            }
            lower = upper + 1;
        }
        assert_eq!(lower, 1 << EXPONENT_MAX);
        assert_eq!(bucket_of_ns(lower), BUCKETS - 1);
        assert_eq!(bucket_of_ns(u64::MAX), BUCKETS - 1);
    }
}
