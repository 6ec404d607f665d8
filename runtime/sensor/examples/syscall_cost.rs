//! What the probes add to a system call: pairs of runs in this process, alternating between probes attached and not,
//! in a watched cgroup. Prints the fastest of many short runs, which a busy host disturbs least; ratios of these, not the figures themselves, carry over to other machines.
//!
//! Not a benchmark of the project (those live in `bench/`); a tool for whoever changes a probe.

use std::time::Instant;

use warmswap_sensor::{CgroupMounts, Sensor, SensorConfig, cgroup_id};

const CALLS: u32 = 2_000;
const BATCHES: usize = 200;
const ROUNDS: usize = 7;

fn getppid_ns() -> f64 {
    let begin = Instant::now();
    for _ in 0..CALLS {
        // SAFETY: no arguments.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
    begin.elapsed().as_nanos() as f64 / f64::from(CALLS)
}

fn read_ns() -> f64 {
    let mut bytes = [0u8; 100];
    // SAFETY: a constant path, our own stack, the descriptors just opened.
    unsafe {
        let low = libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY);
        let fd = libc::fcntl(low, libc::F_DUPFD, 10);
        let begin = Instant::now();
        for _ in 0..CALLS {
            libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len());
        }
        let ns = begin.elapsed().as_nanos() as f64 / f64::from(CALLS);
        libc::close(fd);
        libc::close(low);
        ns
    }
}

fn fastest(run: fn() -> f64) -> f64 {
    (0..BATCHES).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let v2 = CgroupMounts::of_host()?.v2.ok_or("no cgroup v2 hierarchy is mounted")?;
    let folder = v2.join(format!("warmswap-test-cost-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let joined = std::fs::write(folder.join("cgroup.procs"), "0");
    let result = joined.map_err(Into::into).and_then(|()| measure(&folder));
    std::fs::write(v2.join("cgroup.procs"), "0")?;
    std::fs::remove_dir(&folder)?;
    result
}

fn measure(folder: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let id = cgroup_id(folder)?;
    for (what, run) in [("getppid", getppid_ns as fn() -> f64), ("read of 100 B", read_ns)] {
        for watched in [true, false] {
            let (mut without, mut added) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let bare = fastest(run);
                let mut sensor = Sensor::load(SensorConfig::default())?;
                sensor.start()?;
                if watched {
                    sensor.watch(id)?;
                }
                let probed = fastest(run);
                drop(sensor);
                without.push(bare);
                added.push(probed - bare);
            }
            let whose = if watched { "watched" } else { "not watched" };
            println!("{what}, {whose}: {:.0} ns without, {:.0} ns added", median(without), median(added));
        }
    }
    Ok(())
}
