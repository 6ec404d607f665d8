//! Image archives: the trail from the manifest to the layers, every step checked by digest.
//!
//! ```text
//! docker save   manifest.json ─▶ config (named by its digest) ─▶ diff ids ─▶ unpacked layers
//! OCI layout    index.json ─▶ manifest ─▶ config ─▶ diff ids ─▶ unpacked layers      (each named by its digest)
//! ```

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use warmswap_model::ImageRef;

use super::layer::{self, Budget, decompressed};
use super::source::Source;
use super::{Context, Problem, sha256_hex};
use crate::PreparedImage;

/// Indexes within indexes that are followed.
const INDEX_DEPTH_MAX: usize = 4;

/// `manifest.json` of `docker save`: one element per image.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: PathBuf,
    layers: Vec<PathBuf>,
}

/// An OCI index or manifest: which of them, the fields tell.
#[derive(Deserialize)]
struct IndexOrManifest {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize, Clone)]
struct Descriptor {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize, Clone)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct ImageConfig {
    #[serde(default)]
    config: Option<Run>,
    rootfs: RootFs,
    #[serde(default)]
    architecture: Option<String>,
}

/// The part that says what to run. Docker writes `null` for empty lists.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Run {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<PathBuf>,
    stop_signal: Option<String>,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

pub(super) fn prepare_folder(image: &ImageRef, path: &Path, layers: &Path) -> Result<PreparedImage, Problem> {
    prepare(image, &Source::Folder(File::open(path)?), layers)
}

/// Remembers by path, size and time what an archive held, so that looking again costs one file.
pub(super) fn prepare_file(
    image: &ImageRef,
    path: &Path,
    metadata: &fs::Metadata,
    layers: &Path,
) -> Result<PreparedImage, Problem> {
    let identity = format!(
        "{}\0{}\0{}\0{}\0{}\0{}",
        path.display(),
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec()
    );
    let memory = layers.join(".seen").join(sha256_hex(identity.as_bytes()));
    if let Ok(text) = fs::read(&memory)
        && let Ok(prepared) = serde_json::from_slice::<PreparedImage>(&text)
        && prepared.layers.iter().all(|layer| layer.is_dir())
    {
        return Ok(prepared);
    }
    let file = File::open(path)?;
    let prepared = prepare(image, &Source::tar(plain(file, layers)?)?, layers)?;
    // Only a shortcut: a failure costs time, not correctness.
    if let Ok(text) = serde_json::to_vec(&prepared)
        && fs::create_dir_all(layers.join(".seen")).is_ok()
    {
        let new = memory.with_extension("new");
        let _ = fs::write(&new, text).and_then(|()| fs::rename(&new, &memory));
    }
    Ok(prepared)
}

/// The archive itself when it is plain, else an unnamed decompressed copy.
fn plain(mut file: File, layers: &Path) -> Result<File, Problem> {
    let mut magic = [0; 4];
    let length = file.read(&mut magic)?;
    file.rewind()?;
    if !layer::is_compressed(&magic[..length]) {
        return Ok(file);
    }
    fs::create_dir_all(layers)?;
    let path = layers.join(format!(".archive-{}", layer::unique()));
    let mut copy = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    let mut budget = Budget::new();
    let mut reader = budget.reader(decompressed(Box::new(file)).context(|| "it cannot be decompressed".to_owned())?);
    std::io::copy(&mut reader, &mut copy).context(|| "it cannot be decompressed".to_owned())?;
    copy.rewind()?;
    Ok(copy)
}

