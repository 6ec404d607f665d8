//! Keys that somebody presses: in the machines of `cargo xtask vm` QEMU does, when it is asked over a serial line. And the
//! keys and switches of a tablet, which QEMU has not. What a reader of the evdev device got is compared with what was done,
//! and with what the probes saw.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::report::Report;
use crate::stage::{Stage, give};
use crate::support::pipe;
use crate::tablet::{self, Tablet};
use warmswap_sensor::{Class, Detail, Sensor};

const INPUT_MAJOR: u32 = 13;

pub(crate) const EV_KEY: u16 = 1;
pub(crate) const EV_SW: u16 = 5;
const KEY_A: u16 = 30;
const KEY_ROTATE_DISPLAY: u16 = 153;
const KEY_ROTATE_LOCK_TOGGLE: u16 = 0x231;
const SW_TABLET_MODE: u16 = 1;
const SW_ROTATE_LOCK: u16 = 12;

/// Counters and classes that only an input device makes grow.
const EVDEV: [&str; 3] = ["device_inputs", "orientation_changes", "orientation"];

/// The PC's keyboard, as its driver calls it.
const KEYBOARD: &str = "AT Translated Set 2 keyboard";
const KEYS: [Kind; 1] = [(EV_KEY, KEY_A, 10)];
const FLIPS: [Kind; 4] = [
    (EV_KEY, KEY_ROTATE_DISPLAY, 6),
    (EV_KEY, KEY_ROTATE_LOCK_TOGGLE, 2),
    (EV_SW, SW_TABLET_MODE, 4),
    (EV_SW, SW_ROTATE_LOCK, 2),
];
/// Every time that a switch moves or a key is pressed, but not when it is let go.
const TURNS: u64 = 3 + 1 + 4 + 2;

const PATIENCE: Duration = Duration::from_secs(30);

/// Type and code of an event, and how many come: every key goes down and up, every switch on and off.
pub(crate) type Kind = (u16, u16, u64);

/// The line over which somebody is asked, in the machines that have one.
pub(crate) fn line() -> Option<PathBuf> {
    std::env::var_os("WARMSWAP_KEYBOARD").map(PathBuf::from)
}

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    let Some(line) = line() else {
        return report.elsewhere("input", &EVDEV, "nobody is there to press keys; `cargo xtask vm` has somebody");
    };
    let mut line = open(&line);
    act(sensor, report, KEYBOARD, &KEYS, 0, || {
        KEYS.iter().for_each(|(.., times)| ask(&mut line, &format!("press a {}", times / 2)));
    });
    match Tablet::new(&FLIPS) {
        Ok(mut tablet) => act(sensor, report, tablet::NAME, &FLIPS, TURNS, || {
            for (kind, code, times) in FLIPS {
                (0..times).for_each(|time| tablet.send(kind, code, i32::from(time % 2 == 0)));
            }
        }),
        Err(_) if is_cloud_kernel() => report.note("input", "no tablet: Debian's cloud kernels have no uinput"),
        Err(reason) => report.undriven("input", &EVDEV, &reason),
    }
}

fn is_cloud_kernel() -> bool {
    fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs").contains("-cloud-")
}

/// Reads a device in the watched cgroup while somebody does `what`, which makes events of these kinds,
/// of which so many turn the screen.
fn act(sensor: &mut Sensor, report: &mut Report, device: &str, kinds: &[Kind], turns: u64, what: impl FnOnce()) {
    let Some(path) = path_of(device) else {
        return report.undriven("input", &EVDEV, &format!("no input device is called {device}"));
    };
    let mut stage = Stage::new(sensor);
    let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a plain path");
    let (told, tell) = pipe();
    let child = stage.cgroup.spawn(|| read_events(&path, kinds, tell.as_raw_fd()));
    let mut told = File::from(told);
    receive::<1>(&mut told);
    what();
    let bytes = receive::<{ size_of::<Got>() }>(&mut told);
    // SAFETY: the child wrote one whole, and it is plain numbers.
    let got: Got = unsafe { bytes.as_ptr().cast::<Got>().read_unaligned() };
    assert_eq!(child.wait(), 0, "the work itself failed");

    let counts = stage.counts();
    let done: Vec<u64> = kinds.iter().map(|(.., times)| *times).collect();
    report.exact("input", &format!("events of {device}"), done, got.events[..kinds.len()].to_vec());
    count!(report, "input", counts.device_inputs == got.reads);
    count!(report, "orientation", counts.orientation_changes == turns);
    let events = stage.events();
    let told = events.iter().map(|event| if let Detail::Orientation { times, .. } = event.detail { times } else { 0 });
    report.events("orientation", Class::Orientation, turns, told.map(u64::from).sum());
    let lengths: Vec<u64> = events
        .iter()
        .filter_map(|event| match event.detail {
            Detail::Input { device_major: INPUT_MAJOR, bytes, .. } => Some(bytes),
            _ => None,
        })
        .collect();
    report.events("input", Class::Input, (got.reads, got.bytes), (lengths.len() as u64, lengths.iter().sum()));
}

