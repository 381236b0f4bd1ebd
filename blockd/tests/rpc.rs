//! The block service over real gRPC on loopback, with good and hostile callers.

mod support;

use std::time::Duration;

use bytes::Bytes;
use eggs_proto::BlockError;
use eggs_proto::limits::BLOCK_BYTES_MAX;
use eggs_proto::pb;
use eggs_proto::pb::write_block_request::Part;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;

#[tokio::test(flavor = "multi_thread")]
async fn blocks_go_in_come_out_and_are_erased() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let identity = identity(folder.path());
    for (n, length) in [(1, 1), (2, 4096), (3, (1 << 20) + 1), (4, 5 << 20)] {
        let bytes = contents(n, length);
        let proven = daemon.write(write(&identity, block(n), &bytes)).await;
        assert_eq!(proven, Ok(proof(&identity, block(n), &bytes)));
        assert_eq!(daemon.fetch(&identity, block(n), 0, length as u32).await, Ok(bytes.clone()));
        let (from, to) = (length / 3, length - length / 4);
        let part = daemon.fetch(&identity, block(n), from as u32, (to - from) as u32).await;
        assert_eq!(part, Ok(bytes.slice(from..to)));
        assert_eq!(daemon.fetch(&identity, block(n), length as u32, 0).await, Ok(Bytes::new()));
    }
    let stats = daemon.until(|stats| stats[0].blocks == 4).await;
    assert_eq!(stats[0].id, identity.service.0);
    // Small blocks with a little around them, large ones from page to page.
    let bytes = 1 + 4096 + (1 << 20) + 1 + (5 << 20);
    assert!((bytes..bytes + 2 * 8192 + bytes / 1000 + 1000).contains(&stats[0].used_bytes), "{stats:?}");
    assert!(stats[0].available_bytes > 0 && stats[0].available_bytes < stats[0].capacity_bytes);

    // The same certificate again: the same proof, with or without the data.
    let again = write(&identity, block(4), &contents(4, 5 << 20));
    assert_eq!(
        daemon.write(again[..1].to_vec()).await,
        Ok(proof(&identity, block(4), &contents(4, 5 << 20)))
    );
    assert_eq!(daemon.write(again).await, Ok(proof(&identity, block(4), &contents(4, 5 << 20))));

    for _ in 0..2 {
        assert_eq!(daemon.erase(erase(&identity, block(4))).await, Ok(erased(&identity, block(4))));
    }
    assert_eq!(daemon.fetch(&identity, block(4), 0, 1).await, Err(BlockError::UnknownBlock));
    daemon.until(|stats| stats[0].blocks == 3).await;
    daemon.stop().await;

    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    assert_eq!(daemon.fetch(&identity, block(2), 0, 4096).await, Ok(contents(2, 4096)));
    daemon.until(|stats| stats[0].blocks == 3).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_are_not_as_they_should_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let identity = identity(folder.path());
    let bytes = contents(1, 3 << 20);
    let good = write(&identity, block(1), &bytes);
    let begin = |change: fn(&mut pb::WriteStart)| {
        let mut begin = start(&identity, block(1), bytes.len() as u32, crc32fast::hash(&bytes));
        change(&mut begin);
        [vec![message(Part::Start(begin))], good[1..].to_vec()].concat()
    };
    use BlockError::*;
    let cases: Vec<(&str, Vec<pb::WriteBlockRequest>, BlockError)> = vec![
        ("nothing", vec![], Malformed),
        ("data first", good[1..].to_vec(), Malformed),
        ("a message that says nothing", vec![pb::WriteBlockRequest { part: None }], Malformed),
        (
            "one in the middle",
            vec![good[0].clone(), good[1].clone(), pb::WriteBlockRequest { part: None }],
            Malformed,
        ),
        ("two starts", vec![good[0].clone(), good[0].clone()], Malformed),
        ("empty data", vec![good[0].clone(), data(vec![])], Malformed),
        ("a large message", vec![good[0].clone(), data(vec![0; 2 << 20])], Malformed),
        ("no data", good[..1].to_vec(), WrongSize),
        ("too few bytes", good[..3].to_vec(), WrongSize),
        (
            "too many bytes",
            [good[..3].to_vec(), vec![data(vec![0; 1 << 19]), data(vec![0; (1 << 19) + 1])]].concat(),
            WrongSize,
        ),
        ("other bytes", [good[..3].to_vec(), vec![data(vec![0; 1 << 20])]].concat(), WrongCrc),
        (
            "in another order",
            vec![good[0].clone(), good[2].clone(), good[1].clone(), good[3].clone()],
            WrongCrc,
        ),
        ("no header", begin(|start| start.header = None), Malformed),
        (
            "another cluster",
            begin(|start| start.header.as_mut().unwrap().cluster_id = vec![8; 16].into()),
            WrongCluster,
        ),
        (
            "no cluster",
            begin(|start| start.header.as_mut().unwrap().cluster_id = vec![].into()),
            WrongCluster,
        ),
        ("a newer protocol", begin(|start| start.header.as_mut().unwrap().version += 1), UnsupportedVersion),
        (
            "another disk",
            begin(|start| start.block_service = other(eggs_proto::BlockServiceId(start.block_service))),
            UnknownBlockService,
        ),
        ("another block", begin(|start| start.block += 1), BadCertificate),
        ("another size", begin(|start| start.size -= 1), BadCertificate),
        ("another crc", begin(|start| start.crc ^= 1), BadCertificate),
        ("no certificate", begin(|start| start.certificate = vec![].into()), BadCertificate),
        ("no size", vec![message(Part::Start(start(&identity, block(1), 0, 0)))], WrongSize),
        (
            "a huge size",
            vec![message(Part::Start(start(&identity, block(1), BLOCK_BYTES_MAX + 1, 0)))],
            WrongSize,
        ),
    ];
    for (what, messages, error) in cases {
        assert_eq!(daemon.write(messages).await, Err(error), "{what}");
        assert_eq!(daemon.fetch(&identity, block(1), 0, 1).await, Err(UnknownBlock), "{what}");
    }
    assert_eq!(daemon.stats().await[0].blocks, 0);
    assert_eq!(daemon.write(good).await, Ok(proof(&identity, block(1), &bytes)));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_and_erasures_that_are_not_as_they_should_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let identity = identity(folder.path());
    let bytes = contents(1, 10_000);
    daemon.write(write(&identity, block(1), &bytes)).await.unwrap();
    use BlockError::*;
    for (offset, length) in [(0, 10_001), (10_000, 1), (10_001, 0), (u32::MAX, u32::MAX), (1, u32::MAX)] {
        assert_eq!(daemon.fetch(&identity, block(1), offset, length).await, Err(OutOfRange));
    }
    let fetched = |change: fn(&mut pb::FetchBlockRequest)| {
        let mut request = fetch(&identity, block(1), 0, 1);
        change(&mut request);
        daemon.fetch_request(request)
    };
    assert_eq!(fetched(|request| request.header = None).await, Err(Malformed));
    assert_eq!(fetched(|request| request.block_service = 0).await, Err(UnknownBlockService));
    assert_eq!(fetched(|request| request.block = 0).await, Err(UnknownBlock));
    assert_eq!(fetched(|request| request.block = u64::MAX).await, Err(UnknownBlock));

    let erased = |change: fn(&mut pb::EraseBlock)| {
        let mut request = erase(&identity, block(1));
        change(&mut request);
        daemon.erase(request)
    };
    assert_eq!(erased(|request| request.block_service = 0).await, Err(UnknownBlockService));
    assert_eq!(erased(|request| request.block = 2).await, Err(BadCertificate));
    assert_eq!(erased(|request| request.certificate = vec![0; 16].into()).await, Err(BadCertificate));
    assert_eq!(daemon.fetch(&identity, block(1), 0, 10_000).await, Ok(bytes));

    let nobody =
        daemon.client.clone().stats(pb::BlockStatsRequest { header: None }).await.unwrap().into_inner();
    assert!(nobody.error.is_some() && nobody.block_services.is_empty());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_and_bytes_that_are_none_hurt_only_their_sender() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let identity = identity(folder.path());
    let bytes = contents(1, 100_000);
    // Larger than any message may be: gRPC itself refuses it.
    let start = start(&identity, block(1), BLOCK_BYTES_MAX, 0);
    let messages = tokio_stream::iter(vec![message(Part::Start(start)), data(vec![0; 9 << 20])]);
    let reply = daemon.client.clone().write(messages).await;
    assert!(
        reply.is_err()
            || reply.is_ok_and(|reply| matches!(
                reply.into_inner().result,
                Some(pb::write_block_reply::Result::Error(_))
            ))
    );
    for junk in
        [vec![0u8; 100_000], contents(3, 100_000).to_vec(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".repeat(999)]
    {
        let mut stream = tokio::net::TcpStream::connect(&daemon.address).await.unwrap();
        let _ = stream.write_all(&junk).await;
        let _ = stream.shutdown().await;
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut Vec::new())).await;
    }
    daemon.write(write(&identity, block(1), &bytes)).await.unwrap();
    assert_eq!(daemon.fetch(&identity, block(1), 0, 100_000).await, Ok(bytes));
    assert_eq!(daemon.stats().await[0].blocks, 1);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_does_not_wait_for_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let identity = identity(folder.path());
    let mut start = start(&identity, block(1), BLOCK_BYTES_MAX, 1);
    start.certificate = vec![1; 16].into();
    // The data never ends.
    let messages = tokio_stream::iter(vec![message(Part::Start(start))]).chain(tokio_stream::pending());
    assert_eq!(daemon.write_stream(messages).await, Err(BlockError::BadCertificate));

    // More data than fits any window, all for nothing.
    let bytes = contents(1, 1 << 20);
    daemon.write(write(&identity, block(1), &bytes)).await.unwrap();
    let again = write(&identity, block(1), &bytes)[..1].to_vec();
    let endless =
        tokio_stream::iter(again).chain(tokio_stream::iter(std::iter::repeat_n(data(bytes.clone()), 200)));
    assert_eq!(daemon.write_stream(endless).await, Ok(proof(&identity, block(1), &bytes)));
    assert_eq!(daemon.fetch(&identity, block(1), 0, 1 << 20).await, Ok(bytes));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_goes_away_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let identity = identity(folder.path());
    let files = || daemon.service.arriving(identity.service);
    let wait_for = async |count| {
        for _ in 0..2000 {
            if files() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} blocks in arrival, not {count}", files());
    };
    let bytes = contents(1, 3 << 20);
    let half = write(&identity, block(1), &bytes)[..2].to_vec();
    let mut client = daemon.client.clone();
    let writing = tokio::spawn(async move {
        let messages = tokio_stream::iter(half).chain(tokio_stream::pending());
        client.write(messages).await.map(drop)
    });
    wait_for(1).await;
    // Meanwhile the block is its.
    assert_eq!(daemon.write(write(&identity, block(1), &bytes)).await, Err(BlockError::Busy));
    assert_eq!(daemon.erase(erase(&identity, block(1))).await, Err(BlockError::Busy));
    writing.abort();
    wait_for(0).await;
    assert_eq!(
        daemon.write(write(&identity, block(1), &bytes)).await,
        Ok(proof(&identity, block(1), &bytes))
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_do_not_disturb_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let daemon = std::sync::Arc::new(Daemon::start(paths.iter().map(disk).collect()).await);
    let identities = paths.each_ref().map(identity);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..64u64 {
        let (daemon, identity) = (std::sync::Arc::clone(&daemon), identities[n as usize % 2].clone());
        tasks.spawn(async move {
            let bytes = contents(n, 1000 + 30_011 * n as usize);
            let written = daemon.write(write(&identity, block(n), &bytes)).await;
            assert_eq!(written, Ok(proof(&identity, block(n), &bytes)));
            assert_eq!(daemon.fetch(&identity, block(n), 0, bytes.len() as u32).await, Ok(bytes));
            if n % 4 == 0 {
                daemon.erase(erase(&identity, block(n))).await.unwrap();
            }
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
    daemon.until(|stats| stats.iter().map(|disk| disk.blocks).sum::<u64>() == 48).await;
    std::sync::Arc::into_inner(daemon).unwrap().stop().await;
}
