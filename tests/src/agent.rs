//! An agent in the background, to be stopped, killed and started again.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::Ground;
use crate::wait::within;

/// A virtual machine without hardware support takes its time.
const START_TIME_MAX: Duration = Duration::from_secs(60);
const STOP_TIME_MAX: Duration = Duration::from_secs(60);

/// `warmswap agent` as a child process. Dropping it kills the agent and nothing else: containers are meant to live on.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    /// Starts an agent and waits until it answers.
    ///
    /// # Errors
    /// When it ends or does not answer within a minute; with what it logged.
    pub fn start(ground: &Ground) -> Result<Self> {
        let log = ground.path("agent.log");
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("cannot open {}", log.display()))?;
        let also = file.try_clone().context("cannot duplicate a descriptor")?;
        let child =
            ground.command()?.arg("agent").stdout(file).stderr(also).spawn().context("cannot start an agent")?;
        let mut agent = Self { child, log };
        let up = within(START_TIME_MAX, || match agent.child.try_wait() {
            Ok(None) => ground.json(&["status"]).is_ok().then_some(Ok(())),
            Ok(Some(status)) => Some(Err(format!("it ended with {status}"))),
            Err(error) => Some(Err(error.to_string())),
        });
        match up {
            Some(Ok(())) => Ok(agent),
            Some(Err(why)) => bail!("the agent did not start: {why}\n{}", agent.log()),
            None => bail!("the agent did not answer within {START_TIME_MAX:?}\n{}", agent.log()),
        }
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything logged so far, by this agent and those before it on the same ground.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it like a crash does.
    ///
    /// # Errors
    /// When it had ended by itself before.
    pub fn kill(mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the agent had already ended with {status}\n{}", self.log());
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end, as a service manager does.
    ///
    /// # Errors
    /// When it does not end within a minute.
    pub fn terminate(mut self) -> Result<ExitStatus> {
        let kill = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status()?;
        if !kill.success() {
            bail!("cannot send a signal to the agent: {kill}");
        }
        match within(STOP_TIME_MAX, || self.child.try_wait().transpose()) {
            Some(status) => Ok(status?),
            None => bail!("the agent did not end within {STOP_TIME_MAX:?}\n{}", self.log()),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Fails when it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
