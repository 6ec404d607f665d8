//! Listens to the verifier. The library that loads our programs asks for its log only when a program is refused, and the
//! kernel counts instructions for others only since 5.16; so this test program has a `syscall` of its own, through which the
//! library goes, and asks for the statistics of every program that is loaded.

use std::sync::Mutex;

use super::Verified;

static HEARD: Mutex<Vec<Verified>> = Mutex::new(Vec::new());

/// Every program that was loaded so far.
pub(crate) fn heard() -> Vec<Verified> {
    HEARD.lock().expect("nobody panics with it").clone()
}

#[cfg(target_arch = "x86_64")]
mod raw {
    use std::ffi::{CStr, c_long};

    use super::{HEARD, Verified};

    const PROG_LOAD: c_long = 5;
    /// Statistics only (Linux 5.2).
    const LOG_STATS: u32 = 4;
    const LOG_BYTES: usize = 64 << 10;

    /// The beginning of `union bpf_attr`, as `BPF_PROG_LOAD` has it.
    #[repr(C)]
    struct ProgLoad {
        kind: u32,
        instructions: u32,
        program: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }

    /// In place of the C library's: the same, but for the loading of programs.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn syscall(
        number: c_long,
        first: c_long,
        second: c_long,
        third: c_long,
        fourth: c_long,
        fifth: c_long,
        sixth: c_long,
    ) -> c_long {
        let arguments = [first, second, third, fourth, fifth, sixth];
        let attribute = second as *mut ProgLoad;
        let result = if number == libc::SYS_bpf && first == PROG_LOAD && third as usize >= size_of::<ProgLoad>() {
            // SAFETY: the caller gives an attribute of the size that was checked.
            unsafe { load(&mut *attribute, arguments) }
        } else {
            // SAFETY: the caller's own call.
            unsafe { kernel(number, arguments) }
        };
        if (-4095..0).contains(&result) {
            // SAFETY: this thread's errno.
            unsafe { *libc::__errno_location() = -result as i32 };
            return -1;
        }
        result
    }

    /// # Safety
    /// As for the call itself.
    unsafe fn load(attribute: &mut ProgLoad, arguments: [c_long; 6]) -> c_long {
        if attribute.log_level != 0 {
            // SAFETY: the caller's own call.
            return unsafe { kernel(libc::SYS_bpf, arguments) };
        }
        let mut log = vec![0u8; LOG_BYTES];
        (attribute.log_level, attribute.log_size, attribute.log) =
            (LOG_STATS, LOG_BYTES as u32, log.as_mut_ptr() as u64);
        // SAFETY: the caller's own call, with a log that lives through it.
        let result = unsafe { kernel(libc::SYS_bpf, arguments) };
        (attribute.log_level, attribute.log_size, attribute.log) = (0, 0, 0);
        let text =
            |bytes| CStr::from_bytes_until_nul(bytes).map(CStr::to_string_lossy).unwrap_or_default().into_owned();
        // By some small ones the library finds out what the kernel knows.
        let name = text(&attribute.name);
        if result >= 0
            && !name.is_empty()
            && !name.starts_with("aya_")
            && let Some(verified) = Verified::of(&name, &text(&log))
            && let Ok(mut heard) = HEARD.lock()
        {
            heard.push(verified);
        }
        result
    }

    /// # Safety
    /// As for the call itself.
    unsafe fn kernel(number: c_long, a: [c_long; 6]) -> c_long {
        let result;
        // SAFETY: the system call convention of this architecture; the caller answers for the call.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") number => result,
                in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
                lateout("rcx") _, lateout("r11") _,
                options(nostack)
            );
        }
        result
    }
}
