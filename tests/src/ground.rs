//! A place of its own for an agent and its services, and the command line as a user calls it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tempfile::TempDir;
use warmswap_rootfs::pack_rootfs_as;

use crate::Inventory;

/// Run and state folders of one agent in a temporary folder. When dropped it ends everything that runs there, also when
/// the test has failed; a test that wants to know that nothing is left calls [`Ground::finish`].
#[derive(Debug)]
pub struct Ground {
    folder: TempDir,
    before: Inventory,
    finished: bool,
    /// `None`: the `warmswap` that was built with this test program.
    warmswap: Option<PathBuf>,
    /// Released when dropped.
    _turn: File,
}

/// What the command line said.
#[derive(Debug, Clone)]
pub struct Said {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == Some(0)
    }
}

impl Ground {
    /// Waits until no other ground exists on this machine: what one has would be left behind to the other.
    ///
    /// # Errors
    /// When there is no place for temporary files.
    pub fn new() -> Result<Self> {
        let turn = turn()?;
        let folder = tempfile::Builder::new().prefix("warmswap-test-").tempdir().context("cannot make a folder")?;
        let run_dir = folder.path().join("run");
        let state_dir = folder.path().join("state");
        for path in [&run_dir, &state_dir] {
            fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let before = Inventory::take(&run_dir, &state_dir);
        Ok(Self { folder, before, finished: false, warmswap: None, _turn: turn })
    }

    /// With another `warmswap`: the one before an upgrade, or a stand-in.
    ///
    /// # Errors
    /// As [`Ground::new`].
    pub fn using(warmswap: &Path) -> Result<Self> {
        let mut ground = Self::new()?;
        ground.warmswap = Some(warmswap.to_owned());
        Ok(ground)
    }

    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// For images, service files and whatever else a scenario needs.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `warmswap` with our folders in its environment.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn command(&self) -> Result<Command> {
        let mut command = Command::new(match &self.warmswap {
            Some(path) => path.clone(),
            None => program("warmswap")?,
        });
        command.env("WARMSWAP_RUN_DIR", self.run_dir()).env("WARMSWAP_STATE_DIR", self.state_dir());
        command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        Ok(command)
    }

    /// Runs `warmswap` with these arguments to its end.
    ///
    /// # Errors
    /// When it cannot be started. That it fails is no error here: look at [`Said::status`].
    pub fn warmswap(&self, arguments: &[&str]) -> Result<Said> {
        let mut command = self.command()?;
        let Output { status, stdout, stderr } = command.args(arguments).output().context("cannot run warmswap")?;
        let text = |bytes| String::from_utf8(bytes).context("warmswap printed something that is no UTF-8");
        Ok(Said { status: status.code(), stdout: text(stdout)?, stderr: text(stderr)? })
    }

    /// Runs `warmswap … --json`, which must succeed and print one document. Of several lines, each a document, it
    /// returns an array.
    ///
    /// # Errors
    /// When it fails or prints anything else.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let said = self.warmswap(&[arguments, &["--json"]].concat())?;
        if !said.success() {
            bail!("`warmswap {}` ended with {:?}: {}", arguments.join(" "), said.status, said.stderr.trim());
        }
        let documents: Vec<Value> = serde_json::Deserializer::from_str(&said.stdout)
            .into_iter()
            .collect::<Result<_, _>>()
            .with_context(|| format!("`warmswap {} --json` printed {:?}", arguments.join(" "), said.stdout))?;
        match <[Value; 1]>::try_from(documents) {
            Ok([document]) => Ok(document),
            Err(documents) => Ok(Value::Array(documents)),
        }
    }

    /// Packs one of our programs, with the libraries it loads, into an image folder. All images have the program as
    /// `/bin/service`, so that one service file fits all versions.
    ///
    /// # Errors
    /// When the program has not been built, or a file cannot be written.
    pub fn image(&self, name: &str, program_name: &str) -> Result<PathBuf> {
        let image = self.folder.path().join("images").join(name);
        pack_rootfs_as(&program(program_name)?, &image, Some("service"))?;
        Ok(image)
    }

    /// Writes a service file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn service_file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(format!("{name}.toml"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Ends everything as a user would, then looks for whatever is left on the machine.
    ///
    /// # Errors
    /// When `warmswap stop --all` fails or something is left.
    pub fn finish(mut self) -> Result<()> {
        self.finished = true;
        self.stop_all()?;
        self.before.nothing_left()?;
        Ok(())
    }

    /// The machine as it was before, for a test that ends everything in its own way.
    #[must_use]
    pub fn before(&self) -> &Inventory {
        &self.before
    }

    fn stop_all(&self) -> Result<()> {
        let said = self.warmswap(&["stop", "--all"])?;
        if !said.success() {
            bail!("`warmswap stop --all` ended with {:?}: {}", said.status, said.stderr.trim());
        }
        Ok(())
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = self.stop_all() {
            eprintln!("left behind after a test: {error:#}");
        }
    }
}

