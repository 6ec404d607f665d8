//! Images of every kind, run in real containers; and archives that are damaged or wicked, each with its message.

#![allow(clippy::unwrap_used, reason = "a test that fails says where")]

#[path = "support/archive.rs"]
mod archive;

mod support;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use archive::{Image, Tar, gzip, sha256, zstd};
use serde_json::json;
use support::{Host, LONG, id, log_with, make_rootfs, service};
use warmswap_backend::{Backend, ContainerSpec, ContainerState, FakeBackend, Limits, PreparedImage};
use warmswap_model::ImageRef;

/// Only for preparing images: needs no containers.
fn preparer(host: &Host) -> FakeBackend {
    FakeBackend::new(host.folder.path())
}

fn write(host: &Host, name: &str, bytes: &[u8]) -> PathBuf {
    let path = host.folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn prepare(host: &Host, path: &Path) -> PreparedImage {
    preparer(host).prepare_image(&ImageRef(path.to_owned())).unwrap()
}

fn refusal(host: &Host, name: &str, bytes: &[u8]) -> String {
    let path = write(host, name, bytes);
    let error = preparer(host).prepare_image(&ImageRef(path.clone())).unwrap_err().to_string();
    assert!(error.starts_with(&format!("image {} is damaged: ", path.display())), "{error}");
    let left: Vec<_> = fs::read_dir(host.folder.path().join("layers"))
        .map(|entries| entries.flatten().map(|e| e.file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    assert!(left.iter().all(|name| !name.starts_with('.')), "half a layer is left: {left:?}");
    error
}

fn run(host: &Host, image: PreparedImage) -> String {
    let backend = host.backend();
    let one = id("image", 1);
    backend.open_service(&service("image"), &std::collections::BTreeMap::new()).unwrap();
    let spec = ContainerSpec {
        id: one.clone(),
        image,
        command: None,
        env: std::collections::BTreeMap::new(),
        limits: Limits::default(),
    };
    backend.create(&spec, vec![], vec![]).unwrap();
    backend.start(&one).unwrap();
    let state = backend.wait(&one, LONG).unwrap();
    let log = log_with(&backend, &one, "");
    assert_eq!(state, ContainerState::Exited { code: Some(0), signal: None }, "{log}");
    backend.destroy(&one).unwrap();
    backend.close_service(&service("image")).unwrap();
    log
}

fn busybox_layer(host: &Host) -> Vec<u8> {
    let root = host.folder.path().join("tree");
    make_rootfs(&root);
    Tar::new().tree(&root).bytes()
}

/// Three layers: the second adds, the third hides a file, a folder's old content, and a folder it makes anew.
fn layered(host: &Host) -> Image {
    let second = Tar::new()
        .folder("data")
        .file("data/hidden", "old")
        .file("data/kept", "kept")
        .folder("opaque")
        .file("opaque/old", "old")
        .folder("anew")
        .file("anew/old", "old")
        .bytes();
    let third = Tar::new()
        .folder("data")
        .file("data/.wh.hidden", "")
        .folder("opaque")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "new")
        .file(".wh.anew", "")
        .folder("anew")
        .file("anew/new", "new")
        .file("data/first", "shared")
        .hard_link("data/second", "data/first")
        .link("data/link", "/data/kept")
        .bytes();
    let mut image = Image::new(vec![busybox_layer(host), second, third]);
    image.run = json!({
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["cd /; ls data opaque anew; cat data/second data/link; echo; id -u; echo $COLOUR; pwd; cd /made/here; pwd"],
        "Env": ["COLOUR=green"], "User": "app", "WorkingDir": "/made/here",
        "StopSignal": "SIGQUIT"
    });
    image
}

const EXPECTED: &str =
    "anew:\nnew\n\ndata:\nfirst\nkept\nlink\nsecond\n\nopaque:\nnew\nsharedkept\n1000\ngreen\n/\n/made/here\n";

#[test]
fn a_saved_image_runs_as_its_config_says_and_its_whiteouts_hide() {
    needs_containers!("a_saved_image_runs_as_its_config_says_and_its_whiteouts_hide");
    let host = Host::new();
    let image = layered(&host);
    let path = write(&host, "saved.tar", &image.docker_save());
    let prepared = host.backend().prepare_image(&ImageRef(path)).unwrap();
    assert_eq!(prepared.digest, format!("sha256:{}", sha256(&image.config())));
    assert_eq!(prepared.layers.len(), 3);
    assert_eq!(prepared.stop_signal, Some("SIGQUIT".parse().unwrap()));
    assert_eq!(run(&host, prepared), EXPECTED);
    assert_eq!(host.traces(), Vec::<String>::new());
}

#[test]
fn an_oci_layout_runs_whatever_compresses_it() {
    needs_containers!("an_oci_layout_runs_whatever_compresses_it");
    let host = Host::new();
    let image = layered(&host);
    let mut digests = Vec::new();
    for (name, bytes) in [
        ("plain.tar", image.oci(<[u8]>::to_vec)),
        ("gzip.tar", image.oci(gzip)),
        ("zstd.tar", image.oci(zstd)),
        ("all.tar.gz", gzip(&image.oci(gzip))),
        ("all.tar.zst", zstd(&image.docker_save())),
    ] {
        // Layers unpacked from one must not serve the next.
        let _ = fs::remove_dir_all(host.config().state_dir.join("layers"));
        let path = write(&host, name, &bytes);
        let prepared = host.backend().prepare_image(&ImageRef(path)).unwrap();
        digests.push(prepared.digest.clone());
        assert_eq!(run(&host, prepared), EXPECTED, "{name}");
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "the same image has one digest: {digests:?}");

    let folder = host.folder.path().join("layout");
    for (name, bytes) in image.oci_files(gzip) {
        fs::create_dir_all(folder.join(&name).parent().unwrap()).unwrap();
        fs::write(folder.join(name), bytes).unwrap();
    }
    let prepared = host.backend().prepare_image(&ImageRef(folder)).unwrap();
    assert_eq!(run(&host, prepared), EXPECTED);
}

#[test]
fn a_bundle_runs_as_its_config_says() {
    needs_containers!("a_bundle_runs_as_its_config_says");
    let host = Host::new();
    let bundle = host.folder.path().join("bundle");
    make_rootfs(&bundle.join("rootfs"));
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/sh", "-c", "id -u; id -g; pwd; echo $A"], "env": ["A=b", "PATH=/bin"], "cwd": "/tmp",
                    "user": {"uid": 5, "gid": 6}},
        "root": {"path": "rootfs"}
    });
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    let prepared = host.backend().prepare_image(&ImageRef(bundle.clone())).unwrap();
    assert!(prepared.digest.starts_with("bundle:"));
    assert_eq!(run(&host, prepared), "5\n6\n/tmp\nb\n");

    fs::write(bundle.join("config.json"), "{").unwrap();
    let error = host.backend().prepare_image(&ImageRef(bundle.clone())).unwrap_err().to_string();
    assert!(error.contains("config.json is no OCI bundle config"), "{error}");
    fs::write(bundle.join("config.json"), config.to_string().replace("\"rootfs\"", "\"none\"")).unwrap();
    let error = host.backend().prepare_image(&ImageRef(bundle)).unwrap_err().to_string();
    assert!(error.contains("root file system") && error.contains("missing"), "{error}");
}

