//! The stores in memory, with what a crash does to each: for the simulation and tests.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use eggs_machine::{MemoryTable, Row, Table};
use eggs_proto::StoreId;
use raft::eraftpb::{Entry, HardState};

use crate::storage::{
    AppliedRow, GroupCommit, GroupId, LogChange, LogState, LogStore, LogWrite, Piece, SnapshotMeta,
    SnapshotStore, StateStore, StorageError,
};

/// A log whose writes reach the disk when they are synced.
#[derive(Debug, Default)]
pub struct MemoryLog {
    inner: Mutex<MemoryLogInner>,
}

#[derive(Debug, Default, Clone)]
struct MemoryLogInner {
    groups: BTreeMap<GroupId, GroupEntries>,
    /// What a crash leaves; `None` when all is durable.
    durable: Option<BTreeMap<GroupId, GroupEntries>>,
    skip_sync: bool,
    fail_next: Option<String>,
    syncs: u64,
}

#[derive(Debug, Default, Clone)]
struct GroupEntries {
    hard: HardState,
    first: u64,
    entries: BTreeMap<u64, Entry>,
    founding: Vec<StoreId>,
    removed: bool,
}

impl MemoryLog {
    /// From now on writes only look durable: a bug on purpose.
    pub fn skip_sync(&self) {
        self.lock().skip_sync = true;
    }

    /// The next write fails.
    pub fn fail_next(&self, why: &str) {
        self.lock().fail_next = Some(why.to_owned());
    }

    /// The log as a crash leaves it.
    #[must_use]
    pub fn crashed(&self) -> MemoryLog {
        let mut inner = self.lock().clone();
        if let Some(durable) = inner.durable.take() {
            inner.groups = durable;
        }
        inner.fail_next = None;
        MemoryLog { inner: Mutex::new(inner) }
    }

    /// Fsyncs so far.
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    fn lock(&self) -> MutexGuard<'_, MemoryLogInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogStore for MemoryLog {
    fn groups(&self) -> Result<Vec<GroupId>, StorageError> {
        Ok(self.lock().groups.keys().copied().collect())
    }

    fn load(&self, group: GroupId) -> Result<Option<LogState>, StorageError> {
        Ok(self.lock().groups.get(&group).map(|log| LogState {
            hard: log.hard.clone(),
            founding: log.founding.clone(),
            removed: log.removed,
            first: log.entries.keys().next().copied().unwrap_or(log.first),
            last: log.entries.keys().next_back().copied().unwrap_or(log.first.saturating_sub(1)),
        }))
    }

    fn entries(
        &self,
        group: GroupId,
        low: u64,
        high: u64,
        max_bytes: u64,
    ) -> Result<Vec<Entry>, StorageError> {
        let inner = self.lock();
        let log = inner.groups.get(&group).ok_or_else(|| StorageError::new("no such log".to_owned()))?;
        let mut bytes = 0;
        let mut found = Vec::new();
        for index in low..high {
            let entry =
                log.entries.get(&index).ok_or_else(|| StorageError::new(format!("no entry {index}")))?;
            bytes += entry.data.len() as u64;
            if !found.is_empty() && bytes > max_bytes {
                break;
            }
            found.push(entry.clone());
        }
        Ok(found)
    }

    fn write(&self, writes: Vec<LogWrite>) -> Result<(), StorageError> {
        let mut inner = self.lock();
        if let Some(why) = inner.fail_next.take() {
            return Err(StorageError::new(why));
        }
        if inner.skip_sync && inner.durable.is_none() {
            inner.durable = Some(inner.groups.clone());
        }
        inner.syncs += 1;
        for write in writes {
            let log = inner.groups.entry(write.group).or_default();
            match write.change {
                None => {}
                Some(LogChange::Found(founding)) => {
                    *log = GroupEntries { founding, hard: log.hard.clone(), ..GroupEntries::default() };
                }
                Some(LogChange::Restart) => {
                    *log = GroupEntries { hard: log.hard.clone(), ..GroupEntries::default() };
                }
                Some(LogChange::Remove) => {
                    *log =
                        GroupEntries { hard: log.hard.clone(), removed: true, ..GroupEntries::default() };
                }
            }
            if let Some(hard) = write.hard {
                log.hard = hard;
            }
            if let Some(first) = write.entries.first() {
                log.entries.split_off(&first.index);
                log.entries.extend(write.entries.into_iter().map(|entry| (entry.index, entry)));
            }
        }
        Ok(())
    }

