//! `seeds FOLDER`: writes a corpus for every target, from the code under test itself, so that none of it goes stale.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use tar::EntryType;
use warmswap_fuzz::{docker_save, entry, finish};
use warmswap_handover::{Journal, ServiceRecord};
use warmswap_model::{Generation, ImageRef, ServiceFile};
use warmswap_transfer::control::ControlWord;
use warmswap_transfer::message::{Commit, ConnectionRecord, LogPosition, Message, StateKind, ToService, ToSupervisor};
use warmswap_transfer::segment::{Header, SEGMENT_LEN_MIN};

const SERVICE_FILE: &str = "name = \"s\"\nimage = \"v1\"\ncommand = [\"/bin/s\", \"-x\"]\n[env]\nA = \"1\"\n\
    [listen.http]\naddress = \"127.0.0.1:80\"\n[resources]\nmemory_mb_max = 64\n[reserve]\npercent_max = 200\n\
    [handover]\nquiesce_ms_max = 10\nverify_s_min = 1\n[schedule]\nwatch_image = true\n";

fn main() -> Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).context("say where to: `seeds FOLDER`")?);
    let corpora: [(&str, Vec<Vec<u8>>); 10] = [
        ("message", messages()?),
        ("segment", segments()),
        ("log", log()),
        ("control", control()),
        ("journal", journal()?),
        ("service_file", vec![SERVICE_FILE.into(), b"name = \"s\"\nimage = \"v1\"\n".to_vec()]),
        ("image", images()),
        ("layer", layers()),
        ("bundle", bundles()),
        ("shim", shim()),
    ];
    for (target, inputs) in corpora {
        let folder = folder.join(target);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        for (number, input) in inputs.iter().enumerate() {
            let path = folder.join(format!("seed-{number}"));
            fs::write(&path, input).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

fn records() -> Vec<ConnectionRecord> {
    let record = |cookie, carry: &[u8], attached, more| ConnectionRecord {
        cookie,
        listener: "http".into(),
        carry: carry.to_vec(),
        attached,
        more,
    };
    vec![record(1, b"GET /", true, false), record(2, b"", true, false), record(1, b"x", false, true)]
}

fn messages() -> Result<Vec<Vec<u8>>> {
    let commit = Some(Commit { position: LogPosition { segment: 1, offset: 128 }, digest: 7 });
    let to_service = [
        ToService::Welcome { service: "s".into(), generation: 1, owner: false },
        ToService::NewSupervisor,
        ToService::Segment { index: 1 },
        ToService::Follow { on: true },
        ToService::Connections { records: records() },
        ToService::ConnectionsClosed { cookies: vec![1, 2] },
        ToService::CaughtUp { round: 1, commit },
        ToService::Yield { handover: 1, budget_us: 10_000 },
        ToService::Own { handover: 1, commit, connections_open: Some(2), follow: true },
        ToService::Retire { drain_ms: 1000 },
    ];
    let to_supervisor = [
        ToSupervisor::Hello {
            protocol: 1,
            sdk: "0.1.0".into(),
            schemas_read: vec![1, 2],
            schema_written: 2,
            schemas_written_back: vec![1],
            state: StateKind::Precopied,
        },
        ToSupervisor::StateMoved { bytes: 4096 },
        ToSupervisor::Segment { index: 1 },
        ToSupervisor::Ready,
        ToSupervisor::SegmentRetired { index: 1 },
        ToSupervisor::Connections { records: records() },
        ToSupervisor::CaughtUp { round: 1, commit, connections: 2 },
        ToSupervisor::Yielded { handover: 1, commit, connections_open: 2 },
        ToSupervisor::Owned { handover: 1, connections: 2 },
        ToSupervisor::Failed { what: "because".into() },
    ];
    let first = to_service.iter().map(Message::encode);
    let all = first.chain(to_supervisor.iter().map(Message::encode));
    Ok(all.map(|bytes| bytes.map(|bytes| bytes.to_vec())).collect::<Result<_, _>>()?)
}

fn header() -> Header {
    Header { index: 0, schema: 1, len: SEGMENT_LEN_MIN as u64, created_unix_ms: 0, previous_end: 0 }
}

/// A put of `key`, as `record.rs` describes it, with a checksum that is wrong: the target computes none, but libFuzzer sees
/// the comparison and learns the right one.
fn record() -> Vec<u8> {
    let mut record = vec![0; 32];
    record[4] = 3;
    record[6] = 1;
    record[8] = 5;
    record[16..24].copy_from_slice(b"valuekey");
    record
}

fn segments() -> Vec<Vec<u8>> {
    vec![[&header().to_bytes()[..], &record()].concat(), header().to_bytes().to_vec()]
}

fn log() -> Vec<Vec<u8>> {
    [0_u8, 2, 4, 1].iter().map(|how| [&[*how][..], &record(), &record()].concat()).collect()
}

fn control() -> Vec<Vec<u8>> {
    let mut page = vec![0; 4096];
    page[..8].copy_from_slice(b"WSWPCTL1");
    let word = ControlWord { epoch: 3, owner: 2, orderly: true };
    page[8..16].copy_from_slice(&word.to_bits().to_le_bytes());
    vec![page, vec![0; 4096]]
}

fn journal() -> Result<Vec<Vec<u8>>> {
    let file = ServiceFile::parse("seed", SERVICE_FILE)?;
    let record = ServiceRecord {
        image: file.image.clone(),
        file,
        folder: "/srv".into(),
        next_generation: Generation(2),
        owner: Some(Generation(1)),
        greeting: None,
        previous: None,
    };
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("journal");
    let mut journal = Journal::create(&path, &record)?;
    let fresh = fs::read(&path)?;
    journal.begin(1, Generation(1), Generation(2), &ImageRef::from("v2"), &record)?;
    journal.promoted(1, Generation(2), None)?;
    let open = fs::read(&path)?;
    journal.end(1, Generation(2))?;
    Ok(vec![fresh, open, fs::read(&path)?])
}

fn images() -> Vec<Vec<u8>> {
    let mut layer = Vec::new();
    entry(&mut layer, EntryType::Directory, "bin", "", b"");
    entry(&mut layer, EntryType::Regular, "bin/x", "", b"#!");
    finish(&mut layer);
    vec![docker_save(&layer)]
}

/// In the encoding of the target.
fn layers() -> Vec<Vec<u8>> {
    vec![
        vec![3, 0x04, 0, 0, 0, 0x14, 0, 2, b'h', b'i', 7, 0x14, 0x04, 0],
        vec![5, 0x04, 0xe4, 0, 0, 0x00, 0, 1, b'x'],
        vec![3, 0x04, 0, 0, 0, 0x09, 0, 0, 0, 0x08, 0, 0],
    ]
}

fn bundles() -> Vec<Vec<u8>> {
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/x"], "env": ["A=1"], "cwd": "/", "user": {"uid": 1, "gid": 2}},
        "root": {"path": "rootfs"},
    });
    vec![config.to_string().into_bytes()]
}

/// As `wire.rs` has them; a message that changes there is found again by the fuzzer.
fn shim() -> Vec<Vec<u8>> {
    let texts = [
        "\"Start\"",
        "{\"Signal\":{\"signal\":15}}",
        "{\"Keep\":{\"name\":\"x\"}}",
        "{\"pass\":[\"a\"],\"keep\":[\"b\"],\"last\":true}",
        "{\"State\":{\"state\":\"exited\",\"code\":0,\"signal\":null}}",
        "{\"Kept\":{\"names\":[\"a\"],\"last\":false}}",
        "{\"Listen\":{\"name\":\"http\",\"errno\":98}}",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}