#[test]
fn an_image_is_unpacked_once_and_never_changed() {
    needs_containers!("an_image_is_unpacked_once_and_never_changed");
    let host = Host::new();
    let mut image = layered(&host);
    image.run = json!({"Cmd": ["/bin/sh", "-c", "echo changed > /data/kept; mkdir /new; cat /data/kept"]});
    let path = write(&host, "saved.tar", &image.docker_save());
    let first = host.backend().prepare_image(&ImageRef(path.clone())).unwrap();
    let inodes = |prepared: &PreparedImage| -> Vec<u64> {
        prepared.layers.iter().map(|layer| fs::metadata(layer).unwrap().ino()).collect()
    };
    let before = inodes(&first);
    assert_eq!(run(&host, first.clone()), "changed\n");
    assert_eq!(fs::read_to_string(first.layers[1].join("data/kept")).unwrap(), "kept");
    let second = host.backend().prepare_image(&ImageRef(path.clone())).unwrap();
    assert_eq!(second, first);
    assert_eq!(inodes(&second), before, "unpacked again");
    // Somebody has cleared the cache.
    fs::remove_dir_all(&first.layers[1]).unwrap();
    let third = host.backend().prepare_image(&ImageRef(path)).unwrap();
    assert_eq!(fs::read_to_string(third.layers[1].join("data/kept")).unwrap(), "kept");
}

