//! The database: tables, transactions, and the promise that damage is an error and never a panic.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{
    Database, DatabaseError, Durability, ReadTransaction, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, WriteTransaction,
};
use warmswap_model::{FeatureWindow, HandoverReport, ServiceName};

use crate::HistoryError;
use crate::encode::{self, aggregate};

/// (service, resolution, end of the window in Unix ms) to a window.
pub(crate) const WINDOWS: TableDefinition<'_, (&str, u8, u64), &[u8]> = TableDefinition::new("windows");
/// (service, id) to a handover report.
pub(crate) const REPORTS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("reports");
/// (kind, key) to bytes whose owner checks them.
const BLOBS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("blobs");
/// Every service that has windows.
pub(crate) const SERVICES: TableDefinition<'_, &str, ()> = TableDefinition::new("services");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const FORMAT: u64 = 1;
const META_FORMAT: &str = "format";
const META_HANDOVER_ID: &str = "handover_id";

/// Resolutions in the key, finest first.
pub(crate) const SECONDS: u8 = 0;
pub(crate) const MINUTES: u8 = 1;

const MINUTE_MS: u64 = 60_000;
const FILE_NAME: &str = "history.redb";
/// Handovers of a service whose single steps are kept: they are nearly all of a report.
pub const STEPS_KEPT: usize = 16;
/// Pages kept in memory. The agent reads recent windows only; the kernel's page cache holds the rest.
const CACHE_BYTES: usize = 16 << 20;

/// What a blob is. The owner of a kind checks what it reads: the store only promises the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobKind {
    /// Weights, scalers and calibration of the forecaster.
    Model,
    /// State of the tuner.
    Tuner,
    /// Which triggers have fired.
    Triggers,
}

impl BlobKind {
    const fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Tuner => "tuner",
            Self::Triggers => "triggers",
        }
    }
}

/// The store. All calls take `&self` and may come from any thread; writers wait for each other.
#[derive(Debug)]
pub struct History {
    pub(crate) file: PathBuf,
    database: Database,
    /// The minute of each service that still receives seconds.
    open_minutes: Mutex<HashMap<ServiceName, u64>>,
}

/// Failures inside a transaction, before they are told apart.
pub(crate) enum Inner {
    Redb(redb::Error),
    Damaged(String),
    Encode(String),
}

impl<E: Into<redb::Error>> From<E> for Inner {
    fn from(error: E) -> Self {
        Self::Redb(error.into())
    }
}

