//! Starting and stopping the consensus thread.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::{fmt, io};

use eggs_consensus_core::{GroupId, HostError, Role, StorageError};
use eggs_machine::Machine;
use tokio::sync::watch;

use crate::handle::{ConsensusError, Handle};
use crate::open::{MachineOf, Options, machine, open, raise_clock};
use crate::own_runtime::OwnRuntime;
use crate::places::Shared;
use crate::turner::Turner;

/// What happens to a store's groups, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<E> {
    /// What applied commands ask for. Of groups led here only; those of a new leader begin after its role.
    Effects(GroupId, Vec<E>),
    /// A replica's role has changed.
    Role(GroupId, Role),
}

/// Owns the consensus thread.
pub struct Runner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runner")
    }
}

/// Opens the groups that the directory holds, brings their state up to the log, and runs them in a thread of their own.
///
/// `machine_of` makes the machine of a group; `None`: such groups are never here. `on_event` is called on that thread; it must
/// not block. Must be called within a tokio runtime: the streams to other stores run on it.
///
/// # Errors
/// When the files cannot be opened, or hold what cannot be rebuilt; `Damaged` when they have lost what was acknowledged.
pub fn spawn<M>(
    options: &Options,
    machine_of: impl Fn(GroupId) -> Option<M> + Send + 'static,
    on_event: impl FnMut(Event<M::Effect>) + Send + 'static,
) -> Result<(Handle, Runner), ConsensusError>
where
    M: Machine + Send + 'static,
{
    let runtime = tokio::runtime::Handle::current();
    let machine_of: MachineOf<M> = Arc::new(Mutex::new(machine_of));
    let (host, roles) = open(options, &machine_of)?;
    let name = options.name;
    let knows = Box::new(move |group| machine(&machine_of, group).is_some());
    let shared = Arc::new(Shared::new(name, options.store, knows));
    raise_clock(&host, &shared)?;
    if !host.rebuilt().is_empty() {
        tracing::warn!(host = name, groups = host.rebuilt().len(), "state rebuilt from snapshots and log");
    }
    let (stopped_sender, stopped) = watch::channel(None);
    let closing = Arc::clone(&shared);
    let mut turner = Turner::new(host, Arc::clone(&shared), runtime, on_event);
    let thread = std::thread::Builder::new()
        .name(format!("{name}-consensus"))
        .spawn(move || {
            let closed = CloseAtEnd(closing);
            let own = OwnRuntime::new();
            let result = own.as_ref().map_err(no_runtime).and_then(|own| {
                let _ = closed.0.own_runtime.set(own.handle().clone());
                turner.run(own, roles)
            });
            turner.end();
            own.iter().for_each(OwnRuntime::farewells);
            drop(own);
            let result = result.and_then(|()| turner.close());
            if let Err(error) = &result {
                tracing::error!(host = name, %error, "consensus stopped: storage failed");
            }
            let _ =
                stopped_sender.send(Some(result.err().map(|error| error.to_string()).unwrap_or_default()));
        })
        .map_err(|error| ConsensusError::Storage(format!("cannot start a thread: {error}")))?;
    Ok((Handle { shared: Arc::clone(&shared), stopped }, Runner { shared, thread: Some(thread) }))
}

fn no_runtime(error: &io::Error) -> HostError {
    HostError { group: GroupId(0), error: StorageError::new(format!("cannot wait for peers: {error}")) }
}

/// However the thread ends: nobody waits for it any more.
struct CloseAtEnd(Arc<Shared>);

impl Drop for CloseAtEnd {
    fn drop(&mut self) {
        self.0.inbox.close();
    }
}

impl Runner {
    /// Lets others take over what is led here and what was accepted finish, makes the state durable, and joins the thread.
    /// Blocks for as long as that takes: without quorum a second for the former.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.inbox.tell(|news| news.stop = true);
        let _ = thread.join();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.join();
    }
}
