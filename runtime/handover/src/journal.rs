//! The journal of one service: what a new supervisor must know to finish or undo what its predecessor began.
//!
//! One JSON record a line, appended with a single `write`, so that a record is there whole or not at all when the
//! supervisor is killed. A torn last line (power loss) is ignored; anything else that does not parse is refused by
//! name. Containers do not survive the host, so the file lies in the runtime folder and only the record that opens
//! a handover is synced.
//!
//! ```text
//! {"record":"service","file":{…},"folder":"/srv","next_generation":3,"owner":2,"previous":{"image":"images/v1",…}}
//! {"record":"begin","handover":7,"from":2,"to":3,"image":"images/v3","file":{…},"folder":"/srv"}
//! {"record":"promoted","handover":7,"owner":3,"greeting":{…}}    <- the control word changes next
//! {"record":"end","handover":7,"owner":3}
//! ```

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use warmswap_model::{Generation, ImageRef, ServiceFile};

use crate::member::Greeting;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot {action} journal {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("journal {path} is damaged in line {line}: {problem}; move it away and run `warmswap stop --all`")]
    Damaged { path: PathBuf, line: usize, problem: String },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
enum Record {
    Service(Box<ServiceRecord>),
    /// `file` and `folder` hold once `to` is promoted.
    Begin {
        handover: u64,
        from: Generation,
        to: Generation,
        image: ImageRef,
        file: Box<ServiceFile>,
        folder: PathBuf,
    },
    Promoted {
        handover: u64,
        owner: Generation,
        greeting: Option<Greeting>,
    },
    End {
        handover: u64,
        owner: Generation,
    },
}

/// What stays true between handovers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceRecord {
    pub file: ServiceFile,
    /// Folder of the service file, for relative image paths.
    pub folder: PathBuf,
    pub next_generation: Generation,
    pub owner: Option<Generation>,
    /// What the owner said about itself; `None` when it does not link the SDK.
    pub greeting: Option<Greeting>,
    pub image: ImageRef,
    /// What `warmswap rollback` goes back to.
    #[serde(default)]
    pub previous: Option<Version>,
}

/// What a generation is started from: what an update changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Version {
    pub image: ImageRef,
    /// Command, environment, limits: the image alone does not say what runs.
    pub file: ServiceFile,
    pub folder: PathBuf,
}

impl ServiceRecord {
    #[must_use]
    pub fn version(&self) -> Version {
        Version { image: self.image.clone(), file: self.file.clone(), folder: self.folder.clone() }
    }
}

/// A handover that was begun and not ended.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenHandover {
    pub handover: u64,
    pub from: Generation,
    pub to: Generation,
    /// What `to` runs, and what `from` runs.
    pub image: ImageRef,
    pub from_image: ImageRef,
    /// `to` is the owner.
    pub promoted: bool,
    /// `to` was the owner, and `from` is again.
    pub rolled_back: bool,
    /// What `from` and `to` said about themselves.
    greetings: [Option<Greeting>; 2],
    /// The settings with which `to` was started.
    pub file: Box<ServiceFile>,
    pub folder: PathBuf,
}

#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

/// What the journal says when it is opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Recovered {
    pub service: ServiceRecord,
    pub open: Option<OpenHandover>,
}

impl Recovered {
    /// Takes the control word for what holds: a record of who owns is written just before the word changes, and the
    /// supervisor may have died between the two.
    pub fn believe(&mut self, owner: Generation) {
        let Some(open) = &mut self.open else { return };
        if self.service.owner == Some(owner) || ![open.from, open.to].contains(&owner) {
            return;
        }
        open.promoted = owner == open.to;
        open.rolled_back = false;
        self.service.owner = Some(owner);
        self.service.greeting.clone_from(&open.greetings[usize::from(open.promoted)]);
    }
}

