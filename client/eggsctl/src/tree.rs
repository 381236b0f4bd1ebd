//! Whole directories in parallel: each is entered before what is in it and left after all of that.
//!
//! Newest first, so that what is waiting stays about as small as the tree is deep times wide. A
//! directory in which something was refused is left as *broken*, and so are those above it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::task::JoinSet;

use crate::failure::{Failure, Outcome};

/// Directories worked on at the same time.
const DIRECTORIES_AT_ONCE: usize = 16;

/// What is done to each directory.
pub trait Visitor: Send + Sync + 'static {
    type Node: Send + Sync + 'static;

    /// Does what is to be done to the directory and the files in it.
    fn enter(&self, node: &Self::Node) -> impl Future<Output = Outcome<Entered<Self::Node>>> + Send;

    /// Everything below is done. `broken`: something at or below it was refused.
    fn leave(&self, node: &Self::Node, broken: bool) -> impl Future<Output = Outcome> + Send;
}

/// What entering a directory came to.
#[derive(Debug)]
pub struct Entered<N> {
    pub children: Vec<N>,
    /// Some file in it was refused (and that has been printed).
    pub broken: bool,
}

struct Item<N> {
    node: N,
    parent: Option<Arc<Item<N>>>,
    /// Children that are not yet left.
    pending: AtomicUsize,
    broken: AtomicBool,
}

enum Job<N> {
    Enter(Arc<Item<N>>),
    Leave(Arc<Item<N>>),
}

/// Visits the trees below `roots`. Refusals are printed as those of `command` and the rest is done;
/// the first final failure ends it.
pub async fn visit<V: Visitor>(visitor: Arc<V>, roots: Vec<V::Node>, command: &'static str) -> Outcome {
    let mut waiting: Vec<Job<V::Node>> =
        roots.into_iter().rev().map(|node| Job::Enter(Arc::new(Item::new(node, None)))).collect();
    let mut running = JoinSet::new();
    let mut refused = false;
    loop {
        while running.len() < DIRECTORIES_AT_ONCE
            && let Some(job) = waiting.pop()
        {
            let visitor = visitor.clone();
            running.spawn(async move { work(&*visitor, job, command).await });
        }
        let Some(done) = running.join_next().await else { break };
        match done {
            Ok(Ok(Done { jobs, broken })) => {
                refused |= broken;
                waiting.extend(jobs);
            }
            Ok(Err(failure)) => return Err(failure),
            Err(error) => return Err(Failure::refused("", format!("a task ended early: {error}"))),
        }
    }
    if refused { Err(Failure::Reported) } else { Ok(()) }
}

struct Done<N> {
    jobs: Vec<Job<N>>,
    broken: bool,
}

async fn work<V: Visitor>(visitor: &V, job: Job<V::Node>, command: &str) -> Outcome<Done<V::Node>> {
    let tolerate = |failure: Failure| {
        if failure.is_final() {
            return Err(failure);
        }
        failure.print(command);
        Ok(())
    };
    match job {
        Job::Enter(item) => {
            let entered = match visitor.enter(&item.node).await {
                Ok(entered) => entered,
                Err(failure) => {
                    tolerate(failure)?;
                    // It was not entered, so it is not left either: only those above it hear of it.
                    return Ok(Done { jobs: item.over(true), broken: true });
                }
            };
            if entered.broken {
                item.broken.store(true, Ordering::Relaxed);
            }
            let jobs = if entered.children.is_empty() {
                vec![Job::Leave(item)]
            } else {
                item.pending.store(entered.children.len(), Ordering::Release);
                let children = entered.children.into_iter().rev();
                children.map(|node| Job::Enter(Arc::new(Item::new(node, Some(item.clone()))))).collect()
            };
            Ok(Done { jobs, broken: entered.broken })
        }
        Job::Leave(item) => {
            let mut broken = item.broken.load(Ordering::Acquire);
            if let Err(failure) = visitor.leave(&item.node, broken).await {
                tolerate(failure)?;
                broken = true;
            }
            Ok(Done { jobs: item.over(broken), broken })
        }
    }
}

impl<N> Item<N> {
    fn new(node: N, parent: Option<Arc<Item<N>>>) -> Item<N> {
        Item { node, parent, pending: AtomicUsize::new(0), broken: AtomicBool::new(false) }
    }

    /// Tells the directory above; the last child to do so has it left.
    fn over(&self, broken: bool) -> Vec<Job<N>> {
        let Some(parent) = &self.parent else { return Vec::new() };
        if broken {
            parent.broken.store(true, Ordering::Release);
        }
        if parent.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            vec![Job::Leave(parent.clone())]
        } else {
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Nodes are "depth/width" trees named by their path; what happens is written down.
    #[derive(Default)]
    struct Recorder {
        log: Mutex<Vec<String>>,
        refuse_enter: Option<&'static str>,
        finally_refuse: Option<&'static str>,
    }

    impl Visitor for Recorder {
        type Node = String;

        async fn enter(&self, node: &String) -> Outcome<Entered<String>> {
            if self.refuse_enter == Some(node) {
                return Err(Failure::refused(node, "no"));
            }
            if self.finally_refuse == Some(node) {
                return Err(Failure::Unreachable("gone".into()));
            }
            self.log.lock().unwrap().push(format!("enter {node}"));
            let children = if node.len() < 3 { vec![format!("{node}a"), format!("{node}b")] } else { vec![] };
            Ok(Entered { children, broken: false })
        }

        async fn leave(&self, node: &String, broken: bool) -> Outcome {
            self.log.lock().unwrap().push(format!("leave {node} {broken}"));
            Ok(())
        }
    }

    fn position(log: &[String], line: &str) -> usize {
        log.iter().position(|at| at == line).unwrap_or_else(|| panic!("no '{line}' in {log:?}"))
    }

    #[tokio::test]
    async fn directories_are_left_after_what_is_in_them() {
        let recorder = Arc::new(Recorder::default());
        visit(recorder.clone(), vec!["r".into()], "test").await.unwrap();
        let log = recorder.log.lock().unwrap();
        assert_eq!(log.len(), 14);
        for node in ["ra", "rb", "raa", "rab", "rba", "rbb"] {
            let parent = &node[..node.len() - 1];
            assert!(position(&log, &format!("enter {parent}")) < position(&log, &format!("enter {node}")));
            assert!(
                position(&log, &format!("leave {node} false"))
                    < position(&log, &format!("leave {parent} false"))
            );
        }
    }

    #[tokio::test]
    async fn a_refusal_breaks_those_above_and_nobody_else() {
        let recorder = Arc::new(Recorder { refuse_enter: Some("rab"), ..Recorder::default() });
        let outcome = visit(recorder.clone(), vec!["r".into()], "test").await;
        assert!(matches!(outcome, Err(Failure::Reported)));
        let log = recorder.log.lock().unwrap();
        for line in ["leave raa false", "leave ra true", "leave rb false", "leave r true"] {
            position(&log, line);
        }
        assert!(!log.iter().any(|line| line.contains("rab")));
    }

    #[tokio::test]
    async fn a_final_failure_ends_it() {
        let recorder = Arc::new(Recorder { finally_refuse: Some("ra"), ..Recorder::default() });
        let outcome = visit(recorder.clone(), vec!["r".into()], "test").await;
        assert!(matches!(outcome, Err(Failure::Unreachable(_))));
        assert!(!recorder.log.lock().unwrap().iter().any(|line| line.starts_with("leave r ")));
    }
}
