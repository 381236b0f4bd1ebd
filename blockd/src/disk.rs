//! A disk as the service sees it: there or lost, with its own limits (BL-6, BL-9).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use eggs_blockd_core::Identity;
use eggs_blockd_core::admission::Space;
use eggs_proto::{BlockError, BlockServiceId, ClusterId, ServiceError, mac, pb};
use tokio::sync::Semaphore;

use crate::limits::{
    CHECK_MAX, CHECKS_PER_DISK_MAX, READS_PER_DISK_MAX, REFUSED_PAUSE, UNDERWAY_MAX, WRITES_PER_DISK_MAX,
};
use crate::store::{Contents, OpenError, OpenProblem, Options, Store, StoreError, Totals, format, inspect};

/// What somebody wants to be a disk.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Its folder.
    pub path: PathBuf,
    /// 2 and up. A formatted disk must be of this class.
    pub storage_class: u8,
    /// What it can fail together with. May change when the disk moves to another host.
    pub failure_domain: String,
    /// It was formatted before: when it is not there it is lost, and never formatted.
    pub expect_existing: bool,
    /// For tests.
    pub options: Options,
}

/// An answer that is no, and about what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub code: BlockError,
    pub what: String,
}

impl Refusal {
    pub fn new(code: BlockError, what: impl Into<String>) -> Refusal {
        Refusal { code, what: what.into() }
    }
}

impl From<Refusal> for pb::Error {
    fn from(refusal: Refusal) -> pb::Error {
        refusal.code.with(refusal.what)
    }
}

/// Which path each block service id of this process is at: a copied disk has the id of its original.
pub type Ids = Arc<Mutex<BTreeMap<BlockServiceId, PathBuf>>>;

/// One configured disk.
#[derive(Debug)]
pub struct Disk {
    config: DiskConfig,
    cluster: ClusterId,
    ids: Ids,
    state: Mutex<State>,
    pub writes: Arc<Semaphore>,
    pub reads: Arc<Semaphore>,
    pub checks: Arc<Semaphore>,
    options: Options,
    io_errors: AtomicU64,
}

#[derive(Debug)]
struct State {
    store: Result<Arc<Store>, String>,
    /// Its id and key, once known; a lost disk keeps them.
    known: Option<(BlockServiceId, mac::Key)>,
    /// When the look at the disk that is under way began.
    looking_since: Option<Instant>,
    refused: Option<Refused>,
    space: Space,
    totals: Totals,
    read_only: bool,
}

/// The cluster does not take the disk from this process.
#[derive(Debug)]
struct Refused {
    why: String,
    /// Then it is asked again.
    until: Instant,
}

/// What a disk tells of itself.
#[derive(Debug, Clone)]
pub struct Report {
    pub known: Option<(BlockServiceId, mac::Key)>,
    /// The device its folder is on, while it is there.
    pub device: Option<u64>,
    pub space: Space,
    pub totals: Totals,
    /// It takes no writes.
    pub read_only: bool,
    pub io_errors: u64,
    /// Empty: it is well.
    pub problem: String,
}

impl Disk {
    /// Opens a disk; formats an empty folder when that is allowed. One that cannot be opened is lost, and why is said.
    pub fn open(config: DiskConfig, cluster: ClusterId, ids: Ids) -> (Disk, Option<OpenError>) {
        let disk = Disk {
            cluster,
            ids,
            state: Mutex::new(State {
                store: Err("it was not opened yet".to_owned()),
                known: None,
                looking_since: None,
                refused: None,
                space: Space::default(),
                totals: Totals::default(),
                read_only: false,
            }),
            writes: Arc::new(Semaphore::new(WRITES_PER_DISK_MAX)),
            reads: Arc::new(Semaphore::new(READS_PER_DISK_MAX)),
            checks: Arc::new(Semaphore::new(CHECKS_PER_DISK_MAX)),
            options: config.options.clone(),
            io_errors: AtomicU64::new(0),
            config,
        };
        match disk.open_or_format() {
            Ok(store) => {
                disk.state().store = Ok(Arc::clone(&store));
                disk.look_at(&store);
                (disk, None)
            }
            Err(error) => {
                disk.lose(&error.problem.to_string());
                (disk, Some(error))
            }
        }
    }

    fn open_or_format(&self) -> Result<Arc<Store>, OpenError> {
        let DiskConfig { path, expect_existing, .. } = &self.config;
        if !expect_existing && matches!(inspect(path)?, Contents::Absent | Contents::Empty) {
            let identity = self.new_identity()?;
            format(path, &identity)?;
            tracing::info!(path = %path.display(), id = %identity.service, "disk formatted");
        }
        self.open_existing()
    }

