//! Who replicates a group.

use eggs_proto::{StoreId, pb};
use raft::eraftpb::ConfState;

/// The members of a group since a log index; voters and learners are sorted and disjoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    pub voters: Vec<StoreId>,
    pub learners: Vec<StoreId>,
    /// Of the entry that made it so; 0: founded so.
    pub index: u64,
}

impl Membership {
    /// What a group is founded with.
    pub fn founding(voters: &[StoreId]) -> Self {
        let mut voters = voters.to_vec();
        voters.sort_unstable();
        voters.dedup();
        Membership { voters, learners: Vec::new(), index: 0 }
    }

    pub fn contains(&self, store: StoreId) -> bool {
        self.voters.contains(&store) || self.learners.contains(&store)
    }

    /// Voters, then learners.
    pub fn members(&self) -> impl Iterator<Item = StoreId> + '_ {
        self.voters.iter().chain(&self.learners).copied()
    }

    /// Voters that must agree.
    pub fn quorum(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    pub(crate) fn from_conf(conf: &ConfState, index: u64) -> Self {
        let sorted = |ids: &[u64]| {
            let mut ids: Vec<StoreId> = ids.iter().copied().map(StoreId).collect();
            ids.sort_unstable();
            ids
        };
        Membership { voters: sorted(&conf.voters), learners: sorted(&conf.learners), index }
    }

    pub(crate) fn to_conf(&self) -> ConfState {
        let ids = |stores: &[StoreId]| stores.iter().map(|store| store.0).collect();
        ConfState { voters: ids(&self.voters), learners: ids(&self.learners), ..ConfState::default() }
    }
}

impl From<&Membership> for pb::Membership {
    fn from(membership: &Membership) -> Self {
        let ids = |stores: &[StoreId]| stores.iter().map(|store| store.0).collect();
        pb::Membership {
            voters: ids(&membership.voters),
            learners: ids(&membership.learners),
            index: membership.index,
        }
    }
}

impl From<&pb::Membership> for Membership {
    fn from(stored: &pb::Membership) -> Self {
        let ids = |stores: &[u64]| stores.iter().copied().map(StoreId).collect();
        Membership { voters: ids(&stored.voters), learners: ids(&stored.learners), index: stored.index }
    }
}
