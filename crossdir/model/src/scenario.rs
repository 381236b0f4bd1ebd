//! What is explored: a small tree, the transactions upon it, and how often the driver is lost.

use std::fmt;

/// A directory; 0 is the root.
pub type Directory = u8;
/// The place of a transaction in the order they are begun: its id.
pub type Transaction = usize;
/// The place of an edge in [`Scenario::edges`].
pub type EdgeId = u8;
/// The place of a death in [`Scenario::deaths`].
pub type DeathId = u8;

pub const ROOT: Directory = 0;
pub const DIRECTORIES_MAX: usize = 6;
pub const TRANSACTIONS_MAX: usize = 4;
pub const EDGES_MAX: usize = 12;
pub const DEATHS_MAX: usize = 6;

/// A name in a directory, whether something has it or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EdgeName {
    pub parent: Directory,
    pub name: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Move {
        target: Directory,
        old: EdgeId,
        new: EdgeId,
    },
    Rmdir {
        target: Directory,
        edge: EdgeId,
        /// The one that comes of it.
        death: DeathId,
    },
    /// Each goes where the other was; `edge` is the one that is locked.
    Exchange {
        one: Directory,
        edge: EdgeId,
        other: Directory,
        other_edge: EdgeId,
    },
    /// In the directory where it died, or another.
    Undelete {
        target: Directory,
        death: DeathId,
        new: EdgeId,
    },
    Purge {
        target: Directory,
        death: DeathId,
    },
}

#[derive(Debug, Clone)]
pub struct Scenario {
    /// By directory; the root is its own.
    pub parents: Vec<Directory>,
    pub edges: Vec<EdgeName>,
    /// By edge: the directory that has it at first.
    pub living: Vec<Option<Directory>>,
    /// The names that died or may die, and what had them: those dead at first, then one of every rmdir.
    pub deaths: Vec<(EdgeId, Directory)>,
    /// Those that are removed at first, and owned by their deaths.
    pub removed: Vec<Directory>,
    /// In the order they are begun.
    pub ops: Vec<Op>,
    /// How often the driver may be lost.
    pub crashes: u8,
    /// One that is lost may go on beside the next, not knowing of it.
    pub lingering: bool,
}

impl Scenario {
    /// `parents[n]` is the parent of directory `n + 1`, whose name in it is `n + 1`.
    pub fn new(parents: &[Directory], crashes: u8) -> Scenario {
        assert!(parents.len() < DIRECTORIES_MAX);
        let mut scenario = Scenario {
            parents: vec![ROOT],
            edges: Vec::new(),
            living: Vec::new(),
            deaths: Vec::new(),
            removed: Vec::new(),
            ops: Vec::new(),
            crashes,
            lingering: false,
        };
        for (directory, &parent) in (1u8..).zip(parents) {
            scenario.parents.push(parent);
            scenario.edges.push(EdgeName { parent, name: directory });
            scenario.living.push(Some(directory));
        }
        scenario
    }

    #[must_use]
    pub fn lingering(self) -> Scenario {
        Scenario { lingering: true, ..self }
    }

    /// `old`/`old_name` → `new`/`new_name`.
    #[must_use]
    pub fn rename(
        mut self,
        target: Directory,
        (old, old_name): (Directory, u8),
        (new, new_name): (Directory, u8),
    ) -> Scenario {
        assert!(old != new && target != new && target != ROOT);
        let (old, new) = (self.edge(old, old_name), self.edge(new, new_name));
        self.push(Op::Move { target, old, new })
    }

    /// A move under the same name.
    #[must_use]
    pub fn moved(self, target: Directory, old: Directory, new: Directory) -> Scenario {
        self.rename(target, (old, target), (new, target))
    }

    #[must_use]
    pub fn rmdir(mut self, target: Directory, parent: Directory) -> Scenario {
        let edge = self.edge(parent, target);
        let death = self.death(edge, target);
        self.push(Op::Rmdir { target, edge, death })
    }

    /// The directory was removed where it is.
    #[must_use]
    pub fn dead(mut self, target: Directory) -> Scenario {
        let edge = self.edge(self.parents[usize::from(target)], target);
        self.living[usize::from(edge)] = None;
        self.removed.push(target);
        self.death(edge, target);
        self
    }

    /// The directory of that death goes to `new`, under its number.
    #[must_use]
    pub fn undelete(mut self, death: DeathId, new: Directory) -> Scenario {
        let (_, target) = self.deaths[usize::from(death)];
        assert!(target != new);
        let new = self.edge(new, target);
        self.push(Op::Undelete { target, death, new })
    }

    #[must_use]
    pub fn purge(self, death: DeathId) -> Scenario {
        let (_, target) = self.deaths[usize::from(death)];
        self.push(Op::Purge { target, death })
    }

