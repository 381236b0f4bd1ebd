//! One client: what it does next, and whether what it read is right.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use eggs_client::{Client, ClientError, CreateOptions, ListOptions, Metadata, Refusal, Replace};
use eggs_proto::Time;
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;

use super::gaps::Timeline;
use super::model::{Change, Key, Model, Node, Seen, check_past, contents};
use super::{Done, patient};
use crate::rng;

/// Directories of a client: they are on different shards.
const DIRECTORIES: usize = 3;
/// Names it uses in each of them: few, so that most are written again and again.
const FILES: usize = 6;
const FOLDERS: usize = 3;
/// Instants of the past that it remembers.
const PAST: usize = 6;
/// A client that was so wrong has said enough.
const VIOLATIONS_MAX: usize = 5;

pub(super) struct Worker {
    number: usize,
    own: Client,
    /// Its neighbour's: another view of who leads.
    other: Client,
    /// Waits for long.
    patient: Client,
    home: String,
    rng: ChaCha8Rng,
    model: Model,
    /// Names not used any more get another number: those of calls in doubt.
    generations: BTreeMap<(usize, char, usize), u64>,
    next: u64,
    past: VecDeque<(usize, Time, BTreeMap<String, Node>)>,
    timeline: Timeline,
    violations: Vec<String>,
}

/// What can be done next.
enum Step {
    Put(Key),
    Mkdir(Key),
    Unlink(Key),
    Rmdir(Key),
    Rename(Key, Key),
    Exchange(Key, Key),
    Stat(Key),
    Read(Key),
    List(usize),
    Past,
}

/// Why a step came to nothing.
enum Failure {
    /// It may have happened, or happen yet.
    Unknown(String),
    /// It must not be.
    Wrong(String),
}

impl Worker {
    pub async fn new(number: usize, own: Client, other: Client, patient: Client, home: String) -> Worker {
        for directory in 0..DIRECTORIES {
            patient.mkdir_all(format!("{home}/{directory}")).await.expect("a client's directories");
        }
        Worker {
            number,
            own,
            other,
            patient,
            home,
            rng: rng(&format!("client {number}")),
            model: Model::default(),
            generations: BTreeMap::new(),
            next: (number as u64) << 32,
            past: VecDeque::new(),
            timeline: Timeline::new(number),
            violations: Vec::new(),
        }
    }

    /// Works until told to stop; then compares everything.
    pub async fn run(mut self, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) -> Done {
        while !stop.load(Ordering::Relaxed) && self.violations.len() < VIOLATIONS_MAX {
            let step = self.choose();
            let what = step.name();
            match self.take(step).await {
                Ok(()) => {
                    self.timeline.answered(what);
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                }
                Err(Failure::Unknown(why)) => {
                    self.timeline.failed(format!("client {}: {what}: {why}", self.number));
                }
                Err(Failure::Wrong(why)) => self.wrong(&format!("{what}: {why}")),
            }
        }
        self.settle().await;
        Done { timeline: self.timeline, violations: self.violations, patient: patient(self.number) }
    }

    fn wrong(&mut self, why: &str) {
        self.violations.push(format!("client {}: {why}", self.number));
    }

    fn key(&mut self, kind: char) -> Key {
        let directory = self.rng.random_range(0..DIRECTORIES);
        self.key_in(directory, kind)
    }

    fn key_in(&mut self, directory: usize, kind: char) -> Key {
        let number = self.rng.random_range(0..if kind == 'f' { FILES } else { FOLDERS });
        let generation = self.generations.get(&(directory, kind, number)).copied().unwrap_or(0);
        (directory, format!("{kind}{number}.{generation}"))
    }

    /// The name is not used again.
    fn retire(&mut self, (directory, name): &Key) {
        let (kind, rest) = name.split_at(1);
        let (number, generation) = rest.split_once('.').unwrap_or_default();
        if let (Some(kind), Ok(number), Ok(generation)) =
            (kind.chars().next(), number.parse(), generation.parse::<u64>())
        {
            self.generations.insert((*directory, kind, number), generation + 1);
        }
    }

    fn path(&self, (directory, name): &Key) -> String {
        format!("{}/{directory}/{name}", self.home)
    }