fn path_of(device: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/class/input").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).find_map(
        |event| {
            let name = fs::read_to_string(format!("/sys/class/input/{event}/device/name")).ok()?;
            (event.starts_with("event") && name.trim() == device).then(|| Path::new("/dev/input").join(event))
        },
    )
}

fn open(line: &Path) -> File {
    let line = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(line);
    let line = line.expect("the line to whoever presses keys");
    // SAFETY: our own descriptor and stack.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(line.as_raw_fd(), &raw mut settings), 0, "a serial line");
        libc::cfmakeraw(&raw mut settings);
        settings.c_cflag |= libc::CLOCAL;
        assert_eq!(libc::tcsetattr(line.as_raw_fd(), libc::TCSANOW, &raw const settings), 0);
    }
    line
}

fn ask(line: &mut File, request: &str) {
    line.write_all(format!("{request}\n").as_bytes()).expect("asks");
    let mut answer = String::new();
    while !answer.ends_with('\n') {
        let [byte] = receive::<1>(line);
        answer.push(char::from(byte));
    }
    assert_eq!(answer, "done\n", "{request}");
}

/// So many bytes, or a failure instead of a test that hangs.
fn receive<const N: usize>(from: &mut File) -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let mut wait = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry of our own.
        let ready = unsafe { libc::poll(&raw mut wait, 1, PATIENCE.as_millis() as i32) };
        assert_eq!(ready, 1, "nothing came for {} s", PATIENCE.as_secs());
        let more = from.read(&mut bytes[filled..]).expect("reads");
        assert!(more > 0, "the other end is gone");
        filled += more;
    }
    bytes
}

/// What a reader of a device got.
#[derive(Default, Clone, Copy)]
#[repr(C)]
struct Got {
    reads: u64,
    bytes: u64,
    events: [u64; 8],
}

/// In a child: opens the device, says so, reads until every event has come, tells what came.
fn read_events(device: &CString, kinds: &[Kind], tell: i32) -> i32 {
    const EMPTY: libc::input_event =
        libc::input_event { time: libc::timeval { tv_sec: 0, tv_usec: 0 }, type_: 0, code: 0, value: 0 };
    // The kernel repeats a key that stays down long enough; nobody did that.
    const REPEATED: i32 = 2;
    let mut events = [EMPTY; 64];
    let mut got = Got::default();
    // SAFETY: our own path, descriptors and stack; every bit pattern is an event.
    unsafe {
        let fd = libc::open(device.as_ptr(), libc::O_RDONLY);
        if fd < 0 {
            return 1;
        }
        give(tell);
        let all: u64 = kinds.iter().map(|(.., times)| times).sum();
        while got.events.iter().sum::<u64>() < all {
            let bytes = libc::read(fd, events.as_mut_ptr().cast(), size_of_val(&events));
            if bytes <= 0 {
                return 2;
            }
            got.reads += 1;
            got.bytes += bytes as u64;
            for event in &events[..bytes as usize / size_of::<libc::input_event>()] {
                let kind = kinds.iter().position(|(kind, code, _)| (event.type_, event.code) == (*kind, *code));
                if let Some(kind) = kind
                    && event.value != REPEATED
                {
                    got.events[kind] += 1;
                }
            }
        }
        libc::write(tell, (&raw const got).cast(), size_of::<Got>());
    }
    0
}