#[test]
fn a_folder_is_an_image_and_is_never_changed() {
    needs_containers!("a_folder_is_an_image_and_is_never_changed");
    let host = Host::new();
    let folder = host.image("plain");
    let mut prepared = host.backend().prepare_image(&ImageRef(folder.clone())).unwrap();
    let digest = prepared.digest.clone();
    prepared.entrypoint = vec!["/bin/sh".into(), "-c".into(), "echo x > /etc/passwd; touch /file; ls /".into()];
    assert!(run(&host, prepared).contains("file"));
    assert!(!folder.join("file").exists());
    assert_eq!(prepare(&host, &folder).digest, digest);
    fs::write(folder.join("etc/passwd"), "changed").unwrap();
    assert_ne!(prepare(&host, &folder).digest, digest);
    let empty = host.folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let error = preparer(&host).prepare_image(&ImageRef(empty)).unwrap_err().to_string();
    assert!(error.contains("the folder is empty"), "{error}");
}

#[test]
fn damaged_archives_are_refused_with_the_reason() {
    let host = Host::new();
    let good = Image::new(vec![Tar::new().file("a", "1").bytes()]);
    let saved = good.docker_save();

    assert!(refusal(&host, "text", b"no image at all").contains("tar file"));
    assert!(refusal(&host, "noise", &[7; 5000]).contains("tar"));
    assert!(refusal(&host, "empty.tar", &Tar::new().bytes()).contains("neither manifest.json"));
    assert!(refusal(&host, "gz", &gzip(b"x")[..5]).contains("decompressed"));
    // Cut inside the layer.
    assert!(refusal(&host, "cut.tar", &saved[..700]).contains("cut off"));

    let manifest = |value: serde_json::Value| Tar::new().file("manifest.json", &value.to_string()).bytes();
    assert!(refusal(&host, "a.tar", &manifest(json!({}))).contains("not what docker save writes"));
    assert!(refusal(&host, "b.tar", &manifest(json!([]))).contains("holds 0 images"));
    let one = json!({"Config": "c.json", "Layers": []});
    assert!(refusal(&host, "c.tar", &manifest(json!([one, one]))).contains("holds 2 images: save exactly one"));
    assert!(refusal(&host, "d.tar", &manifest(json!([one]))).contains("c.json is missing"));
    let away = json!([{"Config": "../../etc/passwd", "Layers": []}]);
    assert!(refusal(&host, "e.tar", &manifest(away)).contains("leaves the archive"));

    let mut other = Image::new(vec![Tar::new().file("a", "1").bytes()]);
    other.architecture = "s390x".to_owned();
    assert!(refusal(&host, "arch.tar", &other.docker_save()).contains("it is for s390x, this host is"));
    assert!(refusal(&host, "none.tar", &Image::new(vec![]).docker_save()).contains("no layers"));

    // One byte of the content changed, so that the tar is intact but the digest is not.
    let mut bent = saved.clone();
    let position = bent.windows(512).position(|w| w[0] == b'1' && w[1..].iter().all(|b| *b == 0)).unwrap();
    bent[position] = b'2';
    assert!(refusal(&host, "bent.tar", &bent).contains("does not match its digest"));

    let config = good.config();
    let wrong = format!("{}.json", "0".repeat(64));
    let text = Tar::new()
        .entry(tar::EntryType::Regular, &wrong, "", 0o644, &config)
        .file("manifest.json", &json!([{"Config": wrong, "Layers": ["l"]}]).to_string())
        .bytes();
    assert!(refusal(&host, "config.tar", &text).contains("does not match its digest"));

    let fewer = Tar::new()
        .entry(tar::EntryType::Regular, "c.json", "", 0o644, &config)
        .file("manifest.json", &json!([{"Config": "c.json", "Layers": []}]).to_string())
        .bytes();
    assert!(refusal(&host, "fewer.tar", &fewer).contains("its manifest has 0 layers, its config 1"));

    let oci = Tar::new()
        .file("oci-layout", "{}")
        .file("index.json", &json!({"manifests": [{"digest": "sha256:../../x", "size": 1}]}).to_string())
        .bytes();
    assert!(refusal(&host, "oci.tar", &oci).contains("is no sha256 digest"));
    let mut files = good.oci_files(<[u8]>::to_vec);
    files[2].1 = b"{}".to_vec();
    let mut tar = Tar::new();
    for (name, bytes) in files {
        tar = tar.entry(tar::EntryType::Regular, &name, "", 0o644, &bytes);
    }
    assert!(refusal(&host, "blob.tar", &tar.bytes()).contains("does not match its digest"));
}

