//! Every order in which anything can happen to a few transactions, each pair of a list, on real cores.

#[path = "../world/mod.rs"]
mod world;

mod canon;
mod judge;
mod scenario;
mod search;
mod state;

use search::Explored;
use state::Bounds;

#[test]
fn every_pair_in_every_order() {
    let tree = scenario::plant();
    let crashes = std::env::var("CR").map_or(1, |n| n.parse().unwrap());
    let bounds = Bounds { crashes, losses: 0, brief: std::env::var("FULL").is_err() };
    let mut all = Explored::default();
    let operations = scenario::operations(&tree.places);
    for (n, first) in operations.iter().enumerate() {
        for second in &operations[n..] {
            let explored = search::explore(tree.state(&[first, second], bounds));
            println!("{:>8} {:>8} {:>5} {} | {}", explored.states, explored.transitions, explored.ends, first.name, second.name);
            all.add(&explored);
        }
    }
    println!("{all:?}");
}