impl History {
    /// Opens the store in `folder`, which is created when missing. Every page's checksum is verified, so the time
    /// grows with the file (about 1 s per GB). A damaged, newer or busy file is refused and left as it is.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, HistoryError> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|source| HistoryError::Folder { folder: folder.to_owned(), source })?;
        let file = folder.join(FILE_NAME);
        let opened = catch_unwind(AssertUnwindSafe(|| {
            Database::builder().set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true).create(&file)
        }));
        let database = match opened {
            Ok(Ok(database)) => database,
            Ok(Err(DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch)) => {
                return Err(HistoryError::InUse { file });
            }
            Ok(Err(DatabaseError::Storage(StorageError::Io(source)))) if !is_bad_content(&source) => {
                let source = Box::new(redb::Error::Io(source));
                return Err(HistoryError::Storage { file, doing: "open the database", source });
            }
            Ok(Err(error)) => return Err(HistoryError::Damaged { file, what: error.to_string() }),
            Err(panic) => return Err(HistoryError::Damaged { file, what: panic_text(&*panic) }),
        };
        let history = Self { file, database, open_minutes: Mutex::default() };
        history.prepare()?;
        Ok(history)
    }

    /// Creates the tables, checks the format and finds each service's open minute.
    fn prepare(&self) -> Result<(), HistoryError> {
        let format = self.write("prepare the tables", |tx| {
            tx.open_table(WINDOWS)?;
            tx.open_table(REPORTS)?;
            tx.open_table(BLOBS)?;
            tx.open_table(SERVICES)?;
            let mut meta = tx.open_table(META)?;
            let format = meta.get(META_FORMAT)?.map(|value| value.value());
            if format.is_none() {
                meta.insert(META_FORMAT, FORMAT)?;
            }
            Ok(format.unwrap_or(FORMAT))
        })?;
        if format != FORMAT {
            return Err(HistoryError::Newer { file: self.file.clone(), found: format, known: FORMAT });
        }
        let open_minutes = self.read("find the newest windows", |tx| {
            let services = tx.open_table(SERVICES)?;
            let windows = tx.open_table(WINDOWS)?;
            let mut minutes = HashMap::new();
            for entry in services.iter()? {
                let (name, _) = entry?;
                let name = service_name(name.value())?;
                let newest =
                    windows.range((name.as_str(), SECONDS, 0)..=(name.as_str(), SECONDS, u64::MAX))?.next_back();
                if let Some(newest) = newest {
                    let (_, _, end) = newest?.0.value();
                    minutes.insert(name, minute_of(end));
                }
            }
            Ok(minutes)
        })?;
        *self.open_minutes.lock().unwrap_or_else(PoisonError::into_inner) = open_minutes;
        Ok(())
    }

    /// Appends the windows of one tick in one durable transaction. A window with the same service and end replaces
    /// the one before. Whenever a service enters a new minute, the minute it left is summed up.
    pub fn append_windows(&self, windows: &[(ServiceName, FeatureWindow)]) -> Result<(), HistoryError> {
        if windows.is_empty() {
            return Ok(());
        }
        let mut open_minutes = self.open_minutes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entered: HashMap<&ServiceName, u64> = HashMap::new();
        self.write("append windows", |tx| {
            entered.clear();
            let mut table = tx.open_table(WINDOWS)?;
            for (service, window) in windows {
                let minute = minute_of(window.end_unix_ms);
                match entered.get(service).or_else(|| open_minutes.get(service)).copied() {
                    None => {
                        tx.open_table(SERVICES)?.insert(service.as_str(), ())?;
                    }
                    Some(left) if left != minute => sum_up_minute(&mut table, service, left)?,
                    Some(_) => {}
                }
                entered.insert(service, minute);
                let bytes = encode::window_to_bytes(window).map_err(|error| Inner::Encode(error.to_string()))?;
                table.insert((service.as_str(), SECONDS, window.end_unix_ms), bytes.as_slice())?;
            }
            Ok(())
        })?;
        open_minutes.extend(entered.into_iter().map(|(service, minute)| (service.clone(), minute)));
        Ok(())
    }

    /// One-second windows of a service whose end lies in `range` (Unix ms), oldest first.
    pub fn windows(&self, service: &ServiceName, range: Range<u64>) -> Result<Vec<FeatureWindow>, HistoryError> {
        self.windows_of(service, SECONDS, range)
    }

    /// One-minute windows of a service whose end lies in `range` (Unix ms), oldest first: rates are means, memory is
    /// the highest second, counts are sums. The minute that is still open is not there yet.
    pub fn minutes(&self, service: &ServiceName, range: Range<u64>) -> Result<Vec<FeatureWindow>, HistoryError> {
        self.windows_of(service, MINUTES, range)
    }

    fn windows_of(
        &self,
        service: &ServiceName,
        clock: u8,
        range: Range<u64>,
    ) -> Result<Vec<FeatureWindow>, HistoryError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let name = service.as_str();
        self.read("read windows", |tx| {
            let table = tx.open_table(WINDOWS)?;
            table
                .range((name, clock, range.start)..(name, clock, range.end))?
                .map(|entry| encode::window_from_bytes(entry?.1.value()).map_err(Inner::Damaged))
                .collect()
        })
    }

    /// Every service that has windows, in the order of names.
    pub fn services(&self) -> Result<Vec<ServiceName>, HistoryError> {
        self.read("list services", |tx| {
            tx.open_table(SERVICES)?.iter()?.map(|entry| service_name(entry?.0.value())).collect()
        })
    }

    /// Keeps a report under its service and id; the same id again replaces it. Its single steps are kept for as long as there
    /// are fewer than [`STEPS_KEPT`] newer reports of the service.
    pub fn append_report(&self, report: &HandoverReport) -> Result<(), HistoryError> {
        let encoded = encode::report_to_bytes(report).map_err(|error| error.to_string());
        // JSON has no infinity and no NaN: a report that could not be read back would make all reports unreadable.
        let bytes = encoded.and_then(|bytes| encode::report_from_bytes(&bytes).map(|_| bytes)).map_err(|what| {
            HistoryError::Encode { file: self.file.clone(), doing: "encode a handover report", what }
        })?;
        self.write("append a handover report", |tx| {
            let mut reports = tx.open_table(REPORTS)?;
            let name = report.service.as_str();
            reports.insert((name, report.id), bytes.as_slice())?;
            let old = reports.range((name, 0)..=(name, u64::MAX))?.rev().nth(STEPS_KEPT).transpose()?;
            // One that cannot be read stays as it is: it must not stand in the way of the new one.
            let old = old.and_then(|(_, bytes)| encode::report_from_bytes(bytes.value()).ok());
            if let Some(old) = old.filter(|old| !old.steps.is_empty()) {
                let shorter = HandoverReport { steps: Vec::new(), ..old };
                let bytes = encode::report_to_bytes(&shorter).map_err(|error| Inner::Encode(error.to_string()))?;
                reports.insert((name, shorter.id), bytes.as_slice())?;
            }
            Ok(())
        })
    }

    /// The reports of a service, in the order of ids.
    pub fn reports(&self, service: &ServiceName) -> Result<Vec<HandoverReport>, HistoryError> {
        let name = service.as_str();
        self.read("read handover reports", |tx| {
            tx.open_table(REPORTS)?
                .range((name, 0)..=(name, u64::MAX))?
                .map(|entry| encode::report_from_bytes(entry?.1.value()).map_err(Inner::Damaged))
                .collect()
        })
    }

    /// A number that no handover of this host had before, counting from 1. Durable when it returns.
    pub fn next_handover_id(&self) -> Result<u64, HistoryError> {
        self.write("take a handover id", |tx| {
            let mut meta = tx.open_table(META)?;
            let last = meta.get(META_HANDOVER_ID)?.map_or(0, |value| value.value());
            let next = last.checked_add(1).ok_or_else(|| Inner::Damaged("the handover id is at its end".into()))?;
            meta.insert(META_HANDOVER_ID, next)?;
            Ok(next)
        })
    }

    /// Replaces a blob.
    pub fn put_blob(&self, kind: BlobKind, key: &str, bytes: &[u8]) -> Result<(), HistoryError> {
        self.write("save a blob", |tx| {
            tx.open_table(BLOBS)?.insert((kind.name(), key), bytes)?;
            Ok(())
        })
    }

    /// A blob as it was put, `None` when there is none.
    pub fn get_blob(&self, kind: BlobKind, key: &str) -> Result<Option<Vec<u8>>, HistoryError> {
        self.read("read a blob", |tx| {
            Ok(tx.open_table(BLOBS)?.get((kind.name(), key))?.map(|value| value.value().to_vec()))
        })
    }

    pub(crate) fn forget_open_minutes(&self, services: &[ServiceName]) {
        let mut open_minutes = self.open_minutes.lock().unwrap_or_else(PoisonError::into_inner);
        for service in services {
            open_minutes.remove(service);
        }
    }

    pub(crate) fn read<T>(
        &self,
        doing: &'static str,
        body: impl FnOnce(&ReadTransaction) -> Result<T, Inner>,
    ) -> Result<T, HistoryError> {
        self.guarded(doing, || body(&self.database.begin_read()?))
    }

    /// Commits with an fsync. Without one redb keeps commits in this process, and a kill would lose minutes; one
    /// fsync a second is what durability to the last tick costs.
    pub(crate) fn write<T>(
        &self,
        doing: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, Inner>,
    ) -> Result<T, HistoryError> {
        self.guarded(doing, || {
            let mut tx = self.database.begin_write()?;
            tx.set_durability(Durability::Immediate)?;
            let value = body(&tx)?;
            tx.commit()?;
            Ok(value)
        })
    }

    /// redb verifies checksums at open, not at every read: a page that goes bad later may end in a panic inside it.
    /// That panic stops here and becomes an error that names the file.
    fn guarded<T>(&self, doing: &'static str, body: impl FnOnce() -> Result<T, Inner>) -> Result<T, HistoryError> {
        let file = || self.file.clone();
        match catch_unwind(AssertUnwindSafe(body)) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Inner::Redb(redb::Error::Corrupted(what)))) => Err(HistoryError::Damaged { file: file(), what }),
            Ok(Err(Inner::Redb(source))) => {
                Err(HistoryError::Storage { file: file(), doing, source: Box::new(source) })
            }
            Ok(Err(Inner::Damaged(what))) => Err(HistoryError::Damaged { file: file(), what }),
            Ok(Err(Inner::Encode(what))) => Err(HistoryError::Encode { file: file(), doing, what }),
            Err(panic) => Err(HistoryError::Damaged { file: file(), what: panic_text(&*panic) }),
        }
    }
}

