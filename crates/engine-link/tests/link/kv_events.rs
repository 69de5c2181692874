use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use scalellm_engine_link::proto::{KvSnapshotRequest, KvStored, to_engine::Message};
use scalellm_engine_link::{BlockHash, Command, EngineInfo, KvSink, ListenerConfig, Replica};

use crate::raw::Raw;
use crate::support::{EPOCH, Engine, config, info, soon, tcp, unix};

fn stored(parent: u8, hash: u8) -> KvStored {
    KvStored {
        parent: vec![parent; 16],
        hash: vec![hash; 16],
    }
}

#[tokio::test]
async fn events_are_numbered_and_a_snapshot_has_the_number_of_the_last() {
    let engine = Engine::start(&tcp());
    let mut asks = Raw::connect(&engine.address(), "asks", None).await;
    asks.welcome().await;
    let mut follows = Raw::connect(&engine.address(), "follows", None).await;
    follows.welcome().await;
    engine.handle.emit_kv(vec![stored(0, 1)], vec![], false);
    engine.handle.emit_kv(vec![], vec![vec![1; 16]], false);
    for sequence in 1..=2 {
        for raw in [&mut asks, &mut follows] {
            let events = raw.numbered().await.kv_events.expect("events");
            assert_eq!(
                (events.epoch, events.sequence, events.snapshot),
                (EPOCH, sequence, false)
            );
        }
    }
    asks.send(Message::KvSnapshot(KvSnapshotRequest {})).await;
    assert_eq!(engine.command().await, Command::KvSnapshot);
    engine.handle.emit_kv(vec![stored(0, 3)], vec![], true);
    let snapshot = asks.numbered().await.kv_events.expect("events");
    assert_eq!((snapshot.sequence, snapshot.snapshot), (2, true));
    engine.handle.emit_kv(vec![stored(3, 4)], vec![], false);
    let next = follows.numbered().await.kv_events.expect("events");
    assert_eq!(
        (next.sequence, next.snapshot),
        (3, false),
        "who did not ask sees no gap and no snapshot"
    );
}

#[derive(Default)]
struct Blocks(Mutex<BTreeSet<u8>>);

impl KvSink for Blocks {
    fn change(&self, stored: Vec<BlockHash>, removed: Vec<BlockHash>) {
        let mut blocks = self.0.lock().expect("no panic");
        blocks.extend(stored.iter().map(|hash| hash[0]));
        for hash in removed {
            blocks.remove(&hash[0]);
        }
    }

    fn clear(&self) {
        self.0.lock().expect("no panic").clear();
    }
}

impl Blocks {
    async fn become_these(&self, expected: &[u8]) {
        soon("the events", async {
            while !self.0.lock().expect("no panic").iter().eq(expected) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_sink_follows_the_prefix_cache_from_a_snapshot_on() {
    let engine = Engine::start(&unix());
    let blocks = Arc::new(Blocks::default());
    let replica = Replica::start_following(engine.address(), config(), blocks.clone());
    assert_eq!(engine.command().await, Command::KvSnapshot);
    engine
        .handle
        .emit_kv(vec![stored(0, 1), stored(1, 2)], vec![], true);
    engine
        .handle
        .emit_kv(vec![stored(2, 3)], vec![vec![1; 16]], false);
    engine.handle.emit_kv(vec![stored(0, 4)], vec![], false);
    blocks.become_these(&[2, 3, 4]).await;
    replica.shutdown().await;
}

#[tokio::test]
async fn a_restarted_engine_is_followed_anew() {
    let engine = Engine::start(&unix());
    let address = engine.address();
    let blocks = Arc::new(Blocks::default());
    let replica = Replica::start_following(address.clone(), config(), blocks.clone());
    assert_eq!(engine.command().await, Command::KvSnapshot);
    engine.handle.emit_kv(vec![stored(0, 1)], vec![], true);
    blocks.become_these(&[1]).await;
    drop(engine);
    let info = EngineInfo {
        epoch: EPOCH + 1,
        ..info()
    };
    let engine = Engine::start_with(&address, info, ListenerConfig::default());
    assert_eq!(engine.command().await, Command::KvSnapshot);
    engine.handle.emit_kv(vec![stored(0, 9)], vec![], true);
    blocks.become_these(&[9]).await;
    replica.shutdown().await;
}
