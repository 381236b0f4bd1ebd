//! One transaction at a time, killed before every single output of its driver, on real shards: it
//! ends as it does undisturbed, answers the same, and leaves nothing behind (XD-1 to XD-5, XD-11).

mod world;

use eggs_proto::{CrossdirError, InodeId, ServiceError, pb};
use world::{
    Weather, World, code, exchange, mkdir, mkdir_path, purge, put_small, rename, rmdir, tables, undelete,
    unlink,
};

const ROOT: u64 = InodeId::ROOT.0;

/// `/a` `/b` `/a/d` directories, `/a/f` `/b/g` files; inode ids by those names.
struct Tree {
    a: u64,
    b: u64,
    d: u64,
    f: u64,
    g: u64,
    /// `/b/x`, removed; `/b/y`, removed, a file died in it; `/b/k`, dead, a file of another shard.
    x: (u64, u64),
    y: (u64, u64),
    k: (u64, u64),
}

fn make(world: &mut World, parent: u64, name: &[u8]) -> u64 {
    let transaction = world.begin(&mkdir(parent, name), 0, 0).unwrap();
    assert!(world.run_until(10, |world| world.answers.contains_key(&transaction)));
    match &world.answers[&transaction].result {
        Some(pb::crossdir_reply::Result::Mkdir(reply)) => reply.inode,
        other => panic!("{other:?}"),
    }
}

fn plant(world: &mut World) -> Tree {
    let a = make(world, ROOT, b"a");
    let b = make(world, ROOT, b"b");
    let d = make(world, a, b"d");
    for (directory, name) in [(a, b"f"), (b, b"g")] {
        world.write(InodeId(directory).shard(), put_small(directory, name));
    }
    let f = world.lookup(a, b"f").unwrap();
    let g = world.lookup(b, b"g").unwrap();
    world.settle();
    // What is planted dead changes nothing of what the seed draws later.
    let rng = world.rng.clone();
    let (x, y) = (make(world, b, b"x"), make(world, b, b"y"));
    world.write(InodeId(y).shard(), put_small(y, b"z"));
    world.write(InodeId(y).shard(), unlink(y, b"z"));
    world.write(InodeId(a).shard(), put_small(a, b"k"));
    let k = world.lookup(a, b"k").unwrap();
    for op in [rename((a, b"k"), k, (b, b"k"), pb::Replace::Refuse), rmdir(b, b"x", x), rmdir(b, b"y", y)] {
        let transaction = world.begin(&op, 0, 0).unwrap();
        assert!(world.run_until(10, |world| world.answers.contains_key(&transaction)));
        assert_eq!(code(&world.answers[&transaction]), 0);
    }
    world.settle();
    world.write(InodeId(b).shard(), unlink(b, b"k"));
    let dead = tables::dead(&world.shards);
    let died = |inode| {
        let owned = dead.iter().find(|(_, row)| row.owned && row.target == inode);
        (inode, owned.map(|((_, _, died_at), _)| *died_at).unwrap())
    };
    assert_ne!(InodeId(k).shard(), InodeId(b).shard());
    world.rng = rng;
    Tree { a, b, d, f, g, x: died(x), y: died(y), k: died(k) }
}

