//! Files and directories move between directories while others look: at no instant are they in both, or in none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use eggs_client::{Client, CreateOptions, ListOptions, Replace};
use eggs_proto::Time;
use eggs_tests::{Up, runtime, scratch};

/// Of each mover.
const MOVES: usize = 150;
const THINGS: [&str; 4] = ["file-a", "file-b", "dir-a", "dir-b"];

/// Names in a directory at an instant.
async fn names(client: &Client, path: &str, at: Time) -> Vec<String> {
    let listing = client.list(path, ListOptions { at, ..ListOptions::default() }).await.unwrap();
    listing.all().await.unwrap().iter().map(|entry| entry.name_lossy().into_owned()).collect()
}

/// Each thing is in one of the two directories at an instant, by listing and by name.
async fn assert_once(client: &Client, at: Time) {
    let (left, right) = (names(client, "/left", at).await, names(client, "/right", at).await);
    for thing in THINGS {
        let here = left.iter().chain(&right).filter(|name| *name == thing).count();
        assert_eq!(here, 1, "{thing} at {at:?}: left {left:?}, right {right:?}");
        let mut found = 0;
        for side in ["left", "right"] {
            match client.resolve_at(format!("/{side}/{thing}"), at).await {
                Ok(_) => found += 1,
                Err(error) => assert!(error.is_not_found(), "{error}"),
            }
        }
        assert_eq!(found, 1, "{thing} by name at {at:?}");
    }
}

async fn move_to_and_fro(client: Client, thing: &'static str) {
    for n in 0..MOVES {
        let (from, to) = if n % 2 == 0 { ("left", "right") } else { ("right", "left") };
        let (old, new) = (format!("/{from}/{thing}"), format!("/{to}/{thing}"));
        client.rename(&old, &new, Replace::Refuse).await.unwrap();
        // It is there for who moved it, and no more where it was.
        assert!(client.stat(&new).await.is_ok(), "{new} after the move");
        assert!(client.stat(&old).await.unwrap_err().is_not_found(), "{old} after the move");
    }
}

#[test]
fn nothing_is_ever_in_two_places() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    runtime().block_on(async {
        let client = up.client().await;
        for side in ["/left", "/right"] {
            client.mkdir(side, None).await.unwrap();
        }
        for thing in THINGS {
            let path = format!("/left/{thing}");
            if thing.starts_with("dir") {
                client.mkdir(&path, None).await.unwrap();
            } else {
                client.put_bytes(&path, "contents".into(), &CreateOptions::default()).await.unwrap();
            }
        }
        let began = client.now();
        let (done, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let look = {
            let (client, done, looks) = (client.clone(), Arc::clone(&done), Arc::clone(&looks));
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    let now = client.now();
                    assert_once(&client, now).await;
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let movers: Vec<_> =
            THINGS.iter().map(|thing| tokio::spawn(move_to_and_fro(client.clone(), thing))).collect();
        for mover in movers {
            mover.await.unwrap();
        }
        done.store(true, Ordering::Relaxed);
        look.await.unwrap();
        assert!(looks.load(Ordering::Relaxed) > 5, "hardly ever looked");
        // And long after: every instant in between.
        let ended = client.now();
        for part in 0..100 {
            let at = Time(began.0 + (ended.0 - began.0) / 100 * part);
            assert_once(&client, at).await;
        }
    });
    up.stop();
}
