//! Virtual machines for what this host cannot show: another kernel, pure cgroup v2. QEMU with a Debian cloud kernel and
//! an archive in memory that holds the programs to run with their libraries; nothing is installed, nothing is kept.
//!
//! Emulated: it shows that something is correct, never how fast it is.

mod console;
mod cpio;
pub(crate) mod kernel;
mod keyboard;
mod matrix;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::run;
use crate::test::{in_vm, programs};
use console::{Console, Heard};
use cpio::Archive;

pub(crate) use console::CommandOutcome;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which kernel lines, with commas between them; `host` is this machine as it is, for the matrix only
    #[arg(long, default_value = "6.1", value_delimiter = ',', value_parser = [&kernel::names()[..], &[matrix::HOST]].concat())]
    kernel: Vec<String>,
    /// Run the test programs of this package (may be given more than once)
    #[arg(long, short)]
    package: Vec<String>,
    /// Run one end-to-end scenario, or all whose name contains this
    #[arg(long)]
    scenario: Option<String>,
    /// Run only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// Run this shell command (busybox) instead
    #[arg(long)]
    command: Option<String>,
    /// Put this file of the host, with its libraries if it is a program, at the same path (may be given more than once)
    #[arg(long)]
    file: Vec<PathBuf>,
    /// After the matrix: keep what the verifier needed as what is allowed from now on
    #[arg(long)]
    record: bool,
}

/// How a machine went.
#[derive(Debug)]
pub(crate) struct VmOutcome {
    /// `uname -r`.
    pub(crate) release: String,
    /// From power on until the first command.
    pub(crate) boot: Duration,
    /// In the order given; those after a time-out or a crash have no status.
    pub(crate) commands: Vec<CommandOutcome>,
    /// Why the machine did not get through, if it did not.
    pub(crate) trouble: Option<String>,
}

/// What to run, and how long all of it may take once the machine is up.
pub(crate) struct Job<'a> {
    pub(crate) kernel: &'a str,
    /// Host path and guest path. Libraries of programs come along by themselves.
    pub(crate) files: &'a [(PathBuf, PathBuf)],
    /// One line of shell each.
    pub(crate) commands: &'a [String],
    pub(crate) time_max: Duration,
}

const DISK: &str = "disk";
const SCRATCH: &str = "scratch";
/// The machine's disks: empty, sparse, gone with the machine.
const DISK_BYTES: u64 = 256 << 20;
const SCRATCH_BYTES: u64 = 16 << 20;
/// By which programs inside know the disk that may be overwritten. At most 20 characters.
const SCRATCH_SERIAL: &str = "warmswap-scratch";

const BOOT_TIME_MAX: Duration = Duration::from_secs(300);

/// The word on the kernel's command line that would stop for a debugger, and so on: none of that. `loglevel=1` keeps
/// the console for the tests but lets a panic through; `panic=-1` with `-no-reboot` ends QEMU.
const KERNEL_LINE: &str = "console=ttyS0 panic=-1 quiet loglevel=1 random.trust_cpu=on tsc=reliable";

pub(crate) fn run_verb(options: &Options) -> Result<()> {
    let tests = !options.package.is_empty() || options.scenario.is_some() || options.filter.is_some();
    if options.command.is_none() && !tests {
        return matrix::run(&options.kernel, options.record);
    }
    // Built and run kernel by kernel: what fails on one is to be seen before the next begins.
    options.kernel.iter().try_for_each(|kernel| match &options.command {
        Some(command) => run_shell(kernel, command, &options.file),
        None => run_tests(kernel, options),
    })
}

fn run_shell(kernel: &str, command: &String, files: &[PathBuf]) -> Result<()> {
    let files: Vec<_> = files.iter().map(|f| (f.clone(), f.clone())).collect();
    let job =
        Job { kernel, files: &files, commands: std::slice::from_ref(command), time_max: Duration::from_secs(600) };
    let outcome = boot(&job, &mut |_, line| println!("{line}"))?;
    eprintln!("vm: {}, up after {:.1} s", outcome.release, outcome.boot.as_secs_f64());
    if let Some(trouble) = outcome.trouble {
        bail!("{trouble}");
    }
    match outcome.commands[0].status {
        Some(0) => Ok(()),
        Some(status) => bail!("the command ended with status {status}"),
        None => bail!("the command did not end"),
    }
}

