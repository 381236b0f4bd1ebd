//! Many transactions at once, in bad weather, with drivers killed at random: the outcome is that of
//! running them one after the other, none before one that was answered when it began (XD-1, XD-5 to XD-8, XD-11).
//!
//! `EGGS_SEEDS=100..200 cargo nextest run -p eggs-crossdir-core --test serial` runs others.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use eggs_proto::{CrossdirError, InodeId, ServiceError, TransactionId, pb};
use pb::crossdir_request::Op;
use pb::write_op::Op as Write;
use world::model::Model;
use world::{
    Rng, Weather, World, code, exchange, made, mkdir, mkdir_path, purge, put_small, rename, rmdir, tables,
    undelete, unlink,
};

const ROOT: u64 = InodeId::ROOT.0;
const NAMES: [&[u8]; 3] = [b"a", b"b", b"c"];

/// The directories clients can know of: those that names lead to from the root, and removed ones.
fn known(world: &World) -> Vec<u64> {
    let edges = world.edges();
    let (mut reached, mut left) = (BTreeSet::from([ROOT]), vec![ROOT]);
    while let Some(directory) = left.pop() {
        let entries = edges.iter().filter(|((parent, _), _)| *parent == directory);
        left.extend(entries.map(|(_, edge)| edge.target).filter(|&target| reached.insert(target)));
    }
    let owners = world.owners().into_iter();
    owners.filter(|(id, owner)| *owner == 0 || reached.contains(id)).map(|(id, _)| id).collect()
}

fn random_op(rng: &mut Rng, world: &World, planted: u64) -> Op {
    let directories = known(world);
    let edges: Vec<(u64, Vec<u8>, u64)> = world
        .edges()
        .into_iter()
        .filter(|((directory, _), _)| directories.contains(directory))
        .map(|((directory, name), edge)| (directory, name.to_vec(), edge.target))
        .collect();
    let somewhere = *rng.pick(&directories);
    let name = *rng.pick(&NAMES);
    if edges.is_empty() || rng.percent(25) {
        let below = [name, *rng.pick(&NAMES), *rng.pick(&NAMES)];
        return if rng.percent(70) { mkdir(somewhere, name) } else { mkdir_path(somewhere, &below) };
    }
    let (directory, old, target) = rng.pick(&edges).clone();
    if InodeId(target).is_directory() && rng.percent(30) {
        return rmdir(directory, &old, target);
    }
    if rng.percent(30) {
        let (other_directory, other, other_target) = rng.pick(&edges).clone();
        return exchange((directory, &old), target, (other_directory, &other), other_target);
    }
    // When a name died that was moved away, or replaced by a move, nobody is told, the model neither.
    let dead: Vec<_> = tables::dead(&world.shards)
        .into_iter()
        .filter(|((_, _, died_at), row)| {
            (row.owned && InodeId(row.target).is_directory()) || *died_at < planted
        })
        .collect();
    if !dead.is_empty() && rng.percent(45) {
        let ((directory, old, died_at), row) = rng.pick(&dead).clone();
        let death = (directory, &old[..], died_at);
        return match rng.below(3) {
            0 => purge(death, row.target),
            1 => undelete(death, row.target, (directory, &old)),
            _ => undelete(death, row.target, (somewhere, name)),
        };
    }
    let replace = if rng.percent(50) { pb::Replace::File } else { pb::Replace::Refuse };
    rename((directory, &old), target, (somewhere, name), replace)
}

