//! The stores in memory, with what a crash does to each: for the simulation and tests.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use eggs_machine::hash::StateHash;
use eggs_machine::{MemoryTable, Row, Table};
use eggs_proto::StoreId;
use raft::eraftpb::{Entry, HardState};

use crate::storage::{
    AppliedRow, GroupCommit, GroupId, LogChange, LogState, LogStore, LogWrite, Piece, SnapshotMeta,
    SnapshotStore, StateStore, StorageError,
};

/// Rows in one page of a snapshot.
const PAGE_ROWS: usize = 64;

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
    forget_votes: bool,
    fail_next: Option<(String, bool)>,
    full: bool,
    syncs: u64,
}

#[derive(Debug, Default, Clone)]
struct GroupEntries {
    hard: HardState,
    first: u64,
    entries: BTreeMap<u64, Record>,
    founding: Vec<StoreId>,
    removed: bool,
    floor: (u64, u64),
}

/// An entry as it is on the disk.
#[derive(Debug, Clone)]
struct Record {
    entry: Entry,
    /// What its checksum would tell.
    is_whole: bool,
}

impl Record {
    fn new(entry: Entry) -> Self {
        Record { entry, is_whole: true }
    }
}

impl MemoryLog {
    /// From now on writes only look durable: a bug on purpose.
    pub fn skip_sync(&self) {
        self.lock().skip_sync = true;
    }

    /// All that was written so far is durable after all.
    pub fn sync_now(&self) {
        let mut inner = self.lock();
        if inner.durable.is_some() {
            inner.durable = Some(inner.groups.clone());
        }
    }

    /// From now on votes are not written: a bug on purpose.
    pub fn forget_votes(&self) {
        self.lock().forget_votes = true;
    }

    /// The next write fails, and nothing of it is there.
    pub fn fail_next(&self, why: &str) {
        self.lock().fail_next = Some((why.to_owned(), false));
    }

    /// The next write fails, and all of it is there.
    pub fn fail_after_next(&self, why: &str) {
        self.lock().fail_next = Some((why.to_owned(), true));
    }

    /// Whether every write fails for want of space.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// Groups with entries.
    pub fn groups_with_entries(&self) -> Vec<GroupId> {
        let inner = self.lock();
        inner.groups.iter().filter(|(_, log)| !log.entries.is_empty()).map(|(&group, _)| group).collect()
    }

    /// First and last index of a group's entries, and the term of the last; none are looked at for damage.
    pub fn ends(&self, group: GroupId) -> Option<(u64, u64, u64)> {
        let inner = self.lock();
        let entries = &inner.groups.get(&group)?.entries;
        let (first, (last, record)) = (entries.first_key_value()?, entries.last_key_value()?);
        Some((*first.0, *last, record.entry.term))
    }

    /// Flips a bit of the entry that is `from_end` before a group's last. False: there is none with data.
    pub fn flip(&self, group: GroupId, from_end: usize, bit: usize) -> bool {
        let mut inner = self.lock();
        let Some(log) = inner.groups.get_mut(&group) else { return false };
        let Some(record) = log.entries.values_mut().rev().nth(from_end) else { return false };
        let mut data = record.entry.data.to_vec();
        let Some(length) = (!data.is_empty()).then_some(data.len()) else { return false };
        data[bit / 8 % length] ^= 1 << (bit % 8);
        record.entry.data = data.into();
        record.is_whole = false;
        true
    }

    /// Cuts every group's log before its first damaged entry and forgets that it was there: a bug on purpose.
    pub fn cut_damaged(&self) {
        for log in self.lock().groups.values_mut() {
            let damaged = log.entries.iter().find(|(_, record)| !record.is_whole).map(|(&index, _)| index);
            if let Some(index) = damaged {
                log.entries.split_off(&index);
                log.first = log.entries.keys().next().copied().unwrap_or(index);
                log.hard.commit = log.hard.commit.min(index - 1);
            }
        }
    }

