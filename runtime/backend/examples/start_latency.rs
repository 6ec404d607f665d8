//! From "create" to the first instruction of the user's program, beside `runc run`, in pairs and alternating. Needs root,
//! busybox-static and runc: `cargo run -p warmswap-backend --example start_latency -- [pairs]`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use warmswap_backend::{Backend, ContainerId, ContainerSpec, EmbeddedBackend, EmbeddedConfig, Limits, NamedFd};
use warmswap_model::{Generation, ImageRef, ServiceName};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SAY: &str = "echo x >&3";

fn main() -> ExitCode {
    if let Some(code) = warmswap_backend::internal_main() {
        return code;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let pairs: u32 = std::env::args().nth(1).map_or(Ok(20), |n| n.parse())?;
    let folder = std::env::temp_dir().join(format!("warmswap-start-{}", std::process::id()));
    let root = folder.join("rootfs");
    for name in ["bin", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    std::os::unix::fs::symlink("busybox", root.join("bin/sh"))?;
    let config =
        EmbeddedConfig { run_dir: folder.join("run"), state_dir: folder.join("state"), ..EmbeddedConfig::default() };
    let result = compare(&folder, &root, config, pairs);
    warmswap_backend::purge(&folder.join("run"))?;
    fs::remove_dir_all(&folder)?;
    result
}

fn compare(folder: &Path, root: &Path, config: EmbeddedConfig, pairs: u32) -> Result<()> {
    let backend = EmbeddedBackend::new(config)?;
    let image = backend.prepare_image(&ImageRef(root.to_owned()))?;
    let service = ServiceName::new("latency")?;
    backend.open_service(&service, &BTreeMap::new())?;
    let bundle = folder.join("bundle");
    make_bundle(&bundle, root)?;
    let (mut ours, mut create, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..pairs {
        let id = ContainerId { service: service.clone(), generation: Generation(pair + 1) };
        let spec = ContainerSpec {
            id: id.clone(),
            image: image.clone(),
            command: Some(vec!["/bin/sh".into(), "-c".into(), SAY.into()]),
            env: BTreeMap::new(),
            limits: Limits { memory_mb_max: Some(64.0), cpu_pct_max: Some(100.0), ..Limits::default() },
        };
        let one = |ours: &mut Vec<_>, create: &mut Vec<_>| -> Result<()> {
            let (mut reader, writer) = std::io::pipe()?;
            let begun = Instant::now();
            backend.create(&spec, vec![NamedFd { name: "say".into(), fd: writer.into() }], vec![])?;
            create.push(begun.elapsed());
            backend.start(&id)?;
            reader.read_exact(&mut [0])?;
            ours.push(begun.elapsed());
            backend.wait(&id, Duration::from_secs(10))?;
            backend.destroy(&id)?;
            Ok(())
        };
        // Who goes first alternates too.
        if pair % 2 == 0 {
            one(&mut ours, &mut create)?;
            theirs.push(runc(&bundle, pair)?);
        } else {
            theirs.push(runc(&bundle, pair)?);
            one(&mut ours, &mut create)?;
        }
    }
    backend.close_service(&service)?;
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a.as_secs_f64() / b.as_secs_f64()).collect();
    println!("pairs                      {pairs}");
    println!("create + start, p50        {:.1} ms (create alone {:.1} ms)", median(&ours), median(&create));
    println!("runc run, p50              {:.1} ms", median(&theirs));
    println!("ratio within pairs, p50    {:.2}", middle(ratios));
    Ok(())
}

fn median(times: &[Duration]) -> f64 {
    middle(times.iter().map(|time| time.as_secs_f64() * 1000.0).collect())
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The bundle `runc spec` makes, with our program and limits in it.
fn make_bundle(bundle: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(bundle)?;
    if !Command::new("runc").arg("spec").current_dir(bundle).status()?.success() {
        return Err("runc spec failed".into());
    }
    let path = bundle.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!(["/bin/sh", "-c", SAY]);
    config["root"]["path"] = root.to_str().ok_or("the folder is no text")?.into();
    config["linux"]["resources"]["memory"]["limit"] = (64 << 20).into();
    config["linux"]["resources"]["cpu"] = serde_json::json!({"quota": 100_000, "period": 100_000});
    fs::write(path, config.to_string())?;
    Ok(())
}

fn runc(bundle: &Path, number: u32) -> Result<Duration> {
    let (mut reader, writer) = std::io::pipe()?;
    let raw = writer.as_raw_fd();
    let mut command = Command::new("runc");
    command.args(["run", "--preserve-fds", "1", "--bundle"]).arg(bundle).arg(format!("warmswap-latency-{number}"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: dup2 is async-signal-safe, and 3 is free in a child that has just been forked from this program.
    unsafe {
        command.pre_exec(move || match libc::dup2(raw, 3) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let begun = Instant::now();
    let mut child = command.spawn()?;
    drop(writer);
    reader.read_exact(&mut [0]).map_err(|error| format!("runc never ran the program: {error}"))?;
    let elapsed = begun.elapsed();
    child.wait()?;
    Ok(elapsed)
}