fn run_tests(kernel: &str, options: &Options) -> Result<()> {
    let mut packages = options.package.clone();
    let filter = options.scenario.as_ref().or(options.filter.as_ref());
    if options.scenario.is_some() {
        packages = vec!["warmswap-tests".to_owned()];
    }
    if packages.is_empty() {
        packages = in_vm::PACKAGES.map(str::to_owned).to_vec();
    }
    let built = programs::build(&packages)?;
    in_vm::run_alone(kernel, &built, filter.map(String::as_str))
}

/// Boots, runs the commands, switches off. `show` gets each line of output with the number of its command as it comes.
pub(crate) fn boot(job: &Job<'_>, show: &mut dyn FnMut(usize, &str)) -> Result<VmOutcome> {
    let kernel = kernel::fetch(job.kernel)?;
    // Its own folder, so that two may run at once.
    let folder = Scratch::new(run::target().join("vm").join(format!("run-{}", std::process::id())))?;
    let word = format!("vm-{}", random_word()?);
    let archive = folder.0.join("initramfs");
    let size = pack(job, &kernel, &word, &folder.0)?.write(&archive)?;
    for (disk, bytes) in [(DISK, DISK_BYTES), (SCRATCH, SCRATCH_BYTES)] {
        let disk = folder.0.join(disk);
        let file = fs::File::create(&disk).with_context(|| format!("cannot create {}", disk.display()))?;
        file.set_len(bytes).with_context(|| format!("cannot make {} as large as a disk", disk.display()))?;
    }
    let mut qemu = qemu(&kernel.image, &archive, size);
    let started = Instant::now();
    let errors = folder.0.join("qemu.log");
    let log = fs::File::create(&errors).with_context(|| format!("cannot create {}", errors.display()))?;
    let mut child = qemu
        .current_dir(&folder.0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start `{}`", run::shown(&qemu)))?;
    let stdout = child.stdout.take().context("QEMU has no standard output")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });

    let mut console = Console::new(word);
    let mut boot = None;
    let mut trouble = None;
    let mut current = 0;
    let mut began = started;
    loop {
        let deadline = boot.map_or(BOOT_TIME_MAX, |boot| boot + job.time_max);
        match receiver.recv_timeout(deadline.saturating_sub(started.elapsed())) {
            Ok(line) => {
                match console.line(&line) {
                    Heard::Begin(number) => (current, began) = (number, Instant::now()),
                    Heard::End(number) => {
                        if let Some(command) = console.commands.get_mut(&number) {
                            command.time = began.elapsed();
                        }
                    }
                    Heard::Output => show(current, &line),
                    Heard::Control | Heard::Other => {}
                }
                if console.release.is_some() && boot.is_none() {
                    boot = Some(started.elapsed());
                    if let Err(error) = keyboard::serve(&folder.0) {
                        trouble = Some(format!("nobody sits at its keyboard: {error:#}"));
                        child.kill().context("cannot end QEMU")?;
                        break;
                    }
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let what = if boot.is_some() { format!("in command {current}") } else { "while it booted".to_owned() };
                trouble = Some(format!("the machine was not done after {} s, {what}", deadline.as_secs()));
                child.kill().context("cannot end QEMU")?;
                break;
            }
        }
    }
    child.wait().context("cannot wait for QEMU")?;
    if !console.done && trouble.is_none() {
        let said = fs::read_to_string(&errors).unwrap_or_default();
        let last = console.other.iter().rev().take(20).rev().map(|l| format!("\n  {l}")).collect::<String>();
        trouble = Some(format!("the machine stopped in the middle, in command {current}: {}{last}", said.trim()));
    }
    let commands = (0..job.commands.len()).map(|i| console.commands.remove(&i).unwrap_or_default()).collect();
    Ok(VmOutcome {
        release: console.release.unwrap_or_else(|| "kernel that did not come up".to_owned()),
        boot: boot.unwrap_or_default(),
        commands,
        trouble,
    })
}

