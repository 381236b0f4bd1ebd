//! From a directory to a host whose state is as new as its log.

use std::cell::Cell;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once, PoisonError};

use eggs_consensus_core::{GroupId, Host, HostOptions, Now, Role, StorageError};
use eggs_machine::{Machine, Table, group};
use eggs_proto::StoreId;

use crate::handle::{ConsensusError, Look};
use crate::log_files::LogFiles;
use crate::places::{Shared, wall};
use crate::sled_state::SledState;
use crate::snapshot_files::SnapshotFiles;

pub(crate) type FileHost<M> = Host<M, LogFiles, SledState, SnapshotFiles>;
/// With the roles that opening it came to.
pub(crate) type Opened<M> = (FileHost<M>, Vec<(GroupId, Role)>);
/// The machine of a group; `None`: such groups are not here.
pub(crate) type MachineOf<M> = Arc<Mutex<dyn Fn(GroupId) -> Option<M> + Send>>;

impl<M: Machine> Look for FileHost<M> {
    fn led(&self, group: GroupId) -> Option<&dyn Table> {
        self.view(group).map(|table| table as &dyn Table)
    }

    fn local(&self, group: GroupId) -> Option<&dyn Table> {
        self.local_view(group).map(|table| table as &dyn Table)
    }
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// For the thread's name and the metrics' label: "shard", "crossdir", "shuckle".
    pub name: &'static str,
    /// Exists and belongs to this process.
    pub directory: PathBuf,
    /// The directory's own id, and that of its replicas.
    pub store: StoreId,
    /// Reads without a round to the others while a lease holds. All stores of a group must agree on it.
    pub lease: bool,
    /// Of snapshots sent, to all stores together.
    pub snapshot_bytes_per_second: u64,
}

pub(crate) fn machine<M>(machine_of: &MachineOf<M>, group: GroupId) -> Option<M> {
    machine_of.lock().unwrap_or_else(PoisonError::into_inner)(group)
}

/// Opens every group the log holds and applies what the log has beyond the state.
pub(crate) fn open<M: Machine + 'static>(
    options: &Options,
    machine_of: &MachineOf<M>,
) -> Result<Opened<M>, ConsensusError> {
    let directory = &options.directory;
    let seed = getrandom::u64().map_err(|error| ConsensusError::Storage(format!("no entropy: {error}")))?;
    let host_options = HostOptions {
        store: options.store,
        seed,
        lease: options.lease,
        snapshot_bytes_per_second: options.snapshot_bytes_per_second,
    };
    // The truth first, and on its own: trouble with it must never touch the state, which may be all
    // that is left of what it lost.
    let mut log = LogFiles::open(directory, options.name)?;
    let mut rebuilding = false;
    loop {
        let snapshots = SnapshotFiles::open(directory.join("snapshots")).map_err(failed)?;
        let why = match open_state(directory) {
            Ok(state) => match open_host(host_options, machine_of, log, snapshots, state) {
                Ok(opened) => return Ok(opened),
                Err(error) if !error.is_of_state() => return Err(failed(error)),
                Err(error) => {
                    log = LogFiles::open(directory, options.name)?;
                    error
                }
            },
            Err(error) if !error.is_of_state() => return Err(failed(error)),
            Err(error) => error,
        };
        if rebuilding {
            return Err(failed(why));
        }
        rebuilding = true;
        tracing::warn!(path = %directory.join("state").display(), error = %why, "state cannot be used: putting it aside and rebuilding it from snapshots and log");
        SledState::put_aside(directory).map_err(failed)?;
    }
}

fn failed(error: StorageError) -> ConsensusError {
    let what = error.to_string();
    if error.is_damage() { ConsensusError::Damaged(what) } else { ConsensusError::Storage(what) }
}

/// The state, every page of which can be read. sled can panic on damaged files instead of saying so.
fn open_state(directory: &Path) -> Result<SledState, StorageError> {
    let opened = catch_panic(AssertUnwindSafe(|| {
        let state = SledState::open(directory)?;
        state.read_all()?;
        Ok(state)
    }));
    opened.unwrap_or_else(|()| Err(StorageError::of_state("sled panicked")))
}

fn open_host<M: Machine + 'static>(
    options: HostOptions,
    machine_of: &MachineOf<M>,
    log: LogFiles,
    snapshots: SnapshotFiles,
    state: SledState,
) -> Result<Opened<M>, StorageError> {
    let machine_of = Arc::clone(machine_of);
    let mut host = Host::open(options, move |id| machine(&machine_of, id), log, state, snapshots)?;
    let mut roles = Vec::new();
    while host.has_entries() {
        // Nobody hears of it yet: there is no stream. What is lost is said again.
        let turn = host.turn(Now { wall: wall(), ..Now::default() }, &mut |_, _| {})?;
        roles.extend(turn.roles);
    }
    Ok((host, roles))
}

/// The clock of every group is believed.
pub(crate) fn raise_clock<M: Machine>(host: &FileHost<M>, shared: &Shared) -> Result<(), ConsensusError> {
    for view in host.groups().filter_map(|id| host.local_view(id)) {
        let time = group::clock(view).map_err(|error| ConsensusError::Storage(error.to_string()))?;
        shared.clock.raise(time);
    }
    Ok(())
}

/// Runs `f` with its panics caught and not reported: the process's panic hook may end the process. Panics of other
/// threads are reported as ever.
fn catch_panic<R>(f: impl FnOnce() -> R + std::panic::UnwindSafe) -> Result<R, ()> {
    static HOOKED: Once = Once::new();
    thread_local!(static SILENT: Cell<bool> = const { Cell::new(false) });
    HOOKED.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !SILENT.get() {
                hook(info);
            }
        }));
    });
    SILENT.set(true);
    let result = std::panic::catch_unwind(f);
    SILENT.set(false);
    result.map_err(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_panics_that_are_caught_are_silent() {
        static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());
        std::panic::set_hook(Box::new(|info| {
            let what = info.payload().downcast_ref::<&str>().map(ToString::to_string);
            SEEN.lock().unwrap().extend(what);
        }));
        let inner = || {
            // Another thread's, in the meantime.
            assert!(std::thread::spawn(|| panic!("theirs")).join().is_err());
            panic!("ours");
        };
        assert_eq!(catch_panic(inner), Err(()));
        assert_eq!(catch_panic(|| 1), Ok(1));
        assert!(std::panic::catch_unwind(|| panic!("later")).is_err());
        assert_eq!(*SEEN.lock().unwrap(), ["theirs", "later"]);
    }
}