fn prepare(image: &ImageRef, source: &Source, folder: &Path) -> Result<PreparedImage, Problem> {
    let (digest, config, blobs) = if source.has("manifest.json") {
        docker_save(source)?
    } else if source.has("index.json") {
        oci_layout(source)?
    } else {
        return Err(Problem("it holds neither manifest.json (docker save) nor index.json (OCI layout)".to_owned()));
    };
    let config: ImageConfig = serde_json::from_slice(&config).context(|| "its config is no image config".to_owned())?;
    let architecture = host_architecture();
    if let Some(other) = config.architecture.as_deref().filter(|other| !other.is_empty() && *other != architecture) {
        return Err(Problem(format!("it is for {other}, this host is {architecture}")));
    }
    if blobs.len() != config.rootfs.diff_ids.len() {
        let (blobs, ids) = (blobs.len(), config.rootfs.diff_ids.len());
        return Err(Problem(format!("its manifest has {blobs} layers, its config {ids}")));
    }
    if blobs.is_empty() {
        return Err(Problem("it has no layers".to_owned()));
    }
    fs::create_dir_all(folder)?;
    let mut budget = Budget::new();
    let mut unpacked = Vec::with_capacity(blobs.len());
    for (blob, diff_id) in blobs.iter().zip(&config.rootfs.diff_ids) {
        let open = || source.open(blob).map(|(reader, _)| reader);
        unpacked.push(layer::unpack(open, sha256_of(diff_id)?, folder, &mut budget)?);
    }
    let layers = layer::commit(unpacked, folder)?;
    let run = config.config.unwrap_or_default();
    let mut entrypoint = run.entrypoint.unwrap_or_default();
    entrypoint.extend(run.cmd.unwrap_or_default());
    Ok(PreparedImage {
        image: image.clone(),
        digest,
        entrypoint,
        env: run.env.unwrap_or_default(),
        working_dir: run.working_dir.filter(|dir| dir.is_absolute()).unwrap_or_else(|| "/".into()),
        user: run.user.unwrap_or_default(),
        stop_signal: run.stop_signal.and_then(|name| name.parse().ok()),
        layers,
    })
}

/// Digest and text of the config, and the names of the layers, lowest first.
type Found = (String, Vec<u8>, Vec<PathBuf>);

fn docker_save(source: &Source) -> Result<Found, Problem> {
    let text = source.read(Path::new("manifest.json"))?;
    let images: Vec<Saved> =
        serde_json::from_slice(&text).context(|| "manifest.json is not what docker save writes".to_owned())?;
    let count = images.len();
    let Ok([saved]) = <[Saved; 1]>::try_from(images) else {
        return Err(Problem(format!("it holds {count} images: save exactly one")));
    };
    let config = source.read(&saved.config)?;
    let digest = sha256_hex(&config);
    // `<digest>.json` or `blobs/sha256/<digest>`.
    let name = saved.config.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if is_sha256(name) && name != digest {
        return Err(Problem(format!("{} does not match its digest", saved.config.display())));
    }
    Ok((format!("sha256:{digest}"), config, saved.layers))
}

fn oci_layout(source: &Source) -> Result<Found, Problem> {
    let mut text = source.read(Path::new("index.json"))?;
    for _ in 0..INDEX_DEPTH_MAX {
        let parsed: IndexOrManifest =
            serde_json::from_slice(&text).context(|| "it holds an invalid index or manifest".to_owned())?;
        if let Some(config) = parsed.config {
            let digest = config.digest.clone();
            let layers = parsed.layers.iter().map(|l| blob(&l.digest)).collect::<Result<_, _>>()?;
            return Ok((digest, read_blob(source, &config.digest)?, layers));
        }
        text = read_blob(source, &choose(parsed.manifests)?.digest)?;
    }
    Err(Problem(format!("its indexes are nested deeper than {INDEX_DEPTH_MAX}")))
}

/// The manifest for this host. One alone is taken as it is: its config tells the architecture.
fn choose(mut manifests: Vec<Descriptor>) -> Result<Descriptor, Problem> {
    if manifests.len() > 1 {
        let architecture = host_architecture();
        manifests.retain(|m| m.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == architecture));
        if manifests.is_empty() {
            return Err(Problem(format!("it holds no image for linux/{architecture}")));
        }
    }
    match <[Descriptor; 1]>::try_from(manifests) {
        Ok([one]) => Ok(one),
        Err(several) => Err(Problem(format!("it holds {} images: export exactly one", several.len()))),
    }
}

fn read_blob(source: &Source, digest: &str) -> Result<Vec<u8>, Problem> {
    let text = source.read(&blob(digest)?)?;
    if sha256_hex(&text) == sha256_of(digest)? {
        Ok(text)
    } else {
        Err(Problem(format!("blob {digest} does not match its digest")))
    }
}

fn blob(digest: &str) -> Result<PathBuf, Problem> {
    Ok(Path::new("blobs/sha256").join(sha256_of(digest)?))
}

/// The hexadecimal part; it becomes a file name, so nothing else may be in it.
fn sha256_of(digest: &str) -> Result<&str, Problem> {
    digest
        .strip_prefix("sha256:")
        .filter(|hex| is_sha256(hex))
        .ok_or_else(|| Problem(format!("{digest:?} is no sha256 digest")))
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// As images call it.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