    fn truncate(&self, group: GroupId, first: u64) -> Result<(), StorageError> {
        let mut inner = self.lock();
        if let Some(log) = inner.groups.get_mut(&group) {
            log.entries = log.entries.split_off(&first);
            log.first = first;
        }
        Ok(())
    }
}

/// State in memory. A crash leaves an earlier state, as sled does.
#[derive(Debug, Clone, Default)]
pub struct MemoryState {
    groups: BTreeMap<GroupId, (MemoryTable, AppliedRow)>,
    empty: MemoryTable,
    closed: bool,
}

impl MemoryState {
    /// Closed in order.
    #[must_use]
    pub fn closed(mut self) -> Self {
        self.closed = true;
        self
    }

    /// As after a crash: it must be verified.
    #[must_use]
    pub fn crashed(mut self) -> Self {
        self.closed = false;
        self
    }

    /// Damages a group's rows, for tests of the verification.
    pub fn damage(&mut self, group: GroupId) {
        if let Some((table, _)) = self.groups.get_mut(&group) {
            let first = table.iter().next().map(|(key, _)| key.clone());
            if let Some(key) = first {
                let changes = vec![(key, Some(bytes::Bytes::from_static(b"damage")))];
                table.apply(eggs_machine::Batch { changes });
            }
        }
    }
}

impl StateStore for MemoryState {
    type Table = MemoryTable;

    fn add(&mut self, _group: GroupId) -> Result<(), StorageError> {
        Ok(())
    }

    fn table(&self, group: GroupId) -> &MemoryTable {
        self.groups.get(&group).map_or(&self.empty, |(table, _)| table)
    }

    fn applied(&self, group: GroupId) -> Result<Option<AppliedRow>, StorageError> {
        Ok(self.groups.get(&group).map(|(_, applied)| applied.clone()))
    }

    fn closed_cleanly(&self) -> bool {
        self.closed
    }

    fn commit(&mut self, commits: Vec<GroupCommit>) -> Result<(), StorageError> {
        for commit in commits {
            let (table, applied) = self.groups.entry(commit.group).or_default();
            table.apply(commit.batch);
            *applied = commit.applied;
        }
        Ok(())
    }

    fn clear(&mut self, group: GroupId) -> Result<(), StorageError> {
        self.groups.remove(&group);
        Ok(())
    }
}

/// Snapshots in memory: durable once sealed or installed.
#[derive(Debug, Clone, Default)]
pub struct MemorySnapshots {
    sealed: BTreeMap<GroupId, (SnapshotMeta, Vec<Row>)>,
    begun: Option<(GroupId, Vec<Row>)>,
    incoming: BTreeMap<GroupId, ((u64, u64), Vec<u8>)>,
    fail_next: Option<String>,
}

impl MemorySnapshots {
    /// The next snapshot cannot be begun.
    pub fn fail_next(&mut self, why: &str) {
        self.fail_next = Some(why.to_owned());
    }

    /// As a crash leaves them.
    #[must_use]
    pub fn crashed(mut self) -> Self {
        self.begun = None;
        self.incoming.clear();
        self
    }
}

/// The stored form: the meta's applied row and its bytes (u64), then keys and values, each after its length (u32).
fn stored(meta: &SnapshotMeta, rows: &[Row]) -> Vec<u8> {
    let SnapshotMeta { index, term, hash, bytes, membership } = meta.clone();
    let applied = AppliedRow { index, term, hash, membership }.to_bytes();
    let count = bytes.to_le_bytes();
    let parts = [&applied[..], &count[..]].into_iter().chain(rows.iter().flat_map(|(k, v)| [&k[..], &v[..]]));
    let mut stored = Vec::new();
    for part in parts {
        stored.extend_from_slice(&(part.len() as u32).to_le_bytes());
        stored.extend_from_slice(part);
    }
    stored
}