    /// A directory without others in it that is dead at first, or is removed: undeleted or purged, before and after every
    /// other transaction and each other, upon every tree.
    pub fn every_undelete_and_purge(directories: u8, crashes: u8) -> Vec<Scenario> {
        let mut scenarios = Vec::new();
        for tree in trees(directories) {
            let is_leaf = |directory: &Directory| !tree.contains(directory);
            for target in (1..=directories).filter(is_leaf) {
                let dead = Scenario::new(&tree, crashes).dead(target);
                for first in dead.clone().each_of_the_dead() {
                    scenarios.extend(first.clone().each_op(true));
                    scenarios.extend(first.each_of_the_dead());
                }
                for first in dead.each_op(true) {
                    scenarios.extend(first.each_of_the_dead());
                }
                let removed = Scenario::new(&tree, crashes).rmdir(target, tree[usize::from(target) - 1]);
                scenarios.extend(removed.each_of_the_dead());
            }
        }
        scenarios
    }

    /// This one with the first death undeleted to each place, or purged.
    fn each_of_the_dead(self) -> Vec<Scenario> {
        let (_, target) = self.deaths[0];
        let places = (0..self.parents.len() as Directory).filter(|&new| new != target);
        places.map(|new| self.clone().undelete(0, new)).chain([self.clone().purge(0)]).collect()
    }

    /// `one` in `parent` and `other` in `other_parent`, each under its number.
    #[must_use]
    pub fn exchange(
        mut self,
        (one, parent): (Directory, Directory),
        (other, other_parent): (Directory, Directory),
    ) -> Scenario {
        assert!(one != other && parent != other_parent && one != other_parent && other != parent);
        let (edge, other_edge) = (self.edge(parent, one), self.edge(other_parent, other));
        self.push(Op::Exchange { one, edge, other, other_edge })
    }

    /// An exchange of every two directories where they are at first, upon every tree, before and after every other
    /// transaction.
    pub fn every_exchange(directories: u8, crashes: u8) -> Vec<Scenario> {
        let mut scenarios = Vec::new();
        for tree in trees(directories) {
            let empty = Scenario::new(&tree, crashes);
            for first in empty.clone().each_exchange() {
                scenarios.extend(first.clone().each_op(true));
                scenarios.extend(first.each_exchange());
            }
            for first in empty.each_op(true) {
                scenarios.extend(first.each_exchange());
            }
        }
        scenarios
    }

    /// This one with each one exchange more.
    fn each_exchange(self) -> Vec<Scenario> {
        let directories = self.parents.len() as Directory;
        let all = (1..directories).flat_map(|one| (1..directories).map(move |other| (one, other)));
        let at = |directory: Directory| self.parents[usize::from(directory)];
        let may_be = |&(one, other): &(Directory, Directory)| {
            one != other && at(one) != at(other) && one != at(other) && other != at(one)
        };
        let with = |(one, other)| self.clone().exchange((one, at(one)), (other, at(other)));
        all.filter(may_be).map(with).collect()
    }

    /// Every two transactions upon every tree of the root and `directories` more, each moved or removed from where it is;
    /// the second one also from where it is not, or not yet.
    pub fn every_pair(directories: u8, crashes: u8) -> Vec<Scenario> {
        let mut scenarios = Vec::new();
        for tree in trees(directories) {
            let empty = Scenario::new(&tree, crashes);
            for one in empty.clone().each_op(true) {
                scenarios.extend(one.each_op(false));
            }
        }
        scenarios
    }

    /// Every three moves, each from where the directory is at first.
    pub fn every_three_moves(directories: u8, crashes: u8) -> Vec<Scenario> {
        let mut scenarios: Vec<Scenario> =
            trees(directories).iter().map(|tree| Scenario::new(tree, crashes)).collect();
        for _ in 0..3 {
            let more = |scenario: Scenario| scenario.each_op(true);
            scenarios = scenarios.into_iter().flat_map(more).collect();
            scenarios.retain(|scenario| matches!(scenario.ops.last(), Some(Op::Move { .. })));
        }
        scenarios
    }

    /// This one with each one transaction more.
    fn each_op(self, from_where_it_is: bool) -> Vec<Scenario> {
        let mut scenarios = Vec::new();
        let directories = self.parents.len() as Directory;
        for target in 1..directories {
            let at = self.parents[usize::from(target)];
            for old in (0..directories).filter(|&old| old != target && (old == at || !from_where_it_is)) {
                scenarios.push(self.clone().rmdir(target, old));
                for new in (0..directories).filter(|&new| new != target && new != old) {
                    scenarios.push(self.clone().moved(target, old, new));
                }
            }
        }
        scenarios
    }

    fn push(mut self, op: Op) -> Scenario {
        self.ops.push(op);
        assert!(self.ops.len() <= TRANSACTIONS_MAX);
        self
    }

    fn edge(&mut self, parent: Directory, name: u8) -> EdgeId {
        let wanted = EdgeName { parent, name };
        let known = self.edges.iter().position(|&edge| edge == wanted);
        let at = known.unwrap_or_else(|| {
            self.edges.push(wanted);
            self.living.push(None);
            self.edges.len() - 1
        });
        assert!(at < EDGES_MAX);
        at as EdgeId
    }

