//! Ways to bring state to another process: ours, and what is done where state is not in shared memory.

pub(super) mod frames;
pub(super) mod segments;
pub(super) mod socket_copy;
pub(super) mod tmpfs_file;