/// Held by one ground at a time, also across test programs.
fn turn() -> Result<File> {
    let path = std::env::temp_dir().join("warmswap-tests.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// One of our programs: where `cargo xtask test` says, or beside this program or the folder of it (`target/release/deps`).
///
/// # Errors
/// When it is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where the test program lies")?;
    // A test program lies in `deps`, one folder deeper than programs do.
    let beside = own.ancestors().skip(1).take(2).map(Path::to_owned);
    let told = std::env::var_os("WARMSWAP_BIN_DIR").map(PathBuf::from);
    let folders: Vec<PathBuf> = told.into_iter().chain(beside).collect();
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        let folders: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
        format!("{name} has not been built (looked in {}): run `cargo build --release`", folders.join(" and "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Agent;

    /// A `warmswap` that answers `status`, can be an agent, and ends it on `stop --all` unless told to forget.
    fn stand_in(folder: &Path, stop: &str) -> PathBuf {
        let path = folder.join("stand-in");
        let script = format!(
            "#!/bin/sh\ncase \"$1\" in\n\
             agent) echo ready >\"$WARMSWAP_RUN_DIR/up\"; echo hello; exec sleep 600;;\n\
             status) [ -e \"$WARMSWAP_RUN_DIR/up\" ] || exit 3; echo '{{\"services\": []}}';;\n\
             lines) echo '{{\"n\": 1}}'; echo '{{\"n\": 2}}';;\n\
             stop) {stop};;\n\
             *) echo \"no such verb: $1\" >&2; exit 2;;\nesac\n"
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn an_agent_comes_up_answers_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let ground = Ground::using(&stand_in(folder.path(), "rm -f \"$WARMSWAP_RUN_DIR/up\"")).unwrap();
        assert!(ground.json(&["status"]).is_err());
        let agent = Agent::start(&ground).unwrap();
        assert_eq!(ground.json(&["status"]).unwrap(), serde_json::json!({"services": []}));
        assert_eq!(ground.json(&["lines"]).unwrap(), serde_json::json!([{"n": 1}, {"n": 2}]));
        let unknown = ground.warmswap(&["dance"]).unwrap();
        assert_eq!((unknown.status, unknown.stderr.trim()), (Some(2), "no such verb: dance"));
        assert!(agent.log().contains("hello"));
        assert!(!agent.terminate().unwrap().success());
        ground.finish().unwrap();
    }

    #[test]
    fn what_stop_forgets_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let ground = Ground::using(&stand_in(folder.path(), "true")).unwrap();
        let agent = Agent::start(&ground).unwrap();
        let error = format!("{:#}", ground.finish().unwrap_err());
        agent.kill().unwrap();
        assert!(error.contains("process ") && error.contains("/run/up"), "{error}");
    }

    #[test]
    fn an_agent_that_does_not_start_is_reported_with_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stand-in");
        fs::write(&path, "#!/bin/sh\n[ \"$1\" = stop ] || { echo no memory; exit 1; }\n").unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let ground = Ground::using(&path).unwrap();
        let error = format!("{:#}", Agent::start(&ground).unwrap_err());
        assert!(error.contains("exit status: 1") && error.contains("no memory"), "{error}");
    }

    #[test]
    fn a_program_that_was_not_built_is_reported_with_where_it_should_be() {
        let error = format!("{:#}", program("no-such-program").unwrap_err());
        assert!(error.contains("no-such-program") && error.contains("cargo build"), "{error}");
    }
}