    fn death(&mut self, edge: EdgeId, target: Directory) -> DeathId {
        self.deaths.push((edge, target));
        assert!(self.deaths.len() <= DEATHS_MAX);
        (self.deaths.len() - 1) as DeathId
    }

    pub fn parent(&self, edge: EdgeId) -> Directory {
        self.edges[usize::from(edge)].parent
    }

    /// Of what is moved, in the order their ancestors are read.
    pub fn new_parents(&self, transaction: Transaction) -> Vec<Directory> {
        match self.ops[transaction] {
            Op::Move { new, .. } => vec![self.parent(new)],
            Op::Rmdir { .. } | Op::Undelete { .. } | Op::Purge { .. } => Vec::new(),
            Op::Exchange { edge, other_edge, .. } => vec![self.parent(other_edge), self.parent(edge)],
        }
    }

    /// What is moved or removed.
    pub fn targets(&self, transaction: Transaction) -> Vec<Directory> {
        match self.ops[transaction] {
            Op::Move { target, .. }
            | Op::Rmdir { target, .. }
            | Op::Undelete { target, .. }
            | Op::Purge { target, .. } => vec![target],
            Op::Exchange { one, other, .. } => vec![one, other],
        }
    }

    /// The base locks of the two exclude each other.
    pub fn conflict(&self, a: Transaction, b: Transaction) -> bool {
        let theirs = self.locks(b);
        let mut ours = self.locks(a).into_iter();
        ours.any(|(resource, exclusive)| theirs.iter().any(|&(r, e)| r == resource && (e || exclusive)))
    }

    /// With whether exclusive.
    fn locks(&self, transaction: Transaction) -> Vec<(Resource, bool)> {
        match self.ops[transaction] {
            Op::Move { target, old, new } => vec![
                (Resource::Edge(old), true),
                (Resource::Edge(new), true),
                (Resource::Directory(self.parent(old)), false),
                (Resource::Directory(self.parent(new)), false),
                (Resource::Directory(target), false),
            ],
            Op::Exchange { one, edge, other, other_edge } => vec![
                (Resource::Edge(edge), true),
                (Resource::Edge(other_edge), true),
                (Resource::Directory(self.parent(edge)), false),
                (Resource::Directory(self.parent(other_edge)), false),
                (Resource::Directory(one), false),
                (Resource::Directory(other), false),
            ],
            Op::Undelete { target, death, new } => {
                let (old, _) = self.deaths[usize::from(death)];
                vec![
                    (Resource::Edge(old), true),
                    (Resource::Edge(new), true),
                    (Resource::Directory(self.parent(old)), false),
                    (Resource::Directory(self.parent(new)), false),
                    (Resource::Directory(target), true),
                ]
            }
            Op::Purge { target, death } => {
                let (edge, _) = self.deaths[usize::from(death)];
                vec![
                    (Resource::Edge(edge), true),
                    (Resource::Directory(self.parent(edge)), false),
                    (Resource::Directory(target), true),
                ]
            }
            Op::Rmdir { target, edge, .. } => vec![
                (Resource::Edge(edge), true),
                (Resource::Directory(self.parent(edge)), false),
                (Resource::Directory(target), true),
            ],
        }
    }
}

/// The parents of each tree, a parent's number always the lower.
fn trees(directories: u8) -> Vec<Vec<Directory>> {
    let mut trees = vec![Vec::new()];
    for directory in 1..=directories {
        let with = |tree: &Vec<Directory>, parent| tree.iter().copied().chain([parent]).collect();
        trees = trees.iter().flat_map(|tree| (0..directory).map(move |parent| with(tree, parent))).collect();
    }
    trees
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resource {
    Edge(EdgeId),
    Directory(Directory),
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parents {:?}", &self.parents[1..])?;
        if !self.removed.is_empty() {
            write!(f, ", {:?} removed", self.removed)?;
        }
        for (transaction, op) in self.ops.iter().enumerate() {
            let name = |edge: EdgeId| {
                let EdgeName { parent, name } = self.edges[usize::from(edge)];
                format!("{parent}/{name}")
            };
            match *op {
                Op::Move { target, old, new } => {
                    write!(f, "; {transaction}: move {target} {} to {}", name(old), name(new))?;
                }
                Op::Rmdir { edge, .. } => write!(f, "; {transaction}: rmdir {}", name(edge))?,
                Op::Exchange { edge, other_edge, .. } => {
                    write!(f, "; {transaction}: exchange {} and {}", name(edge), name(other_edge))?;
                }
                Op::Undelete { death, new, .. } => {
                    let (old, _) = self.deaths[usize::from(death)];
                    write!(f, "; {transaction}: undelete {} as {}", name(old), name(new))?;
                }
                Op::Purge { death, .. } => {
                    let (edge, _) = self.deaths[usize::from(death)];
                    write!(f, "; {transaction}: purge {}", name(edge))?;
                }
            }
        }
        write!(f, "; {} crashes", self.crashes)?;
        if self.lingering { write!(f, ", the driver may go on") } else { Ok(()) }
    }
}
