//! ONNX Runtime, in a Python that has it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use warmswap_forecast::{ModelWeights, Stepper};

use crate::stats::median;

const SCRIPT: &str = include_str!("onnx_step.py");
/// Which Python is asked.
const PYTHON_VARIABLE: &str = "WARMSWAP_BENCH_PYTHON";

pub(super) struct Onnx {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Why there is nobody to compare with.
    pub(super) missing: Option<String>,
}

/// A round of the faster of its two ways.
pub(super) struct Came {
    pub(super) how: String,
    /// A step, without [`Self::call_us`].
    pub(super) us: f64,
    /// What a call costs that computes nothing.
    pub(super) call_us: f64,
    /// Outputs of the first row after the last step.
    pub(super) raw: Vec<f32>,
}

impl Onnx {
    pub(super) fn start(weights: &ModelWeights) -> Result<Self> {
        let python = std::env::var(PYTHON_VARIABLE).unwrap_or_else(|_| "python3".to_owned());
        let child = Command::new(&python).args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("cannot start {python}"))?;
        let (Some(ask), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{python} has no pipes")
        };
        let mut onnx = Self { child, ask, answers: BufReader::new(answers), missing: None };
        let (inputs, hidden, outputs) = (Stepper::INPUTS, Stepper::HIDDEN, Stepper::OUTPUTS);
        let network = json!({ "inputs": inputs, "hidden": hidden, "outputs": outputs, "weights": weights });
        let first = onnx.exchange(&network.to_string())?;
        onnx.missing = first["missing"].as_str().map(str::to_owned);
        Ok(onnx)
    }

    fn exchange(&mut self, line: &str) -> Result<Value> {
        let mut text = String::new();
        // One that has nothing to say has ended: its answer is read all the same.
        let told = writeln!(self.ask, "{line}").and_then(|()| self.ask.flush());
        self.answers.read_line(&mut text)?;
        serde_json::from_str(&text).with_context(|| format!("the script of ONNX Runtime ended early ({told:?})"))
    }

    /// `None` when it is not there.
    pub(super) fn steps(&mut self, rows: usize, steps: usize) -> Result<Option<Came>> {
        if self.missing.is_some() {
            return Ok(None);
        }
        let answer = self.exchange(&format!("{rows} {steps}"))?;
        let us = |how: &str| -> Option<f64> {
            let ns: Vec<f64> = answer[how]["ns"].as_array()?.iter().filter_map(Value::as_f64).collect();
            Some(median(&ns)? / 1e3)
        };
        let nothing = us("nothing").context("no answer of a call that computes nothing")?;
        let ways = ["its LSTM kernel", "one matrix product"].into_iter().filter_map(|how| Some((how, us(how)?)));
        let (how, us) = ways.min_by(|a, b| a.1.total_cmp(&b.1)).context("no answer of a step")?;
        let raw = answer[how]["raw"].as_array().context("no outputs")?;
        Ok(Some(Came {
            how: how.to_owned(),
            us: (us - nothing).max(1e-3),
            call_us: nothing,
            raw: raw.iter().filter_map(Value::as_f64).map(|value| value as f32).collect(),
        }))
    }
}

impl Drop for Onnx {
    fn drop(&mut self) {
        // Fails when it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