fn plant(world: &mut World) {
    for round in 0..2 {
        for (directory, _) in world.owners() {
            for name in NAMES.iter().take(2 + round % 2) {
                world.begin(&mkdir(directory, name), 0, 0).unwrap();
            }
        }
        if world.owners().is_empty() {
            world.begin(&mkdir(ROOT, b"a"), 0, 0).unwrap();
        }
        world.settle();
    }
    for (n, (directory, _)) in world.owners().into_iter().enumerate() {
        if n % 2 == 0 {
            world.write(InodeId(directory).shard(), put_small(directory, b"c"));
            world.write(InodeId(directory).shard(), put_small(directory, b"d"));
        }
    }
    // Some files are moved before they die: their inodes are of other shards.
    let files: Vec<_> = world.edges().into_iter().filter(|((_, name), _)| &name[..] == b"d").collect();
    let directories: Vec<u64> = world.owners().into_keys().collect();
    for (n, ((directory, name), edge)) in files.into_iter().enumerate() {
        let (to, new) = (directories[n % directories.len()], format!("d{n}"));
        let moved = to != directory;
        if moved {
            let _ = world.begin(
                &rename((directory, &name), edge.target, (to, new.as_bytes()), pb::Replace::Refuse),
                0,
                0,
            );
            world.settle();
        }
        let (directory, name) = if moved { (to, new.as_bytes()) } else { (directory, &name[..]) };
        world.write(InodeId(directory).shard(), unlink(directory, name));
    }
    world.now += 1_000_000;
    world.answers.clear();
}

fn seeds() -> std::ops::Range<u64> {
    let range = std::env::var("EGGS_SEEDS").unwrap_or_else(|_| "0..60".to_owned());
    let (from, to) = range.split_once("..").expect("EGGS_SEEDS is FROM..TO");
    from.parse().expect("a number")..to.parse().expect("a number")
}

/// Says how to run a seed again when its test fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay: EGGS_SEEDS={}..{}", self.0, self.0 + 1);
        }
    }
}

/// More than enough for any order there is.
const TRIED_MAX: usize = 100_000;

/// A transaction as its caller saw it.
#[derive(Debug, Clone)]
struct Call {
    op: Op,
    code: u32,
    /// The directory a mkdir made, the instant of an rmdir.
    made: u64,
    begun_at: u64,
    answered_at: u64,
}

impl Call {
    fn of(world: &World, transaction: TransactionId, op: Op) -> Call {
        let answer = &world.answers[&transaction];
        let made = made(answer);
        let (begun_at, answered_at) = (world.begun_at[&transaction], world.answered_at[&transaction]);
        Call { op, code: code(answer), made, begun_at, answered_at }
    }
}

/// The least that was ever left, for whoever has to find out why.
struct Stuck {
    left: usize,
    why: String,
    /// Calls tried so far.
    tried: usize,
}

/// Whether some order of the calls leads from `model` to `end` with these answers. They come in the order they were
/// answered: mostly that is one.
fn fits(model: &Model, calls: &[Call], end: &Model, stuck: &mut Stuck) -> bool {
    if calls.is_empty() {
        return model == end;
    }
    stuck.tried += 1;
    assert!(stuck.tried < TRIED_MAX, "{}", stuck.why);
    if calls.len() <= stuck.left {
        stuck.left = calls.len();
        stuck.why = format!("no order for {calls:#?} from {model:?}");
    }
    let may_be_next = |call: &&(usize, &Call)| call.1.begun_at <= calls[0].answered_at;
    let calls_here: Vec<_> = calls.iter().enumerate().filter(|call| may_be_next(&call)).collect();
    // A refusal changes nothing: where it fits, it can stand.
    let (refusals, made): (Vec<_>, Vec<_>) = calls_here.into_iter().partition(|(_, call)| call.code != 0);
    for (n, call) in refusals.into_iter().chain(made) {
        let mut after = model.clone();
        if after.apply(&call.op, call.made).err().map_or(0, ServiceError::code) != call.code {
            continue;
        }
        let mut rest = calls.to_vec();
        rest.remove(n);
        if fits(&after, &rest, end, stuck) {
            return true;
        }
        if call.code != 0 {
            return false;
        }
    }
    false
}

fn storm(seed: u64) -> Weather {
    match seed % 3 {
        0 => Weather::default(),
        1 => Weather { lose: 15, double: 15, late_ms: 5_000, crash: 0 },
        _ => Weather { lose: 10, double: 20, late_ms: 20_000, crash: 4 },
    }
}