    fn choose(&mut self) -> Step {
        let weight = self.rng.random_range(0..100);
        let file = self.key('f');
        let folder = self.key('d');
        let there = |worker: &Worker, key: &Key| worker.model.at(key).is_some();
        match weight {
            0..8 if !there(self, &folder) => Step::Mkdir(folder),
            0..3 => Step::Rmdir(folder),
            3..16 if there(self, &file) => {
                let to = self.key_in(file.0, 'f');
                if to == file { Step::Unlink(file) } else { Step::Rename(file, to) }
            }
            16..26 if there(self, &file) => {
                let to = self.key('f');
                match to == file {
                    true => Step::Stat(file),
                    false if weight % 3 == 0 && there(self, &to) => Step::Exchange(file, to),
                    false => Step::Rename(file, to),
                }
            }
            26..30 if there(self, &folder) => {
                let to = self.key('d');
                match there(self, &to) {
                    true if to == folder => Step::Stat(to),
                    true => Step::Exchange(folder, to),
                    false => Step::Rename(folder, to),
                }
            }
            30..36 if there(self, &file) => Step::Unlink(file),
            36..50 => Step::Stat(if weight % 2 == 0 { file } else { folder }),
            50..60 => Step::Read(file),
            60..70 => Step::List(file.0),
            70..74 => Step::Past,
            74..80 => {
                let random = self.rng.random_range(0..usize::MAX);
                self.model.doubtful(random).map_or(Step::Stat(folder), Step::Read)
            }
            _ => Step::Put(file),
        }
    }

    /// Mostly its own connections; sometimes its neighbour's.
    fn eyes(&mut self) -> Client {
        if self.rng.random_bool(0.3) { self.other.clone() } else { self.own.clone() }
    }

    async fn take(&mut self, step: Step) -> Result<(), Failure> {
        match step {
            Step::Put(key) => self.put(key).await,
            Step::Mkdir(key) => {
                let done = self.own.mkdir(self.path(&key), None).await;
                let node = |inode| Some(Node::Directory { inode });
                let change = |inode| vec![(key.clone(), None, node(inode))];
                self.changed(format!("mkdir {key:?}"), done.map(Some), change)
            }
            Step::Unlink(key) => {
                let (done, before) = (self.own.unlink(self.path(&key)).await, self.model.at(&key).cloned());
                self.changed(format!("rm {key:?}"), done, |_| vec![(key.clone(), before.clone(), None)])
            }
            Step::Rmdir(key) => {
                let (done, before) = (self.own.rmdir(self.path(&key)).await, self.model.at(&key).cloned());
                let done = done.map(drop);
                self.changed(format!("rmdir {key:?}"), done, |_| vec![(key.clone(), before.clone(), None)])
            }
            Step::Rename(from, to) => {
                let (moved, replaced) = (self.model.at(&from).cloned(), self.model.at(&to).cloned());
                let replace = if replaced.is_some() { Replace::File } else { Replace::Refuse };
                let done = self.own.rename(self.path(&from), self.path(&to), replace).await.map(drop);
                self.changed(format!("mv {from:?} {to:?}"), done, |_| {
                    vec![(from.clone(), moved.clone(), None), (to.clone(), replaced.clone(), moved.clone())]
                })
            }
            Step::Exchange(one, other) => {
                let (first, second) = (self.model.at(&one).cloned(), self.model.at(&other).cloned());
                let done = self.own.exchange(self.path(&one), self.path(&other)).await;
                self.changed(format!("mv --exchange {one:?} {other:?}"), done, |()| {
                    let there = (one.clone(), first.clone(), second.clone());
                    vec![there, (other.clone(), second.clone(), first.clone())]
                })
            }
            Step::Stat(key) => {
                let client = self.eyes();
                let seen = found(client.stat(self.path(&key)).await)?;
                self.check(&key, seen.as_ref().map(Seen::of).as_ref())
            }
            Step::Read(key) => {
                let client = self.eyes();
                let seen = read(&client, &self.path(&key)).await?;
                self.check(&key, seen.as_ref())
            }
            Step::List(directory) => {
                let client = self.eyes();
                let found = list(&client, &format!("{}/{directory}", self.home), Time(0)).await?;
                let known = self.model.certain(directory);
                self.model.check_listing(directory, &found).map_err(Failure::Wrong)?;
                if let Some(known) = known {
                    self.past.push_back((directory, self.own.now(), known));
                    if self.past.len() > PAST {
                        self.past.pop_front();
                    }
                }
                Ok(())
            }
            Step::Past => self.look_back().await,
        }
    }

    /// An instant of the past, as any replica may tell it.
    async fn look_back(&mut self) -> Result<(), Failure> {
        if self.past.is_empty() {
            return Ok(());
        }
        let (directory, at, known) = self.past[self.rng.random_range(0..self.past.len())].clone();
        let client = self.eyes();
        let found = list(&client, &format!("{}/{directory}", self.home), at).await?;
        check_past(&known, &found).map_err(|wrong| Failure::Wrong(format!("{directory} at {at:?}: {wrong}")))
    }

    async fn put(&mut self, key: Key) -> Result<(), Failure> {
        self.next += 1;
        let number = self.next;
        let before = self.model.at(&key).cloned();
        let replace = if before.is_some() { Replace::File } else { Replace::Refuse };
        let options = CreateOptions { replace, ..CreateOptions::default() };
        let done = self.own.put_bytes(self.path(&key), contents(number), &options).await;
        self.changed(format!("put {key:?} number {number}"), done.map(|made| Some(made.inode)), |inode| {
            vec![(key.clone(), before.clone(), Some(Node::File { number, inode }))]
        })
    }

