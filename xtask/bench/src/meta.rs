//! Suite `meta`: how many operations on names a cluster does in a second.
//!
//! A client is a [`Client`] of its own with one operation in flight. In rows of several clients each has a directory
//! of its own, as programs mostly do; `…_shared` rows put all of them into one directory. Every operation that changes
//! something is durable when it is counted.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use bytes::Bytes;
use eggs_client::{CreateOptions, Directory, ListOptions, Replace, SmallFile};
use eggs_proto::InodeId;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::Setup;
use super::load::{Load, Place, Worker, sample};
use super::report::Report;

/// Entries of the directory that is listed.
const LISTED: u32 = 10_000;

/// Files in one request when a directory is filled.
const FILL_BATCH: u32 = 500;

const MANY: u32 = 16;

pub async fn run(setup: &Setup, report: &mut Report) -> Result<()> {
    let cluster = setup.cluster()?;
    let load = Load::new(&cluster, "meta", MANY, setup.run_time).await?;
    let bench = Bench { setup, load };
    bench.create(report).await?;
    bench.small(report).await?;
    bench.mkdir(report).await?;
    bench.rmdir(report).await?;
    bench.rename(report).await?;
    bench.move_across(report).await?;
    bench.unlink(report).await?;
    bench.read(report).await?;
    bench.load.close().await;
    cluster.stop()
}

struct Bench<'a> {
    setup: &'a Setup,
    load: Load<'a>,
}