    /// The log as a crash leaves it.
    #[must_use]
    pub fn crashed(&self) -> MemoryLog {
        let mut inner = self.lock().clone();
        if let Some(durable) = inner.durable.take() {
            inner.groups = durable;
        }
        inner.fail_next = None;
        inner.full = false;
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
        let inner = self.lock();
        let Some(log) = inner.groups.get(&group) else { return Ok(None) };
        if let Some((index, _)) = log.entries.iter().find(|(_, record)| !record.is_whole) {
            return Err(damaged(*index));
        }
        Ok(Some(LogState {
            hard: log.hard.clone(),
            founding: log.founding.clone(),
            removed: log.removed,
            floor: log.floor,
            first: log.entries.keys().next().copied().unwrap_or(log.first.max(1)),
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
            let record =
                log.entries.get(&index).ok_or_else(|| StorageError::new(format!("no entry {index}")))?;
            if !record.is_whole {
                return Err(damaged(index));
            }
            let entry = &record.entry;
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
        let failure = inner.fail_next.take();
        if let Some((why, false)) = &failure {
            return Err(StorageError::new(why.clone()));
        }
        if inner.full {
            return Err(StorageError::new("no space left on device"));
        }
        if inner.skip_sync && inner.durable.is_none() {
            inner.durable = Some(inner.groups.clone());
        }
        inner.syncs += 1;
        let forget_votes = inner.forget_votes;
        for write in writes {
            let log = inner.groups.entry(write.group).or_default();
            match write.change {
                None => {}
                Some(LogChange::Found(founding)) => {
                    *log = GroupEntries { founding, hard: log.hard.clone(), ..GroupEntries::default() };
                }
                Some(LogChange::Restart { floor }) => {
                    *log = GroupEntries { hard: log.hard.clone(), floor, ..GroupEntries::default() };
                }
                Some(LogChange::Remove { floor }) => {
                    let hard = log.hard.clone();
                    *log = GroupEntries { hard, floor, removed: true, ..GroupEntries::default() };
                }
            }
            if let Some(hard) = write.hard {
                log.hard = hard;
                if forget_votes {
                    log.hard.vote = 0;
                }
            }
            if let Some(first) = write.entries.first() {
                log.entries.split_off(&first.index);
                log.entries.extend(write.entries.into_iter().map(|entry| (entry.index, Record::new(entry))));
            }
        }
        failure.map_or(Ok(()), |(why, _)| Err(StorageError::new(why)))
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

fn damaged(index: u64) -> StorageError {
    StorageError::new(format!("entry {index} is not what was written: the log is damaged"))
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

    /// Says that up to `entries` fewer are applied than are, in every group: a bug on purpose.
    pub fn rewind(&mut self, entries: u64) {
        for (_, applied) in self.groups.values_mut() {
            applied.index -= entries.min(applied.index.saturating_sub(1));
        }
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
    full: bool,
    left_out: Option<Vec<u8>>,
}

impl MemorySnapshots {
    /// Whether nothing can be written for want of space.
    pub fn set_full(&mut self, full: bool) {
        self.full = full;
    }

    /// Leaves rows with this prefix out of every snapshot, which then says that it has the hash of the rest: a
    /// bug on purpose.
    pub fn leave_out(&mut self, prefix: &[u8]) {
        self.left_out = Some(prefix.to_vec());
    }

    fn has_room(&self) -> Result<(), StorageError> {
        if self.full { Err(StorageError::new("no space left on device")) } else { Ok(()) }
    }

    /// The next snapshot cannot be begun.
    pub fn fail_next(&mut self, why: &str) {
        self.fail_next = Some(why.to_owned());
    }

    /// As a crash leaves them.
    #[must_use]
    pub fn crashed(mut self) -> Self {
        self.begun = None;
        self.incoming.clear();
        self.full = false;
        self
    }
}

fn hash_of(rows: &[Row]) -> StateHash {
    rows.iter().fold(StateHash::default(), |mut hash, (key, value)| {
        hash.insert(key, value);
        hash
    })
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

    fn page(&self, group: GroupId, at: u64) -> Result<(Vec<Row>, Option<u64>), StorageError> {
        let (_, rows) = self.sealed.get(&group).ok_or_else(|| StorageError::new("no snapshot".to_owned()))?;
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(rows.len());
        let to = rows.len().min(from + PAGE_ROWS);
        Ok((rows[from..to].to_vec(), (to < rows.len()).then_some(to as u64)))
    }

    fn begin(&mut self, group: GroupId) -> Result<(), StorageError> {
        if let Some(why) = self.fail_next.take() {
            return Err(StorageError::new(why));
        }
        self.has_room()?;
        self.begun = Some((group, Vec::new()));
        Ok(())
    }

    fn add(&mut self, rows: &[Row]) -> Result<(), StorageError> {
        let (_, begun) =
            self.begun.as_mut().ok_or_else(|| StorageError::new("no snapshot begun".to_owned()))?;
        begun.extend_from_slice(rows);
        Ok(())
    }

    fn seal(&mut self, mut meta: SnapshotMeta) -> Result<bool, StorageError> {
        self.has_room()?;
        let (group, mut rows) =
            self.begun.take().ok_or_else(|| StorageError::new("no snapshot begun".to_owned()))?;
        if let Some(prefix) = &self.left_out {
            rows.retain(|(key, _)| !key.starts_with(prefix));
            meta.hash = hash_of(&rows);
        }
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
        let Some((meta, rows)) = self.sealed.get(&group).filter(|(meta, _)| (meta.index, meta.term) == at)
        else {
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
        self.has_room()?;
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
        let whole = |(meta, rows): &(SnapshotMeta, Vec<Row>)| {
            (meta.index, meta.term) == at && meta.hash == hash_of(rows)
        };
        let Some((meta, rows)) = read.filter(whole) else {
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
