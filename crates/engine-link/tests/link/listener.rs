//! The listener by hand: sessions, fences, bounds.

use std::time::{Duration, Instant};

use scalellm_engine_link::proto::{self, FinishReason, RefusalCode, to_engine::Message};
use scalellm_engine_link::{Command, ListenerConfig};

use crate::proxy::Proxy;
use crate::raw::{Raw, good, request};
use crate::support::{EPOCH, Engine, info, tcp, unix};

#[tokio::test]
async fn the_first_frame_is_welcome_and_load_follows_by_itself() {
    let engine = Engine::start(&tcp());
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    let welcome = raw.welcome().await;
    assert_eq!((welcome.epoch, welcome.reattached), (EPOCH, false));
    let started = Instant::now();
    for _ in 0..3 {
        let frame = raw.frame().await;
        assert_eq!(frame.sequence, 0);
        assert_eq!(frame.load.expect("load").epoch, EPOCH);
    }
    assert!(
        started.elapsed() < Duration::from_millis(900),
        "{:?}",
        started.elapsed()
    );
    // Nobody polls here: the loop's age grows.
    assert!(raw.frame().await.load.expect("load").step_age_ms >= 400);
}

#[tokio::test]
async fn a_stream_must_begin_with_a_good_hello() {
    let engine = Engine::start(&tcp());
    let error = Raw::open(&engine.address(), Message::Submit(Box::new(good(1))))
        .await
        .err()
        .expect("refused");
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    for session_id in [String::new(), "x".repeat(65), "a\nb".into()] {
        let hello = proto::Hello {
            session_id,
            ..Default::default()
        };
        let error = Raw::open(&engine.address(), Message::Hello(hello))
            .await
            .err()
            .expect("refused");
        assert!(error.message().contains("1 to 64"), "{error}");
    }
}

#[tokio::test]
async fn a_session_lost_for_too_long_is_cancelled() {
    let reattach_within = Duration::from_millis(400);
    let config = ListenerConfig {
        reattach_within,
        ..Default::default()
    };
    let engine = Engine::start_with(&tcp(), info(), config);
    let proxy = Proxy::start(&engine.address()).await;
    let mut raw = Raw::connect(&proxy.address, "s", None).await;
    raw.welcome().await;
    raw.send(Message::Submit(Box::new(good(1)))).await;
    let key = engine.submission().await.key;
    proxy.cut();
    let since = Instant::now();
    assert_eq!(engine.command().await, Command::Cancel(key));
    assert!(since.elapsed() >= reattach_within, "{:?}", since.elapsed());
    assert!(
        since.elapsed() < reattach_within * 3,
        "{:?}",
        since.elapsed()
    );
    let mut late = Raw::connect(&engine.address(), "s", Some(0)).await;
    assert!(!late.welcome().await.reattached, "it is forgotten");
}

#[tokio::test]
async fn reattaching_brings_the_frames_after_the_last_one_seen() {
    let engine = Engine::start(&tcp());
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    raw.send(Message::Submit(Box::new(good(1)))).await;
    let key = engine.submission().await.key;
    for id in 1..=4 {
        engine.emit(key, &[id], FinishReason::Unspecified);
    }
    assert_eq!(raw.numbered().await.sequence, 1);
    drop(raw.receive);
    let mut again = Raw::connect(&engine.address(), "s", Some(2)).await;
    assert!(again.welcome().await.reattached);
    for sequence in 3..=4u32 {
        let frame = again.numbered().await;
        assert_eq!(frame.sequence, u64::from(sequence));
        assert_eq!(frame.outputs[0].token_ids, [sequence]);
    }
    // The request is known: sending it again starts nothing.
    again.send(Message::Submit(Box::new(good(1)))).await;
    assert_eq!(
        again.numbered().await.refusals[0].code(),
        RefusalCode::Duplicate
    );
    assert!(engine.handle.poll(Duration::ZERO).is_empty());
    // What was acknowledged by the reattachment is gone.
    let mut late = Raw::connect(&engine.address(), "s", Some(1)).await;
    assert!(!late.welcome().await.reattached);
    assert_eq!(engine.command().await, Command::Cancel(key));
}

