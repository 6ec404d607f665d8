//! A tablet's keys and switches, by the kernel's uinput: to whoever reads it, it is an input device like any other. Only in
//! machines of our own, because a desktop would follow it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;

use super::keyboard::{EV_KEY, EV_SW, Kind};

pub(crate) const NAME: &str = "warmswap test tablet";
const UINPUT: &str = "/dev/uinput";

const EV_SYN: u16 = 0;
const UI_SET_EVBIT: libc::c_ulong = 0x4004_5564;
const UI_SET_KEYBIT: libc::c_ulong = 0x4004_5565;
const UI_SET_SWBIT: libc::c_ulong = 0x4004_556d;
const UI_DEV_SETUP: libc::c_ulong = 0x405c_5503;
const UI_DEV_CREATE: libc::c_ulong = 0x5501;

/// `struct uinput_setup`: identity, name, effects.
#[repr(C)]
struct Setup {
    id: [u16; 4],
    name: [u8; 80],
    effects: u32,
}

/// There as long as this lives.
pub(crate) struct Tablet(File);

impl Tablet {
    /// With these keys and switches; why not, when the kernel cannot.
    pub(crate) fn new(kinds: &[Kind]) -> Result<Self, String> {
        let file = OpenOptions::new().write(true).open(UINPUT).map_err(|error| format!("{UINPUT}: {error}"))?;
        let set = |request: libc::c_ulong, argument: libc::c_ulong| {
            // SAFETY: requests that take a number or, for the set-up, a live structure of the size they name.
            let done = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
            assert_eq!(done, 0, "request {request:#x}: {}", std::io::Error::last_os_error());
        };
        for (kind, code, _) in kinds {
            set(UI_SET_EVBIT, (*kind).into());
            let bit = match *kind {
                EV_KEY => UI_SET_KEYBIT,
                EV_SW => UI_SET_SWBIT,
                other => panic!("events of type {other} are not prepared for"),
            };
            set(bit, (*code).into());
        }
        const VIRTUAL: u16 = 6;
        let mut setup = Setup { id: [VIRTUAL, 1, 1, 1], name: [0; 80], effects: 0 };
        setup.name[..NAME.len()].copy_from_slice(NAME.as_bytes());
        set(UI_DEV_SETUP, (&raw const setup).addr() as libc::c_ulong);
        set(UI_DEV_CREATE, 0);
        Ok(Self(file))
    }

    pub(crate) fn send(&mut self, kind: u16, code: u16, value: i32) {
        for (kind, code, value) in [(kind, code, value), (EV_SYN, 0, 0)] {
            let mut event = [0u8; size_of::<libc::input_event>()];
            // The time before it is the kernel's to fill in.
            let time = size_of::<libc::timeval>();
            event[time..time + 2].copy_from_slice(&kind.to_ne_bytes());
            event[time + 2..time + 4].copy_from_slice(&code.to_ne_bytes());
            event[time + 4..].copy_from_slice(&value.to_ne_bytes());
            self.0.write_all(&event).expect("the kernel takes an event");
        }
    }
}
