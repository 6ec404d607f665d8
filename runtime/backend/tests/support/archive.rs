//! Image archives, good and bad, written byte by byte where the `tar` crate would refuse. The end-to-end scenarios use it
//! as well.

#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A tar stream in the making.
pub struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// Any name and link, however wicked.
    pub fn entry(mut self, kind: tar::EntryType, name: &str, link: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub fn file(self, name: &str, text: &str) -> Self {
        self.entry(tar::EntryType::Regular, name, "", 0o644, text.as_bytes())
    }

    pub fn folder(self, name: &str) -> Self {
        self.entry(tar::EntryType::Directory, name, "", 0o755, b"")
    }

    pub fn link(self, name: &str, to: &str) -> Self {
        self.entry(tar::EntryType::Symlink, name, to, 0o777, b"")
    }

    pub fn hard_link(self, name: &str, to: &str) -> Self {
        self.entry(tar::EntryType::Link, name, to, 0o644, b"")
    }

    /// A whole tree from disk.
    pub fn tree(mut self, root: &Path) -> Self {
        self.0.follow_symlinks(false);
        self.0.append_dir_all(".", root).unwrap();
        self
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// What goes into an archive.
pub struct Image {
    /// Uncompressed, lowest first.
    pub layers: Vec<Vec<u8>>,
    pub run: Value,
    pub architecture: String,
}

impl Image {
    pub fn new(layers: Vec<Vec<u8>>) -> Self {
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        Self { layers, run: json!({}), architecture: architecture.to_owned() }
    }

    pub fn config(&self) -> Vec<u8> {
        let ids: Vec<_> = self.layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
        serde_json::to_vec(&json!({
            "architecture": self.architecture, "os": "linux", "config": self.run,
            "rootfs": {"type": "layers", "diff_ids": ids}
        }))
        .unwrap()
    }

    /// As the older `docker save` writes it.
    pub fn docker_save(&self) -> Vec<u8> {
        let config = self.config();
        let name = format!("{}.json", sha256(&config));
        let names: Vec<_> = (0..self.layers.len()).map(|index| format!("layer{index}/layer.tar")).collect();
        let manifest = json!([{"Config": name, "RepoTags": ["x:latest"], "Layers": names}]);
        let mut tar = Tar::new();
        for (name, layer) in names.iter().zip(&self.layers) {
            tar = tar.entry(tar::EntryType::Regular, name, "", 0o644, layer);
        }
        tar.entry(tar::EntryType::Regular, &name, "", 0o644, &config)
            .file("manifest.json", &manifest.to_string())
            .bytes()
    }

    /// The files of an OCI layout; `compress` makes the blobs of the layers.
    pub fn oci_files(&self, compress: fn(&[u8]) -> Vec<u8>) -> Vec<(String, Vec<u8>)> {
        let blob = |bytes: &[u8]| format!("blobs/sha256/{}", sha256(bytes));
        let descriptor = |bytes: &[u8], kind: &str| json!({"mediaType": kind, "digest": format!("sha256:{}", sha256(bytes)), "size": bytes.len()});
        let config = self.config();
        let layers: Vec<_> = self.layers.iter().map(|layer| compress(layer)).collect();
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "config": descriptor(&config, "application/vnd.oci.image.config.v1+json"),
            "layers": layers.iter().map(|l| descriptor(l, "application/vnd.oci.image.layer.v1.tar")).collect::<Vec<_>>()
        }))
        .unwrap();
        let index = json!({"schemaVersion": 2, "manifests": [descriptor(&manifest, "application/vnd.oci.image.manifest.v1+json")]});
        let mut files = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), index.to_string().into_bytes()),
            (blob(&manifest), manifest),
            (blob(&config), config),
        ];
        files.extend(layers.into_iter().map(|layer| (blob(&layer), layer)));
        files
    }

    pub fn oci(&self, compress: fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in self.oci_files(compress) {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
        }
        builder.into_inner().unwrap()
    }
}