#[test]
fn the_outcome_is_that_of_one_after_the_other() {
    let (mut kills, mut done, mut refusals) = (0, 0, BTreeMap::<u32, u32>::new());
    for seed in seeds() {
        let _replay = Seed(seed);
        let mut world = World::new(seed, Weather::default());
        world.shard(InodeId::ROOT.shard());
        plant(&mut world);
        let (model, planted) = (Model::of(&world.shards), world.now);
        world.weather = storm(seed);
        let mut rng = Rng(seed ^ 0xfeed);
        let mut begun: Vec<(TransactionId, Op)> = Vec::new();
        for n in 0..60 {
            let op = random_op(&mut rng, &world, planted);
            // Refused before it is logged: nothing to compare.
            if let Ok(transaction) = world.begin(&op, 100 + n, 1) {
                begun.push((transaction, op));
            }
            if rng.percent(40) {
                let enough = rng.below(4);
                let answered = world.answers.len() as u64;
                world.run_until(1, |world| world.answers.len() as u64 >= answered + enough);
            }
        }
        world.settle();
        world.check();
        let mut calls: Vec<Call> =
            begun.into_iter().map(|(transaction, op)| Call::of(&world, transaction, op)).collect();
        calls.sort_by_key(|call| call.answered_at);
        for call in &calls {
            *refusals.entry(call.code).or_default() += 1;
        }
        done += calls.len();
        let end = Model::of(&world.shards);
        let mut stuck = Stuck { left: calls.len(), why: String::new(), tried: 0 };
        assert!(fits(&model, &calls, &end, &mut stuck), "seed {seed}: {}", stuck.why);
        kills += world.kills;
    }
    println!("{done} transactions, {kills} kills, answers by code {refusals:?}");
    let refused = [
        CrossdirError::Exists,
        CrossdirError::Loop,
        CrossdirError::NotEmpty,
        CrossdirError::NotOwned,
        CrossdirError::NotFound,
    ];
    for seen in refused.map(ServiceError::code).into_iter().chain([0]) {
        assert!(refusals.contains_key(&seen), "the workload is too tame: {refusals:?}");
    }
}

/// With clients changing the shards meanwhile there is no such order to compare with, but the
/// namespace must be whole (XD-11), and a call have one answer (XD-2; the world watches it).
#[test]
fn the_namespace_is_whole_whatever_clients_do_meanwhile() {
    for seed in seeds() {
        let _replay = Seed(seed);
        let mut world = World::new(seed, Weather::default());
        world.shard(InodeId::ROOT.shard());
        plant(&mut world);
        let planted = world.now;
        world.weather = storm(seed + 2);
        let mut rng = Rng(seed ^ 0xbeef);
        for n in 0..80 {
            let directories = known(&world);
            let directory = *rng.pick(&directories);
            let shard = InodeId(directory).shard();
            match rng.below(3) {
                0 => {
                    let op = random_op(&mut rng, &world, planted);
                    let _ = world.begin(&op, 100 + n, 1);
                }
                1 => {
                    world.write(shard, put_small(directory, NAMES[2]));
                }
                _ => {
                    world.write(shard, unlink(directory, NAMES[2]));
                    // What the shard does alone, beside the coordinator's.
                    let dead = tables::dead(&world.shards).into_iter();
                    let here: Vec<_> = dead.filter(|((of, _, _), _)| *of == directory).collect();
                    if !here.is_empty() {
                        let ((_, name, died_at), row) = rng.pick(&here).clone();
                        let target = row.target;
                        let op = if rng.percent(50) {
                            let new_name = Bytes::from_static(NAMES[0]);
                            Write::Undelete(pb::Undelete { directory, name, died_at, target, new_name })
                        } else {
                            Write::Purge(pb::Purge { directory, name, died_at, target, owned: row.owned })
                        };
                        world.write(shard, pb::WriteOp { op: Some(op) });
                    }
                }
            }
            let outputs = world.outputs;
            world.run_until(1, |world| world.outputs > outputs + 2);
        }
        world.settle();
        world.check();
    }
}