type Scenario = (&'static str, fn(&Tree) -> pb::crossdir_request::Op, u32);

fn scenarios() -> Vec<Scenario> {
    let refuse = |error: CrossdirError| error.code();
    vec![
        ("mkdir", |t| mkdir(t.a, b"new"), 0),
        ("mkdir over a directory", |t| mkdir(t.a, b"d"), refuse(CrossdirError::Exists)),
        ("mkdir over a file", |t| mkdir(t.a, b"f"), refuse(CrossdirError::Exists)),
        ("mkdir in nothing", |t| mkdir(t.a + 77, b"x"), refuse(CrossdirError::NotFound)),
        ("rmdir", |t| rmdir(t.a, b"d", t.d), 0),
        ("rmdir of a full one", |t| rmdir(ROOT, b"a", t.a), refuse(CrossdirError::NotEmpty)),
        ("rmdir by a wrong name", |t| rmdir(t.a, b"e", t.d), refuse(CrossdirError::NotFound)),
        ("rmdir by another's name", |t| rmdir(t.a, b"f", t.d), refuse(CrossdirError::Changed)),
        ("rmdir in a wrong parent", |t| rmdir(t.b, b"d", t.d), refuse(CrossdirError::Changed)),
        ("move file", |t| rename((t.a, b"f"), t.f, (t.b, b"f"), pb::Replace::Refuse), 0),
        ("move file over one", |t| rename((t.a, b"f"), t.f, (t.b, b"g"), pb::Replace::File), 0),
        (
            "move file, name taken",
            |t| rename((t.a, b"f"), t.f, (t.b, b"g"), pb::Replace::Refuse),
            refuse(CrossdirError::Exists),
        ),
        (
            "move file over a directory",
            |t| rename((t.a, b"f"), t.f, (ROOT, b"b"), pb::Replace::File),
            refuse(CrossdirError::IsDirectory),
        ),
        (
            "move file that is another",
            |t| rename((t.a, b"f"), t.f + 5, (t.b, b"f"), pb::Replace::Refuse),
            refuse(CrossdirError::Changed),
        ),
        ("move directory", |t| rename((t.a, b"d"), t.d, (t.b, b"d"), pb::Replace::File), 0),
        (
            "move directory, name taken",
            |t| rename((t.a, b"d"), t.d, (ROOT, b"b"), pb::Replace::File),
            refuse(CrossdirError::Exists),
        ),
        (
            "move directory below itself",
            |t| rename((ROOT, b"a"), t.a, (t.d, b"a"), pb::Replace::Refuse),
            refuse(CrossdirError::Loop),
        ),
        ("mkdir path", |t| mkdir_path(t.a, &[b"x", b"y", b"x"]), 0),
        ("mkdir path over a file", |t| mkdir_path(t.a, &[b"f", b"y"]), refuse(CrossdirError::Exists)),
        ("mkdir path in nothing", |t| mkdir_path(t.a + 77, &[b"x", b"y"]), refuse(CrossdirError::NotFound)),
        ("exchange files", |t| exchange((t.a, b"f"), t.f, (t.b, b"g"), t.g), 0),
        ("exchange a directory and a file", |t| exchange((t.a, b"d"), t.d, (t.b, b"g"), t.g), 0),
        ("exchange a file and a directory", |t| exchange((t.b, b"g"), t.g, (t.a, b"d"), t.d), 0),
        ("exchange directories", |t| exchange((t.a, b"d"), t.d, (ROOT, b"b"), t.b), 0),
        (
            "exchange with what is above",
            |t| exchange((ROOT, b"a"), t.a, (t.d, b"e"), t.b),
            refuse(CrossdirError::Loop),
        ),
        (
            "exchange with what has gone",
            |t| exchange((t.a, b"f"), t.f, (t.b, b"h"), t.g),
            refuse(CrossdirError::NotFound),
        ),
        (
            "exchange with what is another",
            |t| exchange((t.a, b"f"), t.f, (t.b, b"g"), t.g + 5),
            refuse(CrossdirError::Changed),
        ),
        (
            "move directory to nowhere",
            |t| rename((t.a, b"d"), t.d, (t.b + 99, b"d"), pb::Replace::Refuse),
            refuse(CrossdirError::NotFound),
        ),
        ("undelete directory", |t| undelete((t.b, b"x", t.x.1), t.x.0, (t.b, b"x")), 0),
        ("undelete directory elsewhere", |t| undelete((t.b, b"y", t.y.1), t.y.0, (t.d, b"n")), 0),
        (
            "undelete directory, name taken",
            |t| undelete((t.b, b"x", t.x.1), t.x.0, (t.b, b"g")),
            refuse(CrossdirError::Exists),
        ),
        (
            "undelete directory elsewhere, name taken",
            |t| undelete((t.b, b"x", t.x.1), t.x.0, (t.a, b"f")),
            refuse(CrossdirError::Exists),
        ),
        (
            "undelete directory to nowhere",
            |t| undelete((t.b, b"x", t.x.1), t.x.0, (t.y.0, b"x")),
            refuse(CrossdirError::NotFound),
        ),
        (
            "undelete a death that was not",
            |t| undelete((t.b, b"x", t.x.1 + 1), t.x.0, (t.b, b"x")),
            refuse(CrossdirError::NotFound),
        ),
        (
            "undelete what lives",
            |t| undelete((t.b, b"x", t.x.1), t.d, (t.b, b"x")),
            refuse(CrossdirError::NotOwned),
        ),
        ("undelete file elsewhere", |t| undelete((t.b, b"k", t.k.1), t.k.0, (t.d, b"k")), 0),
        (
            "undelete file, name taken",
            |t| undelete((t.b, b"k", t.k.1), t.k.0, (t.a, b"d")),
            refuse(CrossdirError::Exists),
        ),
        (
            "undelete file by another's death",
            |t| undelete((t.b, b"k", t.k.1), t.f, (t.a, b"k")),
            refuse(CrossdirError::Changed),
        ),
        ("purge directory", |t| purge((t.b, b"x", t.x.1), t.x.0), 0),
        ("purge a full directory", |t| purge((t.b, b"y", t.y.1), t.y.0), refuse(CrossdirError::NotEmpty)),
        (
            "purge directory by another's death",
            |t| purge((t.b, b"y", t.y.1), t.x.0),
            refuse(CrossdirError::Changed),
        ),
        ("purge what lives", |t| purge((t.b, b"x", t.x.1), t.d), refuse(CrossdirError::NotOwned)),
        ("purge file", |t| purge((t.b, b"k", t.k.1), t.k.0), 0),
        ("purge file twice", |t| purge((t.b, b"k", t.k.1 + 1), t.k.0), refuse(CrossdirError::NotFound)),
    ]
}

/// The namespace without times, and the answer, after one scenario killed before output `kill_at`.
fn run(scenario: &Scenario, kill_at: Option<u64>, seed: u64, weather: Weather) -> (Vec<String>, u64, u64) {
    let mut world = World::new(7, Weather::default());
    let tree = plant(&mut world);
    world.rng.0 = seed;
    world.weather = weather;
    world.outputs = 0;
    world.kill_at = kill_at;
    // The shard a new directory goes to is drawn from the seed: the same in every run of a scenario.
    let transaction = world.begin(&(scenario.1)(&tree), 5, 1).unwrap();
    assert!(world.run_until(300, |world| world.answers.contains_key(&transaction)), "{}", scenario.0);
    assert_eq!(code(&world.answers[&transaction]), scenario.2, "{}: {:?}", scenario.0, world.answers);
    // Repeated, before it is retired and after: the same transaction.
    assert_eq!(world.begin(&(scenario.1)(&tree), 5, 1).unwrap(), transaction, "XD-2");
    world.settle();
    assert_eq!(world.begin(&(scenario.1)(&tree), 5, 1).unwrap(), transaction, "XD-2");
    let answer = eggs_crossdir_core::answer(&world.coordinator.table, eggs_proto::SessionId(5), 1).unwrap();
    match answer {
        eggs_crossdir_core::Answer::Done(id, reply) => {
            assert_eq!((id, code(&reply)), (transaction, scenario.2), "XD-2");
        }
        other => panic!("XD-2: {other:?}"),
    }
    world.check();
    let edges = world.edges();
    let mut state: Vec<String> = edges
        .iter()
        .map(|((directory, name), edge)| format!("{directory:x}/{name:?} -> {:x}", edge.target))
        .collect();
    let dead = tables::dead(&world.shards);
    state.extend(dead.iter().map(|((directory, name, _), row)| {
        format!("{directory:x}/{name:?} dead -> {:x} {} {}", row.target, row.owned, row.transaction)
    }));
    state.extend(world.owners().iter().map(|(directory, owner)| format!("{directory:x} in {owner:x}")));
    (state, world.outputs, world.kills)
}

#[test]
fn killed_before_every_output_it_ends_the_same() {
    let mut killed = 0;
    for scenario in scenarios() {
        let (undisturbed, outputs, _) = run(&scenario, None, 1, Weather::default());
        assert!(outputs >= 5, "{}: {outputs} outputs", scenario.0);
        for kill_at in 1..=outputs {
            let (state, _, kills) = run(&scenario, Some(kill_at), 1, Weather::default());
            assert_eq!(kills, 1, "{} killed before output {kill_at}", scenario.0);
            assert_eq!(state, undisturbed, "{} killed before output {kill_at}", scenario.0);
            killed += kills;
        }
    }
    assert!(killed > 100, "{killed} kills");
}

#[test]
fn lost_doubled_and_late_messages_change_nothing() {
    let weather = Weather { lose: 25, double: 25, late_ms: 20_000, crash: 10 };
    for scenario in scenarios() {
        for seed in 1..=20 {
            let (undisturbed, ..) = run(&scenario, None, seed, Weather::default());
            let (state, ..) = run(&scenario, None, seed, weather);
            assert_eq!(state, undisturbed, "{} seed {seed}", scenario.0);
        }
    }
}

/// DESIGN 7: one coordinator write, two shard writes, one batched completion.
#[test]
fn mkdir_costs_what_the_design_says() {
    let mut world = World::new(1, Weather::default());
    let first = world.begin(&mkdir(ROOT, b"x"), 0, 0).unwrap();
    assert!(world.run_until(1, |world| world.answers.contains_key(&first)));
    assert_eq!((world.writes, world.proposals), (2, 0), "before the answer");
    for n in 0..64 {
        world.begin(&mkdir(ROOT, format!("n{n}").as_bytes()), 0, 0).unwrap();
    }
    world.settle();
    assert_eq!(world.answers.len(), 65);
    assert!(world.proposals <= 8, "{} proposals to end 65 transactions", world.proposals);
    world.check();
}

/// A shard without a leader stops those who need it, and nobody else.
#[test]
fn a_stuck_transaction_holds_up_only_those_that_conflict_with_it() {
    let mut world = World::new(1, Weather::default());
    let tree = plant(&mut world);
    let (stuck_shard, b_shard) = (InodeId(tree.d).shard(), InodeId(tree.b).shard());
    assert_ne!(stuck_shard, b_shard, "the seed places them apart");
    world.cut.insert(stuck_shard.0);
    let stuck = world.begin(&rmdir(tree.a, b"d", tree.d), 1, 1).unwrap();
    let behind = world.begin(&rename((tree.a, b"d"), tree.d, (tree.b, b"d"), pb::Replace::Refuse), 2, 1);
    let behind = behind.unwrap();
    let mut free = Vec::new();
    for n in 0..20u64 {
        world.write(b_shard, put_small(tree.b, b"t"));
        let file = world.lookup(tree.b, b"t").unwrap();
        let to = format!("moved{n}");
        let op = rename((tree.b, b"t"), file, (ROOT, to.as_bytes()), pb::Replace::Refuse);
        let transaction = world.begin(&op, 3, n + 1).unwrap();
        assert!(world.run_until(1, |world| world.answers.contains_key(&transaction)), "held up");
        free.push(transaction);
    }
    assert!(!world.answers.contains_key(&stuck) && !world.answers.contains_key(&behind));
    let list = world.driver.list(10);
    assert_eq!(list[0].transaction, stuck.0);
    assert!(list[0].step.contains("connection refused"), "{list:?}");
    assert!(list[1].step.contains("waiting"), "{list:?}");
    // A killed driver takes up both again, in their order (XD-5).
    world.kill();
    assert!(!world.run_until(120, |world| world.answers.contains_key(&stuck)));
    let left = eggs_crossdir_core::finished_not_retired(&world.coordinator.table).unwrap();
    assert_eq!(
        left.len(),
        0,
        "those finished for longer than a message can be late are retired all the same"
    );
    world.cut.clear();
    world.settle();
    assert_eq!(code(&world.answers[&stuck]), 0);
    assert_eq!(code(&world.answers[&behind]), CrossdirError::NotFound.code(), "XD-7: it came second");
    world.check();
}

/// XD-8: the new name of a move is free from the moment it is linked, and its shard may rename it alone. Who moves the
/// directory on under that name waits until the first move has set the owner: else its repetition could come last.
#[test]
fn a_directory_that_is_moved_on_has_its_last_owner() {
    for wait in 1..20 {
        let mut world = World::new(wait, Weather::default());
        let (a, b) = (make(&mut world, ROOT, b"a"), make(&mut world, ROOT, b"b"));
        // On a shard of its own, to be cut off.
        let apart =
            |d: u64| [a, b, ROOT].into_iter().all(|other| InodeId(other).shard() != InodeId(d).shard());
        let names = (b'c'..=b'z').map(|name| [name]);
        let found = names.map(|name| (name, make(&mut world, a, &name))).find(|(_, d)| apart(*d));
        let (name, d) = found.expect("more shards than three");
        world.settle();
        world.cut.insert(InodeId(d).shard().0);
        let first = rename((a, &name), d, (b, b"d"), pb::Replace::Refuse);
        let first = world.begin(&first, 1, 1).unwrap();
        assert!(!world.run_until(wait, |world| world.answers.contains_key(&first)));
        assert_eq!(world.lookup(b, b"d"), Some(d));
        let here = pb::Rename {
            directory: b,
            old_name: b"d".as_slice().into(),
            new_name: b"z".as_slice().into(),
            ..pb::Rename::default()
        };
        let here = pb::WriteOp { op: Some(pb::write_op::Op::Rename(here)) };
        let renamed = world.write(InodeId(b).shard(), here).result;
        assert!(matches!(renamed, Some(pb::write_result::Result::Link(_))), "{renamed:?}");
        let then = rename((b, b"z"), d, (ROOT, b"w"), pb::Replace::Refuse);
        let then = world.begin(&then, 2, 1).unwrap();
        assert!(!world.run_until(1, |world| world.answers.contains_key(&then)));
        world.cut.clear();
        world.settle();
        assert_eq!((code(&world.answers[&first]), code(&world.answers[&then])), (0, 0));
        assert_eq!(world.owners()[&d], ROOT, "after {wait} s");
        world.check();
    }
}

/// XD-8: an answered move of a directory whose end is not recorded is run again after a crash, and must
/// not read the tree as later moves made it.
#[test]
fn a_move_run_again_finds_the_tree_as_it_was() {
    let mut world = World::new(1, Weather::default());
    let tree = plant(&mut world);
    world.mute = true;
    let moves = [
        rename((tree.a, b"d"), tree.d, (tree.b, b"d"), pb::Replace::Refuse),
        rename((tree.b, b"d"), tree.d, (ROOT, b"d"), pb::Replace::Refuse),
        rename((ROOT, b"b"), tree.b, (tree.d, b"b"), pb::Replace::Refuse),
    ];
    let begun: Vec<_> = (1..).zip(&moves).map(|(n, op)| world.begin(op, n, 1).unwrap()).collect();
    world.run_until(100, |world| begun.iter().all(|transaction| world.answers.contains_key(transaction)));
    assert!(
        begun.iter().all(|transaction| world.answers.contains_key(transaction)),
        "answered, not recorded"
    );
    world.mute = false;
    world.kill();
    world.settle();
    for transaction in begun {
        assert_eq!(code(&world.answers[&transaction]), 0, "{transaction}");
    }
    assert_eq!(world.lookup(tree.d, b"b"), Some(tree.b));
    world.check();
}

/// XD-10, and SH-13 on the shards' side.
#[test]
fn a_step_that_comes_after_the_end_does_not_run() {
    let mut world = World::new(3, Weather::default());
    let tree = plant(&mut world);
    let op = rename((tree.a, b"f"), tree.f, (tree.b, b"f"), pb::Replace::Refuse);
    let first = world.begin(&op, 1, 1).unwrap();
    world.settle();
    assert_eq!(code(&world.answers[&first]), 0);
    // Back again, so that the same steps could run once more.
    let back = rename((tree.b, b"f"), tree.f, (tree.a, b"f"), pb::Replace::Refuse);
    world.begin(&back, 1, 2).unwrap();
    world.settle();
    let before = world.edges();
    let late = pb::LockEdge {
        transaction: first.0,
        directory: tree.a,
        name: bytes::Bytes::from_static(b"f"),
        target: tree.f,
    };
    let op = pb::WriteOp { op: Some(pb::write_op::Op::LockEdge(late)) };
    let result = world.write(InodeId(tree.a).shard(), op);
    assert!(matches!(result.result, Some(pb::write_result::Result::Error(_))), "{result:?}");
    assert_eq!(world.edges(), before);
    world.write(InodeId(tree.a).shard(), unlink(tree.a, b"f"));
    world.check();
}
