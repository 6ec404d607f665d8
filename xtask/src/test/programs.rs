//! Builds the workspace with its test programs and says where they lie.

use std::io::BufReader;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use cargo_metadata::{Message, MetadataCommand};

use crate::run;

/// Packages whose tests share one host resource (cgroups, BPF attachments, containers) and run one at a time.
const ONE_AT_A_TIME: [&str; 6] =
    ["warmswap-agent", "warmswap-backend", "warmswap-handover", "warmswap-sensor", "warmswap-tests", "warmswap"];

#[derive(Debug, Clone)]
pub(crate) struct TestProgram {
    pub(crate) package: String,
    /// The library or program whose unit tests these are, or the file below `tests/`.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Where cargo would run it.
    pub(crate) folder: PathBuf,
    pub(crate) one_at_a_time: bool,
}

/// What a build made.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) tests: Vec<TestProgram>,
    /// What the tests start.
    pub(crate) programs: Vec<PathBuf>,
}

impl TestProgram {
    /// `package`, or `package: name` for a file below `tests/`.
    pub(crate) fn label(&self) -> String {
        if self.name.replace('_', "-") == self.package {
            self.package.clone()
        } else {
            format!("{}: {}", self.package, self.name)
        }
    }
}

/// Libraries, programs and tests in one call, so that all see the same features of the same dependencies. That
/// a plain `cargo build --release` sees them too, and burn is not compiled twice, is checked by `tidy`.
/// With `packages` only those.
pub(crate) fn build(packages: &[String]) -> Result<Built> {
    let mut cargo = run::cargo();
    cargo.args(["build", "--release", "--lib", "--bins", "--tests", "--message-format=json-render-diagnostics"]);
    packages.iter().for_each(|package| {
        cargo.args(["--package", package]);
    });
    eprintln!("$ {}", run::shown(&cargo));
    let mut child = cargo.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    let mut built = Built { tests: Vec::new(), programs: Vec::new() };
    for message in Message::parse_stream(BufReader::new(stdout)) {
        let Message::CompilerArtifact(artifact) = message.context("cannot read what cargo says")? else { continue };
        let Some(path) = artifact.executable else { continue };
        if !artifact.profile.test {
            if !artifact.target.is_custom_build() {
                built.programs.push(path.into_std_path_buf());
            }
            continue;
        }
        let folder = artifact.manifest_path.parent().context("a manifest without a folder")?;
        // `path+file:///…/runtime/model#warmswap-model@0.1.0`, or `…/cli#0.1.0` when folder and package agree.
        let id = artifact.package_id.repr;
        let package = id.rsplit('#').next().and_then(|last| last.split_once('@')).map(|(name, _)| name.to_owned());
        let package = package.or_else(|| folder.file_name().map(str::to_owned)).context("a package without a name")?;
        built.tests.push(TestProgram {
            one_at_a_time: ONE_AT_A_TIME.contains(&package.as_str()),
            package,
            name: artifact.target.name,
            path: path.into_std_path_buf(),
            folder: folder.as_std_path().to_owned(),
        });
    }
    let status = child.wait().context("cannot wait for cargo")?;
    if !status.success() {
        bail!("the build failed with {status}");
    }
    // End-to-end scenarios take longest and say least about where a fault is: last.
    built.tests.sort_by_key(|p| (p.package == "warmswap-tests", p.package.clone(), p.name.clone()));
    Ok(built)
}

/// Packages with a file `tests/loom.rs` have models to run.
pub(crate) fn with_loom_models() -> Result<Vec<String>> {
    let metadata = MetadataCommand::new()
        .manifest_path(run::workspace().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cannot read the workspace's metadata")?;
    let has_models =
        |p: &&cargo_metadata::Package| p.targets.iter().any(|target| target.is_test() && target.name == "loom");
    Ok(metadata.packages.iter().filter(has_models).map(|p| p.name.to_string()).collect())
}