#[tokio::test]
async fn a_later_attempt_fences_the_earlier_one() {
    let engine = Engine::start(&tcp());
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    raw.send(Message::Submit(Box::new(good(1)))).await;
    let first = engine.submission().await;
    raw.send(Message::Submit(Box::new(proto::Submit {
        request: request(1, 1),
        ..good(1)
    })))
    .await;
    let commands = engine.commands().await;
    let [Command::Cancel(cancelled), Command::Submit(second)] = commands.as_slice() else {
        panic!("{commands:?}")
    };
    assert_eq!(*cancelled, first.key);
    engine.emit(first.key, &[1], FinishReason::Unspecified);
    engine.emit(second.key, &[2], FinishReason::Unspecified);
    let frame = raw.numbered().await;
    assert_eq!(
        (frame.outputs[0].request, &frame.outputs[0].token_ids[..]),
        (request(1, 1), &[2][..])
    );
    raw.send(Message::Submit(Box::new(good(1)))).await;
    assert_eq!(
        raw.numbered().await.refusals[0].code(),
        RefusalCode::Duplicate,
        "the earlier one is over"
    );
}

#[tokio::test]
async fn a_cancel_is_answered_whether_the_request_is_known_or_not() {
    let engine = Engine::start(&tcp());
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    raw.send(Message::Cancel(proto::Cancel {
        request: request(5, 0),
    }))
    .await;
    let frame = raw.numbered().await;
    assert_eq!(frame.outputs[0].finish_reason(), FinishReason::Cancelled);
    raw.send(Message::Submit(Box::new(good(1)))).await;
    raw.send(Message::Cancel(proto::Cancel {
        request: request(1, 0),
    }))
    .await;
    let frame = raw.numbered().await;
    assert_eq!(frame.outputs[0].request, request(1, 0));
    assert!(
        engine.handle.poll(Duration::ZERO).is_empty(),
        "the loop never saw it"
    );
}

