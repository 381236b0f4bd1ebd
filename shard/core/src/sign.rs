//! Certificates: signed as the leader answers, so that no secret is in the log. A read is signed as a write is.

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

/// Signs the leave to erase every block. One whose service's key is not known stays unsigned: its service is not part of
/// the cluster any more, or not known here yet.
pub fn sign_garbage(reply: &mut pb::ListGarbageReply, cluster: &Cluster) {
    for garbage in &mut reply.blocks {
        let (service, block) = (BlockServiceId(garbage.block_service), BlockId(garbage.block));
        if let Some(key) = cluster.key(service) {
            let certificate = mac::erase_certificate(key, service, block);
            garbage.certificate = Bytes::copy_from_slice(&certificate);
        }
    }
}