#[test]
fn wicked_layers_are_refused_or_stay_inside() {
    let host = Host::new();
    let outside = host.folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let refused = |name: &str, layer: Tar| refusal(&host, name, &Image::new(vec![layer.bytes()]).docker_save());

    assert!(refused("up", Tar::new().file("../../outside/evil", "x")).contains("leaves the image"));
    assert!(refused("deep", Tar::new().file("a/../../evil", "x")).contains("leaves the image"));
    assert!(refused("hard", Tar::new().hard_link("a", "../../outside/secret")).contains("leaves the image"));
    assert!(refused("none", Tar::new().hard_link("a", "b")).contains("cannot link to b"));
    assert!(refused("wh", Tar::new().file(".wh...", "x")).contains("hides no name"));
    assert!(refused("dir", Tar::new().folder("a").file("a/b", "").file("a", "x")).contains("replaces a folder"));
    let long = tar::EntryType::GNULongName;
    let much = vec![b'x'; 2 << 20];
    assert!(refused("long", Tar::new().entry(long, "l", "", 0, &much)).contains("extension header is longer"));
    assert!(refused("pax", Tar::new().entry(tar::EntryType::XHeader, "l", "", 0, &much)).contains("extension header"));

    // Links that lead out lead to the same place inside; absolute names are names inside.
    let target = outside.to_str().unwrap();
    let dangling = Tar::new().link("out", target).file("out/evil", "x");
    assert!(refused("dangling", dangling).contains("a link that leads nowhere"));
    let layer = Tar::new()
        .folder(target.trim_start_matches('/'))
        .link("out", target)
        .file("out/evil", "x")
        .link("up", "../../../../../..")
        .file("up/up-evil", "x")
        .file("/absolute", "x")
        .link("file", "/etc/passwd")
        .file("file", "replaced")
        .entry(tar::EntryType::Block, "disk", "", 0o666, b"")
        .entry(tar::EntryType::Char, "mem", "", 0o666, b"")
        .entry(tar::EntryType::Regular, "set-uid", "", 0o4755, b"x")
        .bytes();
    let before = fs::read_to_string("/etc/passwd").unwrap();
    let prepared = prepare(&host, &write(&host, "inside.tar", &Image::new(vec![layer]).docker_save()));
    let root = &prepared.layers[0];
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "written outside");
    assert!(root.join(target.trim_start_matches('/')).join("evil").is_file());
    assert!(root.join("up-evil").is_file() && root.join("absolute").is_file());
    assert_eq!(fs::read_to_string(root.join("file")).unwrap(), "replaced");
    assert_eq!(fs::read_to_string("/etc/passwd").unwrap(), before);
    for entry in fs::read_dir(root).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        assert!(!kind.is_block_device() && !kind.is_char_device(), "{:?} is a device", entry.file_name());
    }
}