    fn new_identity(&self) -> Result<Identity, OpenError> {
        let mut random = [0; 40];
        getrandom::fill(&mut random).map_err(|error| OpenError {
            path: self.config.path.clone(),
            problem: OpenProblem::Io {
                what: "get random bytes for its key",
                source: std::io::Error::other(error.to_string()),
            },
        })?;
        let (id, key) = random.split_at(8);
        let (mut id_bytes, mut key_bytes) = ([0; 8], [0; 32]);
        id_bytes.copy_from_slice(id);
        key_bytes.copy_from_slice(key);
        Ok(Identity {
            cluster: self.cluster,
            service: BlockServiceId(u64::from_le_bytes(id_bytes).max(1)),
            key: key_bytes,
            formatted_at: eggs_daemon::clock::wall(),
            storage_class: self.config.storage_class,
            failure_domain: self.config.failure_domain.clone(),
        })
    }

    /// Opens the disk if it is the one it should be; nothing in another is changed.
    fn open_existing(&self) -> Result<Arc<Store>, OpenError> {
        let error = |problem| OpenError { path: self.config.path.clone(), problem };
        // What is wrong with one that is none, opening says.
        if let Ok(Contents::Disk(identity)) = inspect(&self.config.path) {
            self.check(&identity).map_err(error)?;
        }
        let store = Store::open(&self.config.path, self.cluster, self.options.clone())?;
        let identity = store.identity();
        lock(&self.ids).entry(identity.service).or_insert_with(|| self.config.path.clone());
        self.check(identity).map_err(error)?;
        self.state().known = Some((identity.service, identity.key));
        Ok(store)
    }

    /// Refuses a disk that is not the one it should be.
    fn check(&self, identity: &Identity) -> Result<(), OpenProblem> {
        if identity.cluster != self.cluster {
            return Err(OpenProblem::AnotherCluster { theirs: identity.cluster, ours: self.cluster });
        }
        if identity.storage_class != self.config.storage_class {
            return Err(OpenProblem::Mismatch(format!(
                "it was formatted with storage class {}, but is configured with {}",
                identity.storage_class, self.config.storage_class
            )));
        }
        let id = identity.service;
        if let Some((known, _)) = self.state().known
            && known != id
        {
            return Err(OpenProblem::Mismatch(format!("another disk ({id}) is in the place of {known}")));
        }
        match lock(&self.ids).get(&id) {
            Some(first) if *first != self.config.path => Err(OpenProblem::Mismatch(format!(
                "it has the same id ({id}) as disk {}: one is a copy of the other",
                first.display()
            ))),
            _ => Ok(()),
        }
    }

    pub fn path(&self) -> &Path {
        &self.config.path
    }

    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// Its id, when it was ever seen.
    pub fn id(&self) -> Option<BlockServiceId> {
        self.state().known.map(|(id, _)| id)
    }

    /// A lost disk's id and key, as the cluster remembers them.
    pub fn remember(&self, id: BlockServiceId, key: mac::Key) {
        let mut state = self.state();
        if state.known.is_some() {
            return;
        }
        if *lock(&self.ids).entry(id).or_insert_with(|| self.config.path.clone()) == self.config.path {
            state.known = Some((id, key));
        }
    }

    /// The store, to work on.
    ///
    /// # Errors
    /// `DiskLost`, with the reason.
    pub fn store(&self) -> Result<Arc<Store>, Refusal> {
        let state = self.state();
        let lost = |why: &str| {
            Err(Refusal::new(BlockError::DiskLost, format!("disk {}: {why}", self.path().display())))
        };
        match &state.store {
            Err(why) => lost(why),
            Ok(_) if let Some(Refused { why, .. }) = &state.refused => lost(why),
            Ok(store) if let Some(why) = self.hangs(&state, store) => lost(why),
            Ok(store) => Ok(Arc::clone(store)),
        }
    }

    /// Another process serves it, as the cluster says: nothing is served from this one for now.
    pub fn refuse(&self, why: &str) {
        let mut state = self.state();
        if state.refused.is_none() {
            tracing::error!(path = %self.path().display(), why, "disk is refused by the cluster, and not served");
        }
        state.refused = Some(Refused { why: why.to_owned(), until: Instant::now() + REFUSED_PAUSE });
    }

    /// The cluster takes it.
    pub fn accept(&self) {
        if self.state().refused.take().is_some() {
            tracing::info!(path = %self.path().display(), "disk is not refused any more");
        }
    }

    /// It was refused a short while ago.
    pub fn is_refused(&self) -> bool {
        self.state().refused.as_ref().is_some_and(|refused| refused.until > Instant::now())
    }

