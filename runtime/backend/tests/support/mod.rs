//! A host folder to work in, a small image, and a look at what is left on the machine.

#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use warmswap_backend::{Backend, ContainerId, ContainerSpec, EmbeddedBackend, EmbeddedConfig, Limits, PreparedImage};
use warmswap_model::{Generation, ImageRef, ServiceName};

pub const BUSYBOX: &str = "/bin/busybox";
pub const LONG: Duration = Duration::from_secs(20);

/// Why containers cannot run here, if so.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if !Path::new(BUSYBOX).exists() {
        return Some(format!("{BUSYBOX} is missing (Debian package busybox-static)"));
    }
    let needed = ["root", "cgroup v2", "overlayfs", "mnt namespace", "pid namespace", "net namespace"];
    let bad = warmswap_backend::check().into_iter().find(|f| !f.ok && needed.contains(&f.name.as_str()));
    if let Some(bad) = bad {
        return Some(format!("{}: {}", bad.name, bad.detail));
    }
    None
}

/// Says why a test is left out, in the words the test runner looks for.
#[macro_export]
macro_rules! needs_containers {
    ($name:expr) => {
        if let Some(reason) = support::missing() {
            println!("LEFT OUT: {}: {reason}", $name);
            return;
        }
    };
}

/// A runtime of its own in a temporary folder; takes everything with it when dropped, also when a test fails.
pub struct Host {
    pub folder: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn config(&self) -> EmbeddedConfig {
        EmbeddedConfig {
            run_dir: self.folder.path().join("run"),
            state_dir: self.folder.path().join("state"),
            shim_exe: env!("CARGO_BIN_EXE_warmswap-shim").into(),
        }
    }

    pub fn backend(&self) -> EmbeddedBackend {
        EmbeddedBackend::new(self.config()).unwrap()
    }

    /// What of ours is on the host: by the runtime's own account, and by looking for the folder's name in every mount
    /// table and command line, so that the account itself is checked.
    pub fn traces(&self) -> Vec<String> {
        let mut found = warmswap_backend::leftovers(&self.config().run_dir);
        let name = self.folder.path().to_str().unwrap().to_owned();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().into_string().unwrap();
            if !pid.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            for file in ["mountinfo", "cmdline"] {
                if fs::read(entry.path().join(file)).is_ok_and(|text| String::from_utf8_lossy(&text).contains(&name)) {
                    found.push(format!("/proc/{pid}/{file} names {name}"));
                }
            }
        }
        found
    }

    pub fn image(&self, name: &str) -> PathBuf {
        let root = self.folder.path().join(name);
        if !root.exists() {
            make_rootfs(&root);
        }
        root
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Err(error) = warmswap_backend::purge(&self.config().run_dir) {
            eprintln!("left behind after a test: {error}");
        }
    }
}

/// A root file system with busybox and nothing else.
pub fn make_rootfs(root: &Path) {
    for folder in ["bin", "etc", "proc", "sys", "dev", "tmp", "home/app"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for tool in ["sh", "sleep", "cat", "id", "ls", "env", "nc", "true", "mkdir", "touch", "kill", "readlink", "grep"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(tool)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1001:\nlogs:x:50:app\n").unwrap();
}

pub fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

pub fn id(name: &str, generation: u32) -> ContainerId {
    ContainerId { service: service(name), generation: Generation(generation) }
}

/// A container that runs a shell script.
pub fn script(image: &PreparedImage, id: &ContainerId, script: &str) -> ContainerSpec {
    ContainerSpec {
        id: id.clone(),
        image: image.clone(),
        command: Some(vec!["/bin/sh".into(), "-c".into(), script.into()]),
        env: BTreeMap::new(),
        limits: Limits::default(),
    }
}

pub fn prepare(backend: &dyn Backend, path: &Path) -> PreparedImage {
    backend.prepare_image(&ImageRef(path.to_owned())).unwrap()
}

/// The log of a container once it says `word`.
pub fn log_with(backend: &dyn Backend, id: &ContainerId, word: &str) -> String {
    let end = std::time::Instant::now() + LONG;
    loop {
        let log = fs::read_to_string(backend.log_path(id)).unwrap_or_default();
        if log.contains(word) {
            return log;
        }
        assert!(std::time::Instant::now() < end, "{id} never said {word:?}, but: {log}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
