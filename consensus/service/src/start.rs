//! Opening the consensus of a data directory, and what becomes of a damaged one.

use std::path::PathBuf;

use eggs_consensus::{ConsensusError, Event, GroupId, Handle, Options, Runner};
use eggs_daemon::DataDirectory;
use eggs_daemon::directory::DirectoryError;
use eggs_daemon::registry::{JoinError, RegistryCallError};
use eggs_machine::Machine;

/// Why a daemon with replicas cannot start or go on. One line each.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("{}: {error}", path.display())]
    Consensus { path: PathBuf, error: ConsensusError },
    /// And nothing else has what it held, as far as is known.
    #[error("the log in {} is damaged ({why}): {advice}", path.display())]
    Damaged { path: PathBuf, why: String, advice: String },
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Registry(#[from] RegistryCallError),
    #[error("no entropy from the system: {0}")]
    Entropy(String),
    #[error("the replicas of {name} stopped: {why}")]
    Failed { name: &'static str, why: String },
}

/// How the consensus of a store is run.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// The kind of its directory: one word, in logs and metrics too.
    pub name: &'static str,
    pub read_lease: bool,
    pub snapshot_bytes_per_second: u64,
}

/// Opens the log in `directory` and brings the state up to it. Blocks; must be called within a tokio runtime.
///
/// A log that has lost or damaged what it had acknowledged would make a forgetful voter. When
/// `may_start_anew` says so, it is put aside, and the directory goes on as a new, empty store (RE-1).
///
/// # Errors
/// `may_start_anew`'s advice in [`StartError::Damaged`]; what cannot be read or written.
pub fn start<M, Of, On>(
    directory: &mut DataDirectory,
    options: &StoreOptions,
    may_start_anew: impl FnOnce() -> Result<(), String>,
    machine_of: Of,
    on_event: On,
) -> Result<(Handle, Runner), StartError>
where
    M: Machine + Send + 'static,
    M::Effect: Send + 'static,
    Of: Fn(GroupId) -> Option<M> + Clone + Send + 'static,
    On: FnMut(Event<M::Effect>) + Clone + Send + 'static,
{
    let failed = |path: PathBuf| move |error| StartError::Consensus { path, error };
    let path = directory.path().to_owned();
    let first = spawn(directory, options, machine_of.clone(), on_event.clone());
    let why = match first {
        Err(ConsensusError::Damaged(why)) => why,
        started => return started.map_err(failed(path)),
    };
    if let Err(advice) = may_start_anew() {
        return Err(StartError::Damaged { path, why, advice });
    }
    let old = directory.store();
    let aside = directory.put_aside()?;
    tracing::error!(
        why, %old, new = %directory.store(), folder = %aside.display(),
        "the log is damaged: what was here is put aside, and this host begins again as a new store"
    );
    spawn(directory, options, machine_of, on_event).map_err(failed(path))
}

fn spawn<M, Of, On>(
    directory: &DataDirectory,
    options: &StoreOptions,
    machine_of: Of,
    on_event: On,
) -> Result<(Handle, Runner), ConsensusError>
where
    M: Machine + Send + 'static,
    M::Effect: Send + 'static,
    Of: Fn(GroupId) -> Option<M> + Send + 'static,
    On: FnMut(Event<M::Effect>) + Send + 'static,
{
    let options = Options {
        name: options.name,
        directory: directory.path().to_owned(),
        store: directory.store(),
        lease: options.read_lease,
        snapshot_bytes_per_second: options.snapshot_bytes_per_second,
    };
    eggs_consensus::spawn(&options, machine_of, on_event)
}