/// The minute a window belongs to: one that ends at a full minute belongs to the minute it closes.
fn minute_of(end_unix_ms: u64) -> u64 {
    end_unix_ms.saturating_sub(1) / MINUTE_MS
}

fn sum_up_minute(
    table: &mut redb::Table<'_, (&'static str, u8, u64), &'static [u8]>,
    service: &ServiceName,
    minute: u64,
) -> Result<(), Inner> {
    let name = service.as_str();
    let start = minute.saturating_mul(MINUTE_MS);
    let end = start.saturating_add(MINUTE_MS);
    let seconds: Vec<FeatureWindow> = table
        .range((name, SECONDS, start + 1)..=(name, SECONDS, end))?
        .map(|entry| encode::window_from_bytes(entry?.1.value()).map_err(Inner::Damaged))
        .collect::<Result<_, Inner>>()?;
    if let Some(sum) = aggregate(&seconds, end) {
        let bytes = encode::window_to_bytes(&sum).map_err(|error| Inner::Encode(error.to_string()))?;
        table.insert((name, MINUTES, end), bytes.as_slice())?;
    }
    Ok(())
}

fn service_name(text: &str) -> Result<ServiceName, Inner> {
    ServiceName::new(text).map_err(|error| Inner::Damaged(error.to_string()))
}

/// Files that are no database, or end too early, come as I/O errors of these kinds.
fn is_bad_content(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::InvalidInput
    )
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "the database gave up".to_owned())
}
