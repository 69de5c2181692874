use scalellm_engine_link::proto::{KvSnapshotRequest, KvStored, to_engine::Message};
use scalellm_engine_link::{Command, ReplicaConfig};

use crate::raw::Raw;
use crate::support::{EPOCH, Engine, config, ready, soon, tcp, unix};

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

#[tokio::test]
async fn a_replica_follows_the_prefix_cache_from_a_snapshot_on() {
    let engine = Engine::start(&unix());
    let replica = ready(
        &engine.address(),
        ReplicaConfig {
            kv_events: true,
            ..config()
        },
    )
    .await;
    assert_eq!(engine.command().await, Command::KvSnapshot);
    engine
        .handle
        .emit_kv(vec![stored(0, 1), stored(1, 2)], vec![], true);
    engine
        .handle
        .emit_kv(vec![stored(2, 3)], vec![vec![1; 16]], false);
    engine.handle.emit_kv(vec![stored(0, 1)], vec![], false);
    soon("the events", async {
        while replica.cached_prefix_blocks(&[[1; 16], [2; 16], [3; 16], [4; 16]]) != 3 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    })
    .await;
}
