//! Certificates: signed as the leader answers, so that no secret is in the log.

use bytes::Bytes;
use eggs_proto::{BlockId, BlockServiceId, mac, pb};

use crate::cluster::Cluster;

/// Signs every placed block of a reply. One whose service's key is not known stays unsigned; its
/// writer will have to replace it.
pub fn sign(reply: &mut pb::WriteReply, cluster: &Cluster) {
    for result in &mut reply.results {
        let Some(pb::write_result::Result::Eden(eden)) = &mut result.result else { continue };
        for placed in &mut eden.blocks {
            let service = BlockServiceId(placed.block_service);
            if let Some(key) = cluster.key(service) {
                let block = BlockId(placed.block);
                let certificate = mac::write_certificate(key, service, block, placed.size, placed.crc);
                placed.certificate = Bytes::copy_from_slice(&certificate);
            }
        }
    }
}
