//! Somebody at the machine's keyboard. A program inside asks over the second serial line, QEMU (by QMP) presses the keys,
//! and the kernel inside sees them as it sees a person's: keyboard controller, driver, evdev.
//!
//! ```text
//! press a 3      three times down and up, by QEMU's name of the key ("qcode")
//! done           the answer; or `failed: ` and why
//! ```

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// Sockets in the machine's folder, where QEMU is started: a path from the root may be longer than a socket's can be.
const REQUESTS: &str = "requests";
const QMP: &str = "qmp";

/// QEMU's keyboard holds 16 bytes; a key that goes down and up makes three or more. So the machine gets some time for each.
const BETWEEN_KEYS: Duration = Duration::from_millis(30);

/// Makes QEMU listen on both. After the console's serial line, so that this is the second.
pub(super) fn options(qemu: &mut Command) {
    qemu.args(["-chardev", &format!("socket,id=requests,path={REQUESTS},server=on,wait=off")]);
    qemu.args(["-serial", "chardev:requests", "-qmp", &format!("unix:{QMP},server=on,wait=off")]);
}

/// Serves what is asked until the machine is off. `folder`: where QEMU was started.
pub(super) fn serve(folder: &Path) -> Result<()> {
    let handle = File::open(folder).with_context(|| format!("cannot open {}", folder.display()))?;
    let connect = |name: &str| {
        let path = format!("/proc/self/fd/{}/{name}", handle.as_raw_fd());
        UnixStream::connect(path).with_context(|| format!("cannot connect to QEMU's socket {name}"))
    };
    let (requests, mut qmp) = (connect(REQUESTS)?, Qmp::over(connect(QMP)?)?);
    let mut answers = requests.try_clone().context("cannot duplicate a socket")?;
    std::thread::spawn(move || {
        for line in BufReader::new(requests).lines() {
            // QEMU is gone, or said something that is no text: nobody is there to be answered.
            let Ok(line) = line else { return };
            let answer = match act(&line, &mut qmp) {
                Ok(()) => "done\n".to_owned(),
                Err(error) => format!("failed: {error:#}\n"),
            };
            if answers.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// `press KEY TIMES`
fn request(line: &str) -> Result<(&str, u32)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["press", key, times] = words[..] else { bail!("{line:?} is not `press KEY TIMES`") };
    Ok((key, times.parse().with_context(|| format!("{times:?} is no number of times"))?))
}

fn act(line: &str, qmp: &mut Qmp) -> Result<()> {
    let (key, times) = request(line)?;
    for _ in 0..times {
        let event = |down: bool| json!({"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": key}}});
        qmp.execute("input-send-event", &json!({"events": [event(true), event(false)]}))?;
        std::thread::sleep(BETWEEN_KEYS);
    }
    Ok(())
}

/// QEMU's control socket: a line of JSON each way.
struct Qmp {
    lines: std::io::Lines<BufReader<UnixStream>>,
    to: UnixStream,
}

impl Qmp {
    fn over(stream: UnixStream) -> Result<Self> {
        let to = stream.try_clone().context("cannot duplicate a socket")?;
        let mut qmp = Self { lines: BufReader::new(stream).lines(), to };
        let greeting = qmp.heard()?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU's control socket begins with {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn heard(&mut self) -> Result<Value> {
        let line = self.lines.next().context("QEMU closed its control socket")?.context("cannot hear QEMU")?;
        serde_json::from_str(&line).with_context(|| format!("QEMU says {line:?}, which is no JSON"))
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.to.write_all(request.as_bytes()).with_context(|| format!("cannot ask QEMU for {command}"))?;
        loop {
            let answer = self.heard()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            // What else comes are events, of which we want to know nothing.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_a_key_and_how_often() {
        assert_eq!(request("press f12 3").unwrap(), ("f12", 3));
        for wrong in ["press f12", "press f12 often", "hold f12 3", ""] {
            assert!(request(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn qmp_tells_answers_from_events_and_refusals() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let lines = [
            r#"{"QMP": {"version": {}}}"#,
            r#"{"return": {}}"#,
            r#"{"event": "RESUME"}"#,
            r#"{"return": {}}"#,
            r#"{"error": {"class": "GenericError", "desc": "no such key"}}"#,
        ];
        (&theirs).write_all((lines.join("\n") + "\n").as_bytes()).unwrap();
        let mut qmp = Qmp::over(ours).unwrap();
        act("press a 1", &mut qmp).unwrap();
        let refused = act("press nonsense 1", &mut qmp).unwrap_err().to_string();
        assert!(refused.contains("no such key"), "{refused}");
        let mut asked = BufReader::new(theirs).lines();
        assert!(asked.next().unwrap().unwrap().contains("qmp_capabilities"));
        assert!(asked.next().unwrap().unwrap().contains(r#""data":"a""#));
    }
}
