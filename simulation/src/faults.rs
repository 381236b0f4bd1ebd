//! What goes wrong: crashes, partitions, bad weather, disks that are lost, full or flip bits.

use rand::Rng;
use rand::seq::IndexedRandom;

use crate::kernel::{Event, MILLISECOND, NodeId, SECOND, Weather};
use crate::world::{DISKS_PER_HOST, Node, World};

#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Something goes wrong now, and something else later.
    Next,
    Restart(NodeId),
    /// The pair hears each other again.
    Mend(NodeId, NodeId),
    DiskHasRoom(NodeId, usize),
    Calm,
}

impl World {
    pub(crate) fn fault(&mut self, fault: Fault) -> Result<(), String> {
        match fault {
            Fault::Next => {
                if self.chaos {
                    self.something()?;
                    let pause = self.kernel.rng.random_range(20 * MILLISECOND..900 * MILLISECOND);
                    self.kernel.at(self.kernel.now + pause, Event::Fault(Fault::Next));
                }
                Ok(())
            }
            Fault::Restart(id) => self.start(id),
            Fault::Mend(a, b) => {
                self.kernel.cut.remove(&(a, b));
                self.kernel.cut.remove(&(b, a));
                Ok(())
            }
            Fault::DiskHasRoom(host, disk) => {
                if let Node::Blocks(host) = &mut self.nodes[host.0] {
                    host.disks[disk].full = false;
                }
                Ok(())
            }
            Fault::Calm => {
                self.kernel.weather = Weather { lost: 5, duplicated: 10, slow: 10 };
                Ok(())
            }
        }
    }

    pub(crate) fn random_node(&mut self, is: impl Fn(&Node) -> bool) -> NodeId {
        let all: Vec<usize> =
            self.nodes.iter().enumerate().filter(|(_, node)| is(node)).map(|(at, _)| at).collect();
        NodeId(all.choose(&mut self.kernel.rng).copied().unwrap_or_default())
    }

    pub(crate) fn something(&mut self) -> Result<(), String> {
        match self.kernel.rng.random_range(0..100) {
            0..22 => {
                let id = self.random_node(|node| matches!(node, Node::Shards(_)));
                self.crash_soon(id)
            }
            22..36 => {
                let id = self.random_node(|node| matches!(node, Node::Coordinator(_)));
                self.crash_soon(id)
            }
            36..40 => {
                let id = self.random_node(|node| matches!(node, Node::Registry(_)));
                self.crash_soon(id)
            }
            40..50 => {
                let id = self.random_node(|node| matches!(node, Node::Blocks(_)));
                self.crash_soon(id)
            }
            50..54 => {
                let id = self.random_node(|node| matches!(node, Node::Client(_)));
                self.crash_soon(id)
            }
            54..64 => {
                self.snapshot();
                Ok(())
            }
            64..72 => {
                self.remember_state();
                Ok(())
            }
            72..76 => {
                let id = self.random_node(|node| matches!(node, Node::Shards(_)));
                if let Node::Shards(host) = &mut self.nodes[id.0] {
                    host.fail_next_write = true;
                }
                Ok(())
            }
            76..84 => {
                self.partition();
                Ok(())
            }
            84..94 => {
                self.spoil_disk();
                Ok(())
            }
            _ => {
                self.kernel.weather = Weather { lost: 100, duplicated: 100, slow: 100 };
                let calm = self.kernel.rng.random_range(100 * MILLISECOND..2 * SECOND);
                self.kernel.at(self.kernel.now + calm, Event::Fault(Fault::Calm));
                Ok(())
            }
        }
    }

    pub(crate) fn snapshot(&mut self) {
        let id = self.random_node(|node| !matches!(node, Node::Client(_) | Node::Blocks(_)));
        if !self.up[id.0] {
            return;
        }
        match &mut self.nodes[id.0] {
            Node::Shards(host) => host.request_snapshot(&mut self.kernel),
            Node::Coordinator(node) => node.request_snapshot(&mut self.kernel),
            _ => {}
        }
    }

    pub(crate) fn remember_state(&mut self) {
        for (node, up) in self.nodes.iter_mut().zip(&self.up) {
            match node {
                _ if !up => {}
                Node::Shards(host) => host.replica.remember_state(),
                Node::Coordinator(node) => node.replica.remember_state(),
                Node::Registry(node) => node.replica.remember_state(),
                Node::Blocks(_) | Node::Client(_) => {}
            }
        }
    }

    pub(crate) fn partition(&mut self) {
        let (a, b) = (self.random_node(|_| true), self.random_node(|_| true));
        if a == b {
            return;
        }
        self.kernel.note(format_args!("cut {a} from {b}"));
        self.kernel.cut.insert((a, b));
        if self.kernel.chance(500) {
            self.kernel.cut.insert((b, a));
        }
        let mend = self.kernel.rng.random_range(50 * MILLISECOND..4 * SECOND);
        self.kernel.at(self.kernel.now + mend, Event::Fault(Fault::Mend(a, b)));
    }

    pub(crate) fn spoil_disk(&mut self) {
        let Some(&(bad, disk)) = self.bad_disks.choose(&mut self.kernel.rng) else { return };
        let choice = self.kernel.rng.random_range(0..10);
        if choice >= 8 {
            let full = self.random_node(|node| matches!(node, Node::Blocks(_)));
            let disk = self.kernel.rng.random_range(0..DISKS_PER_HOST);
            if let Node::Blocks(host) = &mut self.nodes[full.0] {
                host.disks[disk].full = true;
            }
            let room = self.kernel.rng.random_range(SECOND..5 * SECOND);
            self.kernel.at(self.kernel.now + room, Event::Fault(Fault::DiskHasRoom(full, disk)));
            return;
        }
        let Node::Blocks(host) = &mut self.nodes[bad.0] else { return };
        let disk = &mut host.disks[disk];
        if choice == 0 && self.kernel.now > 10 * SECOND {
            self.kernel.note(format_args!("lose disk {} of {bad}", disk.identity.service));
            self.counts.disks_lost += u64::from(!disk.lost);
            disk.lost = true;
            disk.files.wipe();
            return;
        }
        for path in disk.files.paths() {
            if !path.starts_with("tmp/") && self.kernel.rng.random_range(0..4) == 0 {
                let (at, bit) =
                    (self.kernel.rng.random_range(0..1 << 20), self.kernel.rng.random_range(0..8));
                disk.files.flip(&path, at, bit);
                self.counts.bits_flipped += 1;
            }
        }
    }
}