/// Started in the folder that holds the disks.
fn qemu(kernel: &Path, archive: &Path, archive_bytes: u64) -> Command {
    // The archive is there twice for a moment: as it was loaded, and unpacked. The unpacked one may take half.
    let memory_mb = (archive_bytes / (1 << 20)) * 3 + 2048;
    // Should we be killed, the machine goes with us. (setpriv becomes QEMU, so the process id is QEMU's.)
    let mut command = if run::on_path("setpriv") {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command
    } else {
        Command::new("qemu-system-x86_64")
    };
    // Not KVM, even where there is a /dev/kvm: nested, it may fail only once the machine runs, and then QEMU does not
    // fall back. Emulation is the same everywhere. One thread for both processors: with one each, QEMU before 8.1 may go on
    // executing an instruction that the other one has replaced, and a kernel that patches itself (every probe that attaches
    // makes it) then hangs in its int3 handler.
    command
        .args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", &memory_mb.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
        // In this order they are vda and vdb.
        .args(["-drive", &format!("if=none,id=disk,format=raw,cache=unsafe,file={DISK}")])
        .args(["-device", "virtio-blk-pci,drive=disk"])
        .args(["-drive", &format!("if=none,id=scratch,format=raw,cache=unsafe,file={SCRATCH}")])
        .args(["-device", &format!("virtio-blk-pci,drive=scratch,serial={SCRATCH_SERIAL}")])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(archive)
        .args(["-append", KERNEL_LINE]);
    keyboard::options(&mut command);
    command
}

fn pack(job: &Job<'_>, kernel: &kernel::Kernel, word: &str, scratch: &Path) -> Result<Archive> {
    let mut archive = Archive::default();
    archive.text("/init", include_str!("init.sh"), 0o755)?;
    // Where cargo's tests expect a folder on a disk (`CARGO_TARGET_TMPDIR`).
    archive.text("/disk", format!("{}\n", run::target().join("tmp").display()), 0o644)?;
    archive.text("/word", format!("{word}\n"), 0o644)?;
    let mut commands = String::new();
    for command in job.commands {
        if command.contains('\n') {
            bail!("a command for the virtual machine is one line: {command:?}");
        }
        commands += command;
        commands.push('\n');
    }
    archive.text("/commands", commands, 0o644)?;
    archive.text("/etc/passwd", "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", 0o644)?;
    archive.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644)?;
    archive.text("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n", 0o644)?;
    archive.device("/dev/console", 5, 1)?;
    archive.device("/dev/null", 1, 3)?;
    for folder in ["/proc", "/sys", "/tmp", "/run", "/var", "/newroot", "/sbin", "/usr/bin", "/usr/sbin"] {
        archive.folder(folder)?;
    }
    archive.copy(&busybox()?, Path::new("/bin/busybox"))?;
    archive.link("/bin/sh", "busybox")?;

    let mut order = String::new();
    for module in &kernel.modules {
        let name = module.file_name().context("a module without a name")?.to_string_lossy();
        archive.copy(module, &Path::new("/modules").join(name.as_ref()))?;
        order += &format!("{name}\n");
    }
    archive.text("/modules/order", order, 0o644)?;

    for (number, (host, guest)) in job.files.iter().enumerate() {
        if !is_elf(host)? {
            archive.copy(host, guest)?;
            continue;
        }
        for library in warmswap_rootfs::libraries(host)? {
            if !archive.contains(&library) {
                archive.copy(&library, &library)?;
            }
        }
        archive.copy(&stripped(host, &scratch.join(format!("stripped-{number}"))), guest)?;
    }
    Ok(archive)
}

/// It must be static: nothing else is there when it starts.
fn busybox() -> Result<PathBuf> {
    let path = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from).into_iter().find(|p| p.is_file());
    let path = path.context("busybox is missing: run `cargo xtask setup`")?;
    if warmswap_rootfs::interpreter(&path)?.is_some() {
        bail!("{} is not static: install busybox-static", path.display());
    }
    Ok(path)
}

fn is_elf(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let mut file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(file.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF")
}

/// A copy without debug information, which is most of a program and has to go through emulated memory; the program
/// itself where that does not work.
fn stripped(program: &Path, to: &Path) -> PathBuf {
    let done = Command::new("strip").arg("--strip-debug").arg("-o").args([to, program]).output();
    if done.is_ok_and(|o| o.status.success()) { to.to_owned() } else { program.to_owned() }
}

fn random_word() -> Result<String> {
    let mut bytes = [0; 8];
    fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).context("cannot read /dev/urandom")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// A folder that goes when we do.
struct Scratch(PathBuf);

impl Scratch {
    fn new(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("vm: cannot remove {}: {error}", self.0.display());
        }
    }
}
