//! Broken streams: what comes back, what is lost, and how fast it is said.

use std::time::{Duration, Instant};

use scalellm_engine_link::proto::FinishReason;
use scalellm_engine_link::{
    Address, Command, ListenerConfig, Replica, ReplicaConfig, ReplicaState, RequestStream,
    StreamError,
};

use crate::proxy::Proxy;
use crate::support::{Engine, config, info, reach, ready, soon, submit, tcp, unix};

async fn lost(stream: &mut RequestStream) -> String {
    match soon("the error", stream.next()).await {
        Some(Err(StreamError::Lost { reason, .. })) => reason,
        other => panic!("{other:?}"),
    }
}

/// Waits for `count` ids.
async fn ids(stream: &mut RequestStream, count: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    while ids.len() < count {
        ids.extend(
            soon("ids", stream.next())
                .await
                .expect("not the end")
                .expect("no error")
                .token_ids,
        );
    }
    ids
}

#[tokio::test]
async fn a_broken_stream_reattaches_without_loss_or_repetition() {
    let engine = Engine::start(&tcp());
    let proxy = Proxy::start(&engine.address()).await;
    let replica = ready(&proxy.address, config()).await;
    let mut stream = replica.submit(submit(vec![1], 1_000)).expect("taken");
    let key = engine.submission().await.key;
    let mut received = Vec::new();
    for round in 0..5 {
        for id in 0..100 {
            engine.emit(key, &[round * 100 + id], FinishReason::Unspecified);
            if id == 50 {
                proxy.cut();
            }
        }
        received.extend(ids(&mut stream, 100).await);
        reach(&replica, ReplicaState::Ready).await;
    }
    assert_eq!(received, (0..500).collect::<Vec<_>>());
    assert!(
        engine.handle.poll(Duration::ZERO).is_empty(),
        "nothing was cancelled or sent twice"
    );
}

#[tokio::test]
async fn a_submit_that_the_wire_swallowed_arrives_once_after_reattaching() {
    let engine = Engine::start(&tcp());
    let proxy = Proxy::start(&engine.address()).await;
    let replica = ready(&proxy.address, config()).await;
    let mut arrived = replica.submit(submit(vec![1], 10)).expect("taken");
    let first = engine.submission().await;
    proxy.freeze(true);
    let mut swallowed = replica.submit(submit(vec![2], 10)).expect("taken");
    tokio::time::sleep(Duration::from_millis(50)).await;
    proxy.cut();
    proxy.freeze(false);
    let second = engine.submission().await;
    assert_eq!(second.submit.prompt_ids, [2]);
    engine.emit(first.key, &[11], FinishReason::Length);
    engine.emit(second.key, &[12], FinishReason::Length);
    assert_eq!(ids(&mut arrived, 1).await, [11]);
    assert_eq!(ids(&mut swallowed, 1).await, [12]);
    assert!(engine.handle.poll(Duration::ZERO).is_empty());
}

#[tokio::test]
async fn a_request_whose_end_was_on_the_wire_is_not_started_again() {
    let engine = Engine::start(&tcp());
    let proxy = Proxy::start(&engine.address()).await;
    let replica = ready(&proxy.address, config()).await;
    let mut stream = replica.submit(submit(vec![1], 10)).expect("taken");
    let key = engine.submission().await.key;
    proxy.freeze(true);
    engine.emit(key, &[5], FinishReason::Eos);
    tokio::time::sleep(Duration::from_millis(50)).await;
    proxy.cut();
    proxy.freeze(false);
    assert_eq!(ids(&mut stream, 1).await, [5]);
    assert!(stream.next().await.is_none());
    reach(&replica, ReplicaState::Ready).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(engine.handle.poll(Duration::ZERO).is_empty());
}

#[tokio::test]
async fn a_cancel_that_the_wire_swallowed_arrives_after_reattaching() {
    let engine = Engine::start(&tcp());
    let proxy = Proxy::start(&engine.address()).await;
    let replica = ready(&proxy.address, config()).await;
    let stream = replica.submit(submit(vec![1], 10)).expect("taken");
    let key = engine.submission().await.key;
    proxy.freeze(true);
    drop(stream);
    tokio::time::sleep(Duration::from_millis(50)).await;
    proxy.cut();
    proxy.freeze(false);
    assert_eq!(engine.command().await, Command::Cancel(key));
}

#[tokio::test]
async fn a_killed_engine_ends_its_requests_at_once() {
    for address in [unix(), tcp()] {
        let engine = Engine::start(&address);
        let slow = Duration::from_secs(5);
        let config = ReplicaConfig {
            backoff_min: slow,
            backoff_max: slow,
            sessions: 2,
            ..config()
        };
        let replica = ready(&engine.address(), config).await;
        let mut stream = replica.submit(submit(vec![1], 10)).expect("taken");
        let key = engine.submission().await.key;
        engine.emit(key, &[1], FinishReason::Unspecified);
        assert_eq!(ids(&mut stream, 1).await, [1]);
        let killed = Instant::now();
        engine.kill();
        let reason = lost(&mut stream).await;
        assert!(
            killed.elapsed() < Duration::from_millis(500),
            "{:?}",
            killed.elapsed()
        );
        assert!(reason.contains("did not come back"), "{reason}");
        assert_eq!(replica.in_flight(), 0);
        reach(&replica, ReplicaState::Lost).await;
    }
}