    /// What the one who asked is told of a failure. When the disk is to blame it is looked at, and
    /// may turn out lost. Blocks.
    pub fn fault(&self, error: &StoreError) -> Refusal {
        let what = format!("disk {}: {error}", self.path().display());
        let code = error.code();
        match error {
            StoreError::Refused(BlockError::DiskLost) => {}
            StoreError::Io { .. } if code == BlockError::Io => {
                self.io_errors.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(path = %self.path().display(), error = %error, "disk failed");
            }
            StoreError::Corrupt(_) => {
                tracing::warn!(path = %self.path().display(), error = %error, "block is corrupt");
                return Refusal::new(code, what);
            }
            StoreError::Refused(_) | StoreError::Io { .. } => return Refusal::new(code, what),
        }
        // Not a look: one that is under way must not be waited for, nor its answer missed.
        let current = self.state().store.clone();
        if let Ok(store) = current
            && let Err(why) = store.check()
        {
            self.lose(&why);
        }
        self.store().err().unwrap_or_else(|| Refusal::new(code, what))
    }

    /// Looks whether the disk is still there, or there again. Blocks; one at a time.
    pub fn look(&self) {
        let current = {
            let mut state = self.state();
            if state.looking_since.is_some() {
                return;
            }
            state.looking_since = Some(Instant::now());
            state.store.clone()
        };
        match current {
            Ok(store) => self.look_at(&store),
            Err(_) => self.look_for(),
        }
        self.state().looking_since = None;
    }

    fn look_at(&self, store: &Arc<Store>) {
        match store.check() {
            Ok(()) => {
                // Nothing that asks the disk while others wait for the state.
                let (space, totals) = (store.space(), store.totals());
                let read_only = store.is_read_only() || store.mounted_read_only();
                let mut state = self.state();
                (state.totals, state.read_only) = (totals, read_only);
                if let Ok(space) = space {
                    state.space = space;
                }
            }
            Err(why) => self.lose(&why),
        }
    }

    fn look_for(&self) {
        match self.open_existing() {
            Ok(store) => {
                self.state().store = Ok(Arc::clone(&store));
                self.look_at(&store);
                tracing::info!(path = %self.path().display(), "lost disk is back");
            }
            Err(error) => {
                let mut state = self.state();
                let why = error.problem.to_string();
                // Its first owner's last requests may still hold the lock: not worth a new reason.
                if !matches!(error.problem, OpenProblem::InUse) && state.store.as_ref().err() != Some(&why) {
                    tracing::warn!(path = %self.path().display(), why, "disk is still lost");
                    state.store = Err(why);
                }
            }
        }
    }

    fn lose(&self, why: &str) {
        let mut state = self.state();
        if state.store.as_ref().err().map(String::as_str) == Some(why) {
            return;
        }
        tracing::error!(path = %self.path().display(), why, "disk is lost");
        state.store = Err(why.to_owned());
        state.space = Space::default();
        state.totals = Totals::default();
    }

    /// Lets go of the disk; it is unlocked when the last thread that works on it has ended.
    pub fn close(&self) -> Weak<Store> {
        let store = std::mem::replace(&mut self.state().store, Err("the daemon is stopping".to_owned()));
        store.map_or_else(|_| Weak::new(), |store| Arc::downgrade(&store))
    }

    /// From memory: never waits for the disk.
    pub fn report(&self) -> Report {
        let store = self.state().store.clone();
        // Fresher than at the last look.
        let fresh = store.map(|store| store.totals());
        let state = self.state();
        let problem = match &state.store {
            Err(why) => why.clone(),
            Ok(store) if let Some(why) = self.hangs(&state, store) => why.to_owned(),
            Ok(_) => String::new(),
        };
        Report {
            known: state.known,
            device: state.store.as_ref().ok().map(|store| store.device()),
            space: state.space,
            totals: state.store.as_ref().map_or(state.totals, |_| fresh.unwrap_or(state.totals)),
            read_only: state.read_only,
            io_errors: self.io_errors.load(Ordering::Relaxed),
            problem,
        }
    }

    /// What it has not ended for too long, if anything.
    fn hangs(&self, state: &State, store: &Store) -> Option<&'static str> {
        if state.looking_since.is_some_and(|since| since.elapsed() > CHECK_MAX) {
            return Some("it does not answer");
        }
        let underway_max = self.options.underway_max.unwrap_or(UNDERWAY_MAX);
        (store.underway() > underway_max).then_some("it does not come to the end of a write")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the process, so nobody ever sees what a poisoned lock guards.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