impl Journal {
    /// Begins a journal, replacing whatever stands at `path`.
    pub fn create(path: &Path, service: &ServiceRecord) -> Result<Self, JournalError> {
        let beside = path.with_extension("new");
        let failed = |action| {
            let path = path.to_owned();
            move |source| JournalError::File { action, path, source }
        };
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).open(&beside).map_err(failed("create"))?;
        file.write_all(&line(&Record::Service(Box::new(service.clone())))).map_err(failed("write"))?;
        file.sync_data().map_err(failed("sync"))?;
        std::fs::rename(&beside, path).map_err(failed("replace"))?;
        // The descriptor still names the renamed file; every later record is appended to it.
        Ok(Self { path: path.to_owned(), file })
    }

    /// Reads what a predecessor wrote. `None` when there is no journal.
    pub fn read(path: &Path) -> Result<Option<Recovered>, JournalError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(JournalError::File { action: "read", path: path.to_owned(), source }),
        }
    }

    /// As [`Self::read`], of a text; `path` is for the errors.
    pub fn parse(path: &Path, text: &str) -> Result<Option<Recovered>, JournalError> {
        let damaged =
            |line: usize, problem: String| JournalError::Damaged { path: path.to_owned(), line: line + 1, problem };
        let mut recovered: Option<Recovered> = None;
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        for (number, text) in lines.iter().enumerate() {
            if !text.ends_with('\n') && number + 1 == lines.len() && number > 0 {
                break; // torn by a power loss: the record never counted
            }
            let record: Record = serde_json::from_str(text).map_err(|error| damaged(number, error.to_string()))?;
            match (record, recovered.as_mut()) {
                (Record::Service(service), _) => recovered = Some(Recovered { service: *service, open: None }),
                (_, None) => return Err(damaged(number, "the first record is not of the service".into())),
                (Record::Begin { handover, from, to, image, file, folder }, Some(known)) => {
                    let from_image = known.service.image.clone();
                    known.open = Some(OpenHandover {
                        handover,
                        from,
                        to,
                        image,
                        from_image,
                        promoted: false,
                        rolled_back: false,
                        greetings: [known.service.greeting.clone(), None],
                        file,
                        folder,
                    });
                    known.service.next_generation = known.service.next_generation.max(to.next());
                }
                (Record::Promoted { handover, owner, greeting }, Some(known)) => {
                    known.service.owner = Some(owner);
                    if let Some(open) = known.open.as_mut().filter(|open| open.handover == handover) {
                        let promoted = owner == open.to;
                        open.rolled_back = open.promoted && !promoted;
                        open.promoted = promoted;
                        open.greetings[usize::from(promoted)].clone_from(&greeting);
                    }
                    known.service.greeting = greeting;
                }
                (Record::End { owner, .. }, Some(known)) => {
                    known.service.owner = Some(owner);
                    known.open = None;
                }
            }
        }
        Ok(recovered)
    }

    /// A handover begins: synced, so that its shadow is never forgotten.
    pub fn begin(
        &mut self,
        handover: u64,
        from: Generation,
        to: Generation,
        image: &ImageRef,
        service: &ServiceRecord,
    ) -> Result<(), JournalError> {
        let (file, folder) = (Box::new(service.file.clone()), service.folder.clone());
        self.append(&Record::Begin { handover, from, to, image: image.clone(), file, folder })?;
        self.file.sync_data().map_err(|source| JournalError::File { action: "sync", path: self.path.clone(), source })
    }

    /// Ownership passes now. Written before the control word changes; one `write`, nothing else, for it lies in the
    /// blackout.
    pub fn promoted(
        &mut self,
        handover: u64,
        owner: Generation,
        greeting: Option<Greeting>,
    ) -> Result<(), JournalError> {
        self.append(&Record::Promoted { handover, owner, greeting })
    }

    pub fn end(&mut self, handover: u64, owner: Generation) -> Result<(), JournalError> {
        self.append(&Record::End { handover, owner })
    }

    /// Starts afresh with what is true now, which keeps the file to a few lines.
    pub fn rewrite(&mut self, service: &ServiceRecord) -> Result<(), JournalError> {
        *self = Self::create(&self.path, service)?;
        Ok(())
    }

    pub fn remove(path: &Path) -> Result<(), JournalError> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(JournalError::File { action: "remove", path: path.to_owned(), source: error })
            }
            _ => Ok(()),
        }
    }

    fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        self.file.write_all(&line(record)).map_err(|source| JournalError::File {
            action: "append to",
            path: self.path.clone(),
            source,
        })
    }
}