#[tokio::test]
async fn a_restarted_engine_is_another_epoch() {
    let address = unix();
    let engine = Engine::start(&address);
    let replica = ready(&address, config()).await;
    let mut stream = replica.submit(submit(vec![1], 10)).expect("taken");
    engine.submission().await;
    engine.kill();
    let mut other = info();
    other.epoch = 78;
    let engine = Engine::start_with(&address, other, ListenerConfig::default());
    lost(&mut stream).await;
    reach(&replica, ReplicaState::Ready).await;
    assert_eq!(replica.info().expect("described").epoch, 78);
    let _stream = replica.submit(submit(vec![3], 10)).expect("taken");
    assert_eq!(engine.submission().await.submit.prompt_ids, [3]);
}

#[tokio::test]
async fn an_engine_without_a_sign_of_life_is_lost() {
    let engine = Engine::start(&tcp());
    let proxy = Proxy::start(&engine.address()).await;
    let silence = Duration::from_millis(500);
    let replica = ready(
        &proxy.address,
        ReplicaConfig {
            peer_silence: silence,
            ..config()
        },
    )
    .await;
    let mut stream = replica.submit(submit(vec![1], 10)).expect("taken");
    engine.submission().await;
    proxy.freeze(true);
    let frozen = Instant::now();
    let reason = lost(&mut stream).await;
    assert!(reason.contains("no sign of life"), "{reason}");
    assert!(frozen.elapsed() < silence * 2, "{:?}", frozen.elapsed());
    reach(&replica, ReplicaState::Lost).await;
    proxy.cut();
    proxy.freeze(false);
    reach(&replica, ReplicaState::Ready).await;
}

#[tokio::test]
async fn a_hung_loop_is_noticed_by_the_age_of_its_step_and_may_recover() {
    let engine = Engine::start(&unix());
    let hung_after = Duration::from_millis(300);
    let replica = ready(
        &engine.address(),
        ReplicaConfig {
            hung_after,
            ..config()
        },
    )
    .await;
    let mut stream = replica.submit(submit(vec![1], 10)).expect("taken");
    let key = engine.submission().await.key;
    let reason = lost(&mut stream).await;
    assert!(reason.contains("has not come round"), "{reason}");
    assert_eq!(replica.state(), ReplicaState::Hung);
    assert!(replica.submit(submit(vec![1], 10)).is_err());
    // The loop comes round: it learns that the request is over, and the replica is well again.
    assert_eq!(engine.command().await, Command::Cancel(key));
    let handle = engine.handle.clone();
    let waiting = tokio::task::spawn_blocking(move || handle.poll(Duration::from_secs(5)));
    reach(&replica, ReplicaState::Ready).await;
    tokio::time::sleep(hung_after * 2).await;
    assert_eq!(
        replica.state(),
        ReplicaState::Ready,
        "waiting for work is no hang"
    );
    let _stream = replica.submit(submit(vec![1], 10)).expect("taken");
    assert_eq!(waiting.await.expect("no panic").len(), 1);
}

#[tokio::test]
async fn a_gateway_that_shuts_down_takes_its_requests_with_it_at_once() {
    let engine = Engine::start(&unix());
    let replica = ready(&engine.address(), config()).await;
    let mut stream = replica.submit(submit(vec![1], 10)).expect("taken");
    let key = engine.submission().await.key;
    let asked = Instant::now();
    replica.shutdown().await;
    assert!(lost(&mut stream).await.contains("shut down"));
    assert_eq!(engine.command().await, Command::Cancel(key));
    assert!(
        asked.elapsed() < Duration::from_secs(1),
        "{:?}",
        asked.elapsed()
    );
    assert!(replica.submit(submit(vec![1], 10)).is_err());
}

#[tokio::test]
async fn a_dropped_replica_ends_its_requests() {
    let engine = Engine::start(&unix());
    let config = ListenerConfig {
        reattach_within: Duration::from_millis(200),
        ..Default::default()
    };
    let address = unix();
    let short = Engine::start_with(&address, info(), config);
    let replica = ready(&address, crate::support::config()).await;
    let mut stream = replica.submit(submit(vec![1], 10)).expect("taken");
    let key = short.submission().await.key;
    drop(replica);
    assert!(lost(&mut stream).await.contains("removed"));
    assert_eq!(short.command().await, Command::Cancel(key));
    drop(engine);
}

#[tokio::test]
async fn an_address_in_a_file_is_followed_to_where_the_engine_is_now() {
    let Address::Unix(path) = unix() else {
        panic!("a path")
    };
    let replica = Replica::start(Address::File(path.clone()), config());
    let write =
        |engine: &Engine| std::fs::write(&path, format!("{}\n", engine.address())).expect("write");
    let first = Engine::start(&tcp());
    write(&first);
    reach(&replica, ReplicaState::Ready).await;
    first.kill();
    std::fs::remove_file(&path).expect("remove");
    reach(&replica, ReplicaState::Lost).await;
    let second = Engine::start(&tcp());
    write(&second);
    reach(&replica, ReplicaState::Ready).await;
    let _stream = replica.submit(submit(vec![1], 10)).expect("taken");
    second.submission().await;
    std::fs::remove_file(&path).expect("remove");
}

#[tokio::test]
async fn garbage_instead_of_a_protocol_leaves_the_replica_connecting() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let address =
        scalellm_engine_link::Address::Tcp(listener.local_addr().expect("bound").to_string());
    let (met, mut meetings) = tokio::sync::mpsc::channel(1);
    let babbler = tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            // The test counts only the first few.
            let _ = met.try_send(());
            // The peer may hang up first.
            let _ = tokio::io::AsyncWriteExt::write_all(&mut socket, &[0xab; 4_096]).await;
        }
    });
    let replica = Replica::start(address, config());
    for _ in 0..6 {
        meetings.recv().await.expect("it tries again");
        assert_eq!(replica.state(), ReplicaState::Connecting);
    }
    replica.shutdown().await;
    assert_eq!(replica.state(), ReplicaState::Lost);
    babbler.abort();
}