fn read_stored(stored: &[u8]) -> Option<(SnapshotMeta, Vec<Row>)> {
    let mut parts = Vec::new();
    let mut rest = stored;
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (part, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        parts.push(bytes::Bytes::copy_from_slice(part));
        rest = after;
    }
    let mut parts = parts.into_iter();
    let AppliedRow { index, term, hash, membership } = AppliedRow::from_bytes(&parts.next()?)?;
    let bytes = u64::from_le_bytes(parts.next()?[..].try_into().ok()?);
    let mut rows = Vec::new();
    while let Some(key) = parts.next() {
        rows.push((key, parts.next()?));
    }
    Some((SnapshotMeta { index, term, hash, bytes, membership }, rows))
}

impl SnapshotStore for MemorySnapshots {
    fn latest(&self, group: GroupId) -> Result<Option<SnapshotMeta>, StorageError> {
        Ok(self.sealed.get(&group).map(|(meta, _)| meta.clone()))
    }

    fn read(
        &self,
        group: GroupId,
        each: &mut dyn FnMut(Vec<Row>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        match self.sealed.get(&group) {
            Some((_, rows)) => each(rows.clone()),
            None => Err(StorageError::new("no snapshot".to_owned())),
        }
    }

    fn begin(&mut self, group: GroupId) -> Result<(), StorageError> {
        if let Some(why) = self.fail_next.take() {
            return Err(StorageError::new(why));
        }
        self.begun = Some((group, Vec::new()));
        Ok(())
    }

    fn add(&mut self, rows: &[Row]) -> Result<(), StorageError> {
        let (_, begun) =
            self.begun.as_mut().ok_or_else(|| StorageError::new("no snapshot begun".to_owned()))?;
        begun.extend_from_slice(rows);
        Ok(())
    }

    fn seal(&mut self, meta: SnapshotMeta) -> Result<bool, StorageError> {
        let (group, rows) =
            self.begun.take().ok_or_else(|| StorageError::new("no snapshot begun".to_owned()))?;
        self.sealed.insert(group, (meta, rows));
        Ok(true)
    }

    fn piece(
        &self,
        group: GroupId,
        at: (u64, u64),
        offset: u64,
        max: usize,
    ) -> Result<Option<Piece>, StorageError> {
        let Some((meta, rows)) = self.sealed.get(&group).filter(|(meta, _)| (meta.index, meta.term) == at) else {
            return Ok(None);
        };
        let stored = stored(meta, rows);
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(stored.len());
        let to = stored.len().min(from.saturating_add(max));
        let bytes = bytes::Bytes::copy_from_slice(&stored[from..to]);
        Ok(Some(Piece { bytes, total: stored.len() as u64 }))
    }

    fn received(&self, group: GroupId, at: (u64, u64)) -> Result<u64, StorageError> {
        let incoming = self.incoming.get(&group).filter(|(of, _)| *of == at);
        Ok(incoming.map_or(0, |(_, bytes)| bytes.len() as u64))
    }

    fn receive(
        &mut self,
        group: GroupId,
        at: (u64, u64),
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), StorageError> {
        if offset == 0 {
            self.incoming.insert(group, (at, Vec::new()));
        }
        match self.incoming.get_mut(&group) {
            Some((of, kept)) if *of == at && kept.len() as u64 == offset => {
                kept.extend_from_slice(bytes);
                Ok(())
            }
            _ => Err(StorageError::of_state("a piece that does not follow the one before")),
        }
    }

    fn install(&mut self, group: GroupId, at: (u64, u64)) -> Result<Option<SnapshotMeta>, StorageError> {
        let received = self.incoming.remove(&group).filter(|(of, _)| *of == at);
        let read = received.and_then(|(_, bytes)| read_stored(&bytes));
        let Some((meta, rows)) = read.filter(|(meta, _)| (meta.index, meta.term) == at) else {
            return Err(StorageError::of_state("what was received is not the snapshot"));
        };
        self.sealed.insert(group, (meta.clone(), rows));
        Ok(Some(meta))
    }

    fn remove(&mut self, group: GroupId) -> Result<(), StorageError> {
        self.sealed.remove(&group);
        self.incoming.remove(&group);
        Ok(())
    }
}

/// All rows of a table.
pub fn rows(table: &impl Table) -> Vec<Row> {
    table.page(&[], &[], usize::MAX).unwrap_or_default()
}