    /// Notes what a call did, or that nobody knows.
    fn changed<T: Default>(
        &mut self,
        what: String,
        done: Result<T, ClientError>,
        keys: impl Fn(T) -> Vec<(Key, Option<Node>, Option<Node>)>,
    ) -> Result<(), Failure> {
        match done {
            Ok(done) => {
                self.model.acknowledge(Change { what, keys: keys(done) });
                Ok(())
            }
            Err(error) => {
                let failure = failure(&error);
                let change = Change { what: format!("{what}: {error}"), keys: keys(T::default()) };
                for (key, ..) in &change.keys {
                    self.retire(key);
                }
                self.model.doubt(change);
                Err(failure)
            }
        }
    }

    fn check(&mut self, key: &Key, seen: Option<&Seen>) -> Result<(), Failure> {
        self.model.check(key, seen).map_err(Failure::Wrong)
    }

    /// With everything at rest: every name and every byte.
    async fn settle(&mut self) {
        let mut found = BTreeMap::new();
        for directory in 0..DIRECTORIES {
            let listed = list(&self.patient, &format!("{}/{directory}", self.home), Time(0)).await;
            let listed = match listed {
                Ok(listed) => listed,
                Err(Failure::Unknown(why) | Failure::Wrong(why)) => {
                    return self.wrong(&format!("in the end: list {directory}: {why}"));
                }
            };
            for name in listed.into_keys() {
                let key = (directory, name);
                match read(&self.patient, &self.path(&key)).await {
                    Ok(Some(seen)) => drop(found.insert(key, seen)),
                    Ok(None) => self.wrong(&format!("in the end: {key:?} is listed and not there")),
                    Err(Failure::Unknown(why) | Failure::Wrong(why)) => {
                        self.wrong(&format!("in the end: {key:?}: {why}"));
                    }
                }
            }
        }
        for wrong in self.model.settle(&found) {
            self.wrong(&format!("in the end: {wrong}"));
        }
    }
}

impl Step {
    fn name(&self) -> &'static str {
        match self {
            Step::Put(_) => "put",
            Step::Mkdir(_) => "mkdir",
            Step::Unlink(_) => "rm",
            Step::Rmdir(_) => "rmdir",
            Step::Rename(from, to) if from.0 == to.0 => "mv within a directory",
            Step::Rename(from, _) if from.1.starts_with('d') => "mv of a directory",
            Step::Rename(..) => "mv between directories",
            Step::Exchange(one, other) if one.0 == other.0 => "exchange within a directory",
            Step::Exchange(..) => "exchange",
            Step::Stat(_) => "stat",
            Step::Read(_) => "read",
            Step::List(_) => "ls",
            Step::Past => "ls of the past",
        }
    }
}

impl Seen {
    fn of(metadata: &Metadata) -> Seen {
        let directory = metadata.is_directory();
        let size = (!directory).then_some(metadata.size);
        Seen { inode: metadata.inode, directory, size, contents: None }
    }
}

/// A call that failed: nobody knows, or a refusal that nothing explains.
fn failure(error: &ClientError) -> Failure {
    let words = error.to_string();
    match error {
        ClientError::Unreachable { .. } => Failure::Unknown(words),
        ClientError::Refused { kind: Refusal::Busy, .. } => Failure::Unknown(words),
        _ => Failure::Wrong(words),
    }
}

/// `None` where there is nothing.
fn found<T>(result: Result<T, ClientError>) -> Result<Option<T>, Failure> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(failure(&error)),
    }
}

/// Attributes and contents.
async fn read(client: &Client, path: &str) -> Result<Option<Seen>, Failure> {
    let Some(metadata) = found(client.stat(path).await)? else { return Ok(None) };
    let mut seen = Seen::of(&metadata);
    if !seen.directory {
        // By inode: the name may be another file's a moment later, when a call is in doubt.
        let reader = client.open_inode(metadata.inode).await.map_err(|error| failure(&error))?;
        let contents = reader.read_all(1 << 20).await.map_err(|error| failure(&error))?;
        seen.contents = Some(contents);
    }
    Ok(Some(seen))
}

async fn list(client: &Client, path: &str, at: Time) -> Result<BTreeMap<String, Seen>, Failure> {
    let options = ListOptions { at, ..ListOptions::default() };
    let listing = client.list(path, options).await.map_err(|error| failure(&error))?;
    let entries = listing.all().await.map_err(|error| failure(&error))?;
    let seen = |entry: &eggs_client::Entry| Seen {
        inode: entry.target,
        directory: entry.target.is_directory(),
        size: None,
        contents: None,
    };
    Ok(entries.iter().map(|entry| (entry.name_lossy().into_owned(), seen(entry))).collect())
}
