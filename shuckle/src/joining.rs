//! How a shuckle with nothing in its directory becomes part of a cluster: it founds one, or joins the one
//! its peers have.
//!
//! Only the first of the peers may found, and only when all the others say that they have no cluster: one
//! that does not answer may have it.

use std::time::Duration;

use eggs_daemon::channel;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::pb::registry_service_client::RegistryServiceClient;
use eggs_proto::{ClusterId, StoreId, pb};
use tonic::transport::Channel;

use crate::registry::NO_CLUSTER;

/// Peers are on the same network, or away.
const GREET_MAX: Duration = Duration::from_secs(1);

/// What a peer says when it is greeted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// It is part of this cluster; its store, when it tells.
    Cluster(ClusterId, Option<StoreId>),
    /// It has none, and waits too.
    NoCluster,
    /// Nothing that helps, and why.
    Unknown(String),
}

/// The other shuckles, as the operator listed them.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    /// This one is the first of the list.
    pub first: bool,
    others: Vec<(String, Option<Channel>)>,
}

impl Peers {
    /// `me`: as others reach this one; it need not be listed.
    pub fn new(listed: &[String], me: &str) -> Peers {
        let mut others: Vec<(String, Option<Channel>)> = Vec::new();
        for address in listed.iter().filter(|address| *address != me) {
            if !others.iter().any(|(other, _)| other == address) {
                others.push((address.clone(), channel::connect(address).ok()));
            }
        }
        Peers { first: listed.first().is_none_or(|first| first == me), others }
    }

    pub fn is_empty(&self) -> bool {
        self.others.is_empty()
    }

    pub fn len(&self) -> usize {
        self.others.len()
    }

    pub fn addresses(&self) -> impl Iterator<Item = &String> {
        self.others.iter().map(|(address, _)| address)
    }

    /// Greets all of them at once.
    pub async fn greet(&self) -> Vec<(String, Greeting)> {
        let mut greetings = tokio::task::JoinSet::new();
        for (at, (address, channel)) in self.others.iter().cloned().enumerate() {
            greetings.spawn(async move {
                let greeting = match channel {
                    Some(channel) => greet(channel).await,
                    None => Greeting::Unknown("not an address".to_owned()),
                };
                (at, address, greeting)
            });
        }
        let mut answers = greetings.join_all().await;
        answers.sort_by_key(|(at, ..)| *at);
        answers.into_iter().map(|(_, address, greeting)| (address, greeting)).collect()
    }
}

async fn greet(channel: Channel) -> Greeting {
    let header = pb::RequestHeader { version: PROTOCOL_VERSION, ..pb::RequestHeader::default() };
    let request = pb::RegistryRequest { header: Some(header), op: Some(Op::Hello(pb::Hello {})) };
    let mut client = RegistryServiceClient::new(channel);
    let answer = match tokio::time::timeout(GREET_MAX, client.call(request)).await {
        Ok(Ok(reply)) => reply.into_inner().result,
        Ok(Err(status)) => return Greeting::Unknown(status.message().to_owned()),
        Err(_) => return Greeting::Unknown("no answer".to_owned()),
    };
    match answer {
        Some(Answer::Hello(hello)) => match ClusterId::from_bytes(&hello.cluster_id) {
            Some(cluster) => Greeting::Cluster(cluster, (hello.store != 0).then_some(StoreId(hello.store))),
            None => Greeting::Unknown("its cluster id is not one".to_owned()),
        },
        Some(Answer::Error(error)) if error.message.contains(NO_CLUSTER) => Greeting::NoCluster,
        Some(Answer::Error(error)) => Greeting::Unknown(error.message),
        _ => Greeting::Unknown("it does not speak this protocol".to_owned()),
    }
}

/// What one that may found does after a round of greetings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Found,
    Join,
    /// For whom, and why.
    Wait(String),
}

pub(crate) fn judge(first: bool, greetings: &[(String, Greeting)]) -> Verdict {
    if !first || greetings.iter().any(|(_, greeting)| matches!(greeting, Greeting::Cluster(..))) {
        return Verdict::Join;
    }
    let unknown = greetings.iter().filter_map(|(address, greeting)| match greeting {
        Greeting::Unknown(why) => Some(format!("{address} ({why})")),
        _ => None,
    });
    let unknown: Vec<String> = unknown.collect();
    if unknown.is_empty() { Verdict::Found } else { Verdict::Wait(unknown.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_founds_and_only_when_all_others_have_no_cluster() {
        let of = |greetings: &[Greeting]| -> Vec<(String, Greeting)> {
            greetings.iter().map(|greeting| ("h:1".to_owned(), greeting.clone())).collect()
        };
        let cluster = Greeting::Cluster(ClusterId([1; 16]), None);
        let away = Greeting::Unknown("refused".to_owned());
        let none = Greeting::NoCluster;
        assert_eq!(judge(true, &of(&[none.clone(), none.clone()])), Verdict::Found);
        assert_eq!(judge(true, &[]), Verdict::Found);
        assert_eq!(judge(false, &of(&[none.clone(), none.clone()])), Verdict::Join);
        assert_eq!(judge(true, &of(&[away.clone(), cluster])), Verdict::Join);
        assert_eq!(judge(true, &of(&[away, none])), Verdict::Wait("h:1 (refused)".to_owned()));
    }

    #[tokio::test]
    async fn peers_are_the_others_once_each() {
        let listed = ["a:1", "b:1", "b:1", "c:1"].map(str::to_owned);
        let peers = Peers::new(&listed, "a:1");
        assert!(peers.first && peers.addresses().eq(["b:1", "c:1"]));
        let unlisted = Peers::new(&listed, "d:1");
        assert!(!unlisted.first && unlisted.len() == 3);
        assert!(Peers::new(&[], "d:1").first && Peers::new(&[], "d:1").is_empty());
    }
}
