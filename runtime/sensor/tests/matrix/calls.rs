//! What is read and written through descriptors by every call that does so.

use crate::report::Report;
use crate::stage::Stage;
use warmswap_sensor::Sensor;

const TIMES: u64 = 100;
const BYTES: u64 = 512;
/// read, pread64, readv, preadv, preadv2, and the same of write.
const WAYS: u64 = 5;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let status = stage.cgroup.run(read_and_write);
    assert_eq!(status, 0, "the work itself failed");
    let counts = stage.counts();
    // One more read: the byte that let the child go.
    count!(report, "file-bytes", counts.reads == TIMES * WAYS + 1);
    count!(report, "file-bytes", counts.read_bytes == TIMES * WAYS * BYTES + 1);
    count!(report, "file-bytes", counts.writes == TIMES * WAYS);
    count!(report, "file-bytes", counts.write_bytes == TIMES * WAYS * BYTES);
}

fn read_and_write() -> i32 {
    let mut buffer = [7u8; BYTES as usize];
    let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut failed = 0;
    // SAFETY: system calls on constant paths, our own descriptors and our own stack.
    unsafe {
        let from = libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY);
        let to = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
        let (bytes, length) = (buffer.as_mut_ptr(), buffer.len());
        let vector = &raw const part;
        for _ in 0..TIMES {
            let done = [
                libc::read(from, bytes.cast(), length) as i64,
                libc::pread(from, bytes.cast(), length, 0) as i64,
                libc::readv(from, vector, 1) as i64,
                libc::preadv(from, vector, 1, 0) as i64,
                libc::syscall(libc::SYS_preadv2, from, vector, 1, 0, 0, 0),
                libc::write(to, bytes.cast(), length) as i64,
                libc::pwrite(to, bytes.cast(), length, 0) as i64,
                libc::writev(to, vector, 1) as i64,
                libc::pwritev(to, vector, 1, 0) as i64,
                libc::syscall(libc::SYS_pwritev2, to, vector, 1, 0, 0, 0),
            ];
            failed += i32::from(done != [BYTES as i64; 2 * WAYS as usize]);
        }
        // Never reaches a file.
        libc::write(-1, bytes.cast(), 1);
    }
    failed
}