fn line(record: &Record) -> Vec<u8> {
    let mut line = serde_json::to_vec(record).expect("records have string keys and finite numbers");
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ServiceRecord {
        let file = ServiceFile::parse("s.toml", "name = \"s\"\nimage = \"v1\"\n").unwrap();
        ServiceRecord {
            image: file.image.clone(),
            file,
            folder: "/srv".into(),
            next_generation: Generation(2),
            owner: Some(Generation(1)),
            greeting: None,
            previous: None,
        }
    }

    fn fresh() -> (tempfile::TempDir, PathBuf, Journal) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.jsonl");
        let journal = Journal::create(&path, &record()).unwrap();
        (folder, path, journal)
    }

    #[test]
    fn a_begun_handover_is_found_open_until_it_ends() {
        let (_folder, path, mut journal) = fresh();
        journal.begin(7, Generation(1), Generation(2), &"v2".into(), &record()).unwrap();
        let read = Journal::read(&path).unwrap().unwrap();
        let open = OpenHandover {
            handover: 7,
            from: Generation(1),
            to: Generation(2),
            image: "v2".into(),
            from_image: "v1".into(),
            promoted: false,
            rolled_back: false,
            greetings: [None, None],
            file: Box::new(record().file),
            folder: "/srv".into(),
        };
        assert_eq!(read.open, Some(open));
        assert_eq!(read.service.owner, Some(Generation(1)));
        assert_eq!(read.service.next_generation, Generation(3), "a generation number is never used twice");

        journal.promoted(7, Generation(2), None).unwrap();
        let read = Journal::read(&path).unwrap().unwrap();
        assert!(read.open.unwrap().promoted);
        assert_eq!(read.service.owner, Some(Generation(2)));

        journal.promoted(7, Generation(1), None).unwrap();
        let open = Journal::read(&path).unwrap().unwrap().open.unwrap();
        assert!(!open.promoted && open.rolled_back);

        journal.end(7, Generation(1)).unwrap();
        let read = Journal::read(&path).unwrap().unwrap();
        assert_eq!((read.open, read.service.owner), (None, Some(Generation(1))));
    }

    #[test]
    fn the_control_word_decides_when_the_supervisor_died_before_it_changed_it() {
        let greeting = |schema| {
            Some(Greeting {
                schemas_read: vec![schema],
                schema_written: schema,
                schemas_written_back: Vec::new(),
                state: warmswap_model::StateMove::PreCopied,
            })
        };
        let (_folder, path, mut journal) = fresh();
        journal.rewrite(&ServiceRecord { greeting: greeting(1), ..record() }).unwrap();
        journal.begin(7, Generation(1), Generation(2), &"v2".into(), &record()).unwrap();
        journal.promoted(7, Generation(2), greeting(2)).unwrap();
        let read = |owner| {
            let mut read = Journal::read(&path).unwrap().unwrap();
            read.believe(Generation(owner));
            let open = read.open.unwrap();
            (read.service.owner.unwrap().0, read.service.greeting, open.promoted, open.rolled_back)
        };
        assert_eq!(read(1), (1, greeting(1), false, false), "never promoted");
        assert_eq!(read(2), (2, greeting(2), true, false));
        assert_eq!(read(9), (2, greeting(2), true, false), "no part of this handover");
        journal.promoted(7, Generation(1), greeting(1)).unwrap();
        assert_eq!(read(2), (2, greeting(2), true, false), "not rolled back yet");
        assert_eq!(read(1), (1, greeting(1), false, true));
    }

    #[test]
    fn every_cut_of_the_file_reads_as_a_prefix_of_its_records_or_is_refused() {
        let (_folder, path, mut journal) = fresh();
        journal.begin(1, Generation(1), Generation(2), &"v2".into(), &record()).unwrap();
        journal.promoted(1, Generation(2), None).unwrap();
        journal.end(1, Generation(2)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let first_line = whole.iter().position(|b| *b == b'\n').unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            match Journal::read(&path) {
                Ok(Some(_)) => assert!(cut >= first_line, "cut at {cut}"),
                Ok(None) => assert_eq!(cut, 0),
                Err(JournalError::Damaged { line, .. }) => assert!(line == 1 && cut < first_line, "cut at {cut}"),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_damaged_line_is_named() {
        let (_folder, path, mut journal) = fresh();
        journal.begin(1, Generation(1), Generation(2), &"v2".into(), &record()).unwrap();
        journal.end(1, Generation(1)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap().replace("\"begin\"", "\"bigin\"");
        std::fs::write(&path, text).unwrap();
        let error = Journal::read(&path).unwrap_err().to_string();
        assert!(error.contains("s.jsonl") && error.contains("line 2"), "{error}");
    }
}