impl Bench<'_> {
    async fn create(&self, report: &mut Report) -> Result<()> {
        let create = |worker: Arc<Worker>, n| async move {
            let name = format!("file-{}-{n}", worker.number);
            worker.directory.put_bytes(name, Bytes::new(), &CreateOptions::default()).await?;
            Ok(())
        };
        self.rate(report, "create_empty", 1, Place::Own, create).await?;
        self.rate(report, "create_empty", MANY, Place::Own, create).await?;
        self.rate(report, "create_empty_shared", MANY, Place::Shared, create).await
    }

    async fn small(&self, report: &mut Report) -> Result<()> {
        let put = |worker: Arc<Worker>, n| async move {
            let contents = Bytes::from_static(&[0xe9; 1024]);
            worker.directory.put_bytes(format!("small-{n}"), contents, &CreateOptions::default()).await?;
            Ok(())
        };
        self.rate(report, "put_1kib", 1, Place::Own, put).await?;
        self.rate(report, "put_1kib", MANY, Place::Own, put).await
    }

    async fn mkdir(&self, report: &mut Report) -> Result<()> {
        let mkdir = |worker: Arc<Worker>, n| async move {
            worker.directory.mkdir(format!("directory-{}-{n}", worker.number), None).await?;
            Ok(())
        };
        self.rate(report, "mkdir", 1, Place::Own, mkdir).await?;
        self.rate(report, "mkdir", MANY, Place::Own, mkdir).await?;
        self.rate(report, "mkdir_shared", MANY, Place::Shared, mkdir).await
    }

    /// A directory made and removed: two operations, counted as one.
    async fn rmdir(&self, report: &mut Report) -> Result<()> {
        let brief = |worker: Arc<Worker>, n| async move {
            let name = format!("brief-{n}");
            worker.directory.mkdir(&name, None).await?;
            worker.directory.rmdir(&name).await?;
            Ok(())
        };
        self.rate(report, "mkdir_rmdir", MANY, Place::Own, brief).await
    }

    /// One file per client, given a new name again and again.
    async fn rename(&self, report: &mut Report) -> Result<()> {
        let rename = |worker: Arc<Worker>, n: u64| async move {
            if n == 0 {
                worker.directory.put_bytes("name-0", Bytes::new(), &CreateOptions::default()).await?;
            }
            let (from, to) = (format!("name-{n}"), format!("name-{}", n + 1));
            worker.directory.rename(from, to, Replace::Refuse).await?;
            Ok(())
        };
        self.rate(report, "rename_same_dir", 1, Place::Own, rename).await?;
        self.rate(report, "rename_same_dir", MANY, Place::Own, rename).await
    }

    /// One file per client, moved to and fro between two directories.
    async fn move_across(&self, report: &mut Report) -> Result<()> {
        let root = self.load.root.clone();
        let to_and_fro = move |worker: Arc<Worker>, n: u64| {
            let place = |side: u64| format!("{root}/across-{}-{side}", worker.directory.inode());
            let (here, there) = (place(n % 2), place((n + 1) % 2));
            async move {
                if n == 0 {
                    worker.client.mkdir(&here, None).await?;
                    worker.client.mkdir(&there, None).await?;
                    let file = format!("{here}/file");
                    worker.client.put_bytes(file, Bytes::new(), &CreateOptions::default()).await?;
                }
                let (from, to) = (format!("{here}/file"), format!("{there}/file"));
                worker.client.rename(from, to, Replace::Refuse).await?;
                Ok(())
            }
        };
        self.rate(report, "rename_across", 1, Place::Own, to_and_fro.clone()).await?;
        self.rate(report, "rename_across", MANY, Place::Own, to_and_fro).await
    }

    /// A file made and removed: two operations, counted as one.
    async fn unlink(&self, report: &mut Report) -> Result<()> {
        let brief = |worker: Arc<Worker>, n| async move {
            let name = format!("brief-{n}");
            worker.directory.put_bytes(&name, Bytes::new(), &CreateOptions::default()).await?;
            worker.directory.unlink(&name).await?;
            Ok(())
        };
        self.rate(report, "create_unlink", MANY, Place::Own, brief).await
    }

    async fn read(&self, report: &mut Report) -> Result<()> {
        let path = format!("{}/listed", self.load.root);
        self.load.clients[0].mkdir(&path, None).await?;
        let files: Arc<[InodeId]> = fill(&self.load.clients[0].directory(&path).await?).await?.into();
        let by_id = move |worker: Arc<Worker>, n: u64| {
            let mut random = SmallRng::seed_from_u64((u64::from(worker.number) << 32) | n);
            let file = files[random.random_range(0..files.len())];
            async move {
                let found = worker.client.stat_inode(file).await?;
                ensure!(found.inode == file, "asked for {file}, got {}", found.inode);
                Ok(())
            }
        };
        self.rate(report, "stat_by_id", 1, Place::Own, by_id.clone()).await?;
        self.rate(report, "stat_by_id", MANY, Place::Own, by_id).await?;
        let listed = path.clone();
        let by_path = move |worker: Arc<Worker>, n: u64| {
            let file = format!("{listed}/file-{}", n % u64::from(LISTED));
            async move {
                worker.client.stat(file).await?;
                Ok(())
            }
        };
        self.rate(report, "stat_by_path", MANY, Place::Own, by_path).await?;
        self.list(report, &path).await
    }

    async fn list(&self, report: &mut Report, path: &str) -> Result<()> {
        let directory = self.load.clients[0].directory(path).await?;
        let mut samples = Vec::new();
        for _ in 0..self.setup.runs {
            let (cpu, began, mut entries) = (self.load.cluster.cpu()?, Instant::now(), 0_u64);
            while began.elapsed() < self.setup.run_time {
                let mut listing = directory.list(ListOptions::default());
                let mut seen = 0;
                while let Some(page) = listing.next_page().await? {
                    seen += page.len() as u64;
                }
                ensure!(seen == u64::from(LISTED), "{seen} entries listed");
                entries += seen;
            }
            samples.push(sample(entries, began, self.load.cluster.cpu()? - cpu));
        }
        report.row("list_10000", 1, "entries/s", &samples);
        Ok(())
    }

    /// A row: `clients` clients do `operation` for the time of a run, in every run.
    async fn rate<F, Done>(
        &self,
        report: &mut Report,
        name: &'static str,
        clients: u32,
        place: Place,
        operation: F,
    ) -> Result<()>
    where
        F: Fn(Arc<Worker>, u64) -> Done + Clone + Send + 'static,
        Done: Future<Output = Result<()>> + Send,
    {
        let mut samples = Vec::new();
        for run in 0..self.setup.runs {
            let folder = format!("{name}-{clients}-{run}");
            samples.push(self.load.run(&folder, clients, place, operation.clone()).await?.sample);
        }
        report.row(name, clients, "ops/s", &samples);
        Ok(())
    }
}

/// Makes the files `file-0`… and returns their inodes.
async fn fill(directory: &Directory) -> Result<Vec<InodeId>> {
    let mut inodes = Vec::new();
    for batch in 0..LISTED / FILL_BATCH {
        let files = (batch * FILL_BATCH..(batch + 1) * FILL_BATCH)
            .map(|n| SmallFile { name: Bytes::from(format!("file-{n}")), ..SmallFile::default() });
        for published in directory.put_many(files.collect()).await {
            inodes.push(published?.inode);
        }
    }
    Ok(inodes)
}