#[tokio::test]
async fn a_chunk_is_validated_as_it_comes() {
    let engine = Engine::start(&tcp());
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    let begun = |id| proto::Submit {
        prompt_tokens: 5,
        ..good(id)
    };
    let chunk = |id, prompt_ids| {
        Message::PromptChunk(proto::PromptChunk {
            request: request(id, 0),
            prompt_ids,
        })
    };
    raw.send(Message::Submit(Box::new(begun(1)))).await;
    raw.send(chunk(1, vec![4, 1_000])).await;
    let refusal = raw.numbered().await.refusals.remove(0);
    assert_eq!(
        (refusal.code(), refusal.field.as_str()),
        (RefusalCode::Invalid, "prompt_ids[1]")
    );
    raw.send(Message::Submit(Box::new(begun(2)))).await;
    raw.send(chunk(2, vec![4, 5, 6])).await;
    let refusal = raw.numbered().await.refusals.remove(0);
    assert!(
        refusal.message.contains("announced 5"),
        "{}",
        refusal.message
    );
    raw.send(Message::Submit(Box::new(begun(3)))).await;
    raw.send(chunk(9, vec![4])).await;
    raw.send(chunk(3, vec![4])).await;
    raw.send(chunk(3, vec![5])).await;
    assert_eq!(engine.submission().await.submit.prompt_ids, [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn beyond_its_bound_the_engine_is_full() {
    let config = ListenerConfig {
        max_waiting: 2,
        ..Default::default()
    };
    let engine = Engine::start_with(&tcp(), info(), config);
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    for id in 1..=7 {
        raw.send(Message::Submit(Box::new(good(id)))).await;
    }
    let refusal = raw.numbered().await.refusals.remove(0);
    assert_eq!(
        (refusal.code(), refusal.request),
        (RefusalCode::Full, request(7, 0))
    );
    assert!(refusal.message.contains('6'), "{}", refusal.message);
    let commands = engine.commands().await;
    assert_eq!(commands.len(), 6);
    let Command::Submit(first) = &commands[0] else {
        panic!("{commands:?}")
    };
    engine.emit(first.key, &[1], FinishReason::Eos);
    raw.numbered().await;
    raw.send(Message::Submit(Box::new(good(8)))).await;
    assert_eq!(engine.submission().await.submit.request, request(8, 0));
}

#[tokio::test]
async fn a_gateway_that_does_not_read_is_dropped_and_holds_up_nobody() {
    let config = ListenerConfig {
        max_retained_bytes: 1 << 20,
        ..Default::default()
    };
    let engine = Engine::start_with(&tcp(), info(), config);
    let mut slow = Raw::connect(&engine.address(), "slow", None).await;
    slow.welcome().await;
    let mut brisk = Raw::connect(&engine.address(), "brisk", None).await;
    brisk.welcome().await;
    let long = proto::Submit {
        max_tokens: 90_000,
        ..good(1)
    };
    slow.send(Message::Submit(Box::new(long))).await;
    let slow_key = engine.submission().await.key;
    brisk.send(Message::Submit(Box::new(good(1)))).await;
    let brisk_key = engine.submission().await.key;
    let started = Instant::now();
    let ids = vec![999; 10_000];
    for _ in 0..100 {
        engine.emit(slow_key, &ids, FinishReason::Unspecified);
    }
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "emit waited: {:?}",
        started.elapsed()
    );
    assert_eq!(engine.command().await, Command::Cancel(slow_key));
    engine.emit(brisk_key, &[3], FinishReason::Length);
    assert_eq!(brisk.numbered().await.outputs[0].token_ids, [3]);
    let error = loop {
        match slow.receive.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the end must be an error"),
            Err(status) => break status,
        }
    };
    assert_eq!(error.code(), tonic::Code::Aborted);
}

#[tokio::test]
async fn acknowledged_frames_do_not_count() {
    let config = ListenerConfig {
        max_retained_bytes: 10_000,
        ..Default::default()
    };
    let engine = Engine::start_with(&tcp(), info(), config);
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    raw.send(Message::Submit(Box::new(proto::Submit {
        max_tokens: 90_000,
        ..good(1)
    })))
    .await;
    let key = engine.submission().await.key;
    let mut sequence = 0;
    for _ in 0..50 {
        raw.send(Message::Ack(proto::Ack { sequence })).await;
        // Messages are taken in order: once this is answered, the Ack before it has been taken.
        raw.send(Message::Cancel(proto::Cancel {
            request: request(1_000, 0),
        }))
        .await;
        raw.numbered().await;
        engine.emit(key, &[999; 1_000], FinishReason::Unspecified);
        sequence = raw.numbered().await.sequence;
    }
    assert!(engine.handle.poll(Duration::ZERO).is_empty(), "still there");
}

#[tokio::test]
async fn closing_sends_what_was_emitted() {
    let address = unix();
    let engine = Engine::start(&address);
    let replica = crate::support::ready(&address, crate::support::config()).await;
    let mut stream = replica
        .submit(crate::support::submit(vec![1], 10))
        .expect("taken");
    let key = engine.submission().await.key;
    engine.emit(key, &[7], FinishReason::Eos);
    let closing = tokio::task::spawn_blocking(move || engine.close());
    let last = crate::support::soon("the last output", stream.next())
        .await
        .expect("some")
        .expect("no error");
    assert_eq!(last.token_ids, [7]);
    crate::support::soon("the close", closing)
        .await
        .expect("no panic");
    let scalellm_engine_link::Address::Unix(path) = address else {
        panic!("a path")
    };
    assert!(!path.exists());
}
