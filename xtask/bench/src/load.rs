//! Clients at work: each a [`Client`] of its own with one operation in flight.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use eggs_client::{Client, Directory};
use tokio::sync::OnceCell;

use super::cluster::Cluster;
use super::report::Sample;

/// A cluster, its clients, and the directory that all of a suite is below.
pub struct Load<'a> {
    pub cluster: &'a Cluster,
    pub clients: Vec<Client>,
    pub root: String,
    run_time: Duration,
}

/// One client at work: everything an operation needs.
pub struct Worker {
    pub client: Client,
    pub directory: Directory,
    /// Of the directory.
    pub path: String,
    pub number: u32,
    /// Of those who move things to and fro.
    pub sides: OnceCell<[Directory; 2]>,
}

/// Whether the clients of a row share a directory.
#[derive(Clone, Copy)]
pub enum Place {
    Own,
    Shared,
}

/// What one run came to.
pub struct Run {
    pub operations: u64,
    pub sample: Sample,
}

impl<'a> Load<'a> {
    /// Connects that many clients.
    pub async fn new(
        cluster: &'a Cluster,
        suite: &str,
        clients: u32,
        run_time: Duration,
    ) -> Result<Load<'a>> {
        let mut connected = Vec::new();
        for _ in 0..clients {
            connected.push(cluster.client().await?);
        }
        let root = format!("/bench-{suite}-{}", std::process::id());
        connected.first().context("no clients")?.mkdir(&root, None).await?;
        Ok(Load { cluster, clients: connected, root, run_time })
    }

    pub async fn close(self) {
        for client in &self.clients {
            client.close().await;
        }
    }

    /// Lets `clients` clients do `operation` for the time of a run, below a new directory of this name. The operation
    /// is told its number within the run and client.
    pub async fn run<F, Done>(&self, name: &str, clients: u32, place: Place, operation: F) -> Result<Run>
    where
        F: Fn(Arc<Worker>, u64) -> Done + Clone + Send + 'static,
        Done: Future<Output = Result<()>> + Send,
    {
        let workers = self.workers(name, clients, place).await?;
        let run = self.all(&workers, u64::MAX, Some(self.run_time), operation).await;
        run.with_context(|| name.to_owned())
    }

    /// Lets all workers do `operation`, each so often at most, and for so long at most.
    pub async fn all<F, Done>(
        &self,
        workers: &[Arc<Worker>],
        times: u64,
        time: Option<Duration>,
        operation: F,
    ) -> Result<Run>
    where
        F: Fn(Arc<Worker>, u64) -> Done + Clone + Send + 'static,
        Done: Future<Output = Result<()>> + Send,
    {
        let (cpu, began) = (self.cluster.cpu()?, Instant::now());
        let until = time.map(|time| began + time);
        let mut tasks = tokio::task::JoinSet::new();
        for worker in workers {
            let (worker, operation) = (Arc::clone(worker), operation.clone());
            tasks.spawn(async move {
                let mut done = 0;
                while done < times && until.is_none_or(|until| Instant::now() < until) {
                    operation(worker.clone(), done).await?;
                    done += 1;
                }
                anyhow::Ok(done)
            });
        }
        let mut operations = 0;
        while let Some(done) = tasks.join_next().await {
            operations += done??;
        }
        Ok(Run { operations, sample: sample(operations, began, self.cluster.cpu()? - cpu) })
    }

    /// Directories made below a new one of this name, connections open: what follows is the operation alone.
    pub async fn workers(&self, name: &str, clients: u32, place: Place) -> Result<Vec<Arc<Worker>>> {
        let parent = &format!("{}/{name}", self.root);
        self.clients[0].mkdir(parent, None).await?;
        let mut workers = Vec::new();
        for (number, client) in (0..clients).zip(&self.clients) {
            let path = match place {
                Place::Shared => parent.to_owned(),
                Place::Own => {
                    let path = format!("{parent}/client-{number}");
                    client.mkdir(&path, None).await?;
                    path
                }
            };
            let directory = client.directory(&path).await?;
            workers.push(Arc::new(Worker {
                client: client.clone(),
                directory,
                path,
                number,
                sides: OnceCell::new(),
            }));
        }
        Ok(workers)
    }
}

/// So many of something since then.
pub fn sample(operations: u64, began: Instant, cpu: f64) -> Sample {
    let took = began.elapsed().as_secs_f64();
    Sample { value: operations as f64 / took, cpu_per_unit: Some(cpu / operations.max(1) as f64) }
}
