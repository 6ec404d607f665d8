//! An OCI bundle: `config.json` beside a root file system. Of the config, the program and its environment are honoured;
//! namespaces, mounts, capabilities and resources are the runtime's business.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use warmswap_model::ImageRef;

use super::{Context, JSON_BYTES_MAX, Problem, folder_digest};
use crate::PreparedImage;

#[derive(Deserialize)]
struct Config {
    process: Process,
    root: Root,
}

#[derive(Deserialize)]
struct Process {
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    cwd: PathBuf,
    #[serde(default)]
    user: User,
}

#[derive(Deserialize, Default)]
struct User {
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

pub(super) fn prepare(image: &ImageRef, path: &Path) -> Result<PreparedImage, Problem> {
    let file = path.join("config.json");
    if fs::metadata(&file).is_ok_and(|m| m.len() > JSON_BYTES_MAX) {
        return Err(Problem(format!("config.json is longer than {JSON_BYTES_MAX} bytes")));
    }
    let text = fs::read_to_string(&file).context(|| "config.json cannot be read".to_owned())?;
    let config: Config = serde_json::from_str(&text).context(|| "config.json is no OCI bundle config".to_owned())?;
    let root = path.join(&config.root.path);
    let root = fs::canonicalize(&root).context(|| format!("its root file system {} is missing", root.display()))?;
    if !root.is_dir() {
        return Err(Problem(format!("its root file system {} is no folder", root.display())));
    }
    Ok(PreparedImage {
        image: image.clone(),
        digest: format!("bundle:{}", folder_digest(&root, text.as_ref())?),
        entrypoint: config.process.args,
        env: config.process.env,
        working_dir: config.process.cwd,
        user: format!("{}:{}", config.process.user.uid, config.process.user.gid),
        stop_signal: None,
        layers: vec![root],
    })
}
