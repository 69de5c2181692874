use std::time::Duration;

use scalellm_engine_link::proto::{self, FinishReason};
use scalellm_engine_link::{Command, ReplicaConfig, ReplicaState, SubmitError};

use crate::support::{Engine, commands, config, reach, ready, soon, step, submit, unix};

#[tokio::test]
async fn outputs_arrive_in_order_and_end() {
    let engine = Engine::start(&unix());
    let replica = ready(&engine.address(), config()).await;
    assert_eq!(replica.info().expect("described").model, "test");
    let mut stream = replica.submit(submit(vec![5, 6], 4)).expect("taken");
    assert_eq!((replica.in_flight(), replica.in_flight_tokens()), (1, 2));
    let submission = engine.submission().await;
    assert_eq!(submission.submit.prompt_ids, [5, 6]);
    assert!(submission.received_us > 1_600_000_000_000_000);
    let mut ids = Vec::new();
    for id in 1..=3 {
        engine.emit(submission.key, &[id], FinishReason::Unspecified);
        ids.extend(
            soon("an output", stream.next())
                .await
                .expect("an output")
                .expect("no error")
                .token_ids,
        );
        assert_eq!((replica.in_flight(), replica.in_flight_tokens()), (1, 0));
    }
    engine.emit(submission.key, &[4], FinishReason::Length);
    let last = soon("the end", stream.next())
        .await
        .expect("an output")
        .expect("no error");
    ids.extend(&last.token_ids);
    assert_eq!(ids, [1, 2, 3, 4]);
    assert_eq!(last.finish_reason(), FinishReason::Length);
    assert!(stream.next().await.is_none());
    assert_eq!(replica.in_flight(), 0);
}

#[tokio::test]
async fn a_long_prompt_arrives_whole() {
    let engine = Engine::start(&unix());
    let replica = ready(
        &engine.address(),
        ReplicaConfig {
            chunk_ids: 1_000,
            ..config()
        },
    )
    .await;
    let prompt: Vec<u32> = (0..50_001).map(|i| i % 1_000).collect();
    let _stream = replica.submit(submit(prompt.clone(), 4)).expect("taken");
    assert_eq!(engine.submission().await.submit.prompt_ids, prompt);
}

#[tokio::test]
async fn every_field_of_a_submit_is_carried() {
    let engine = Engine::start(&unix());
    let replica = ready(&engine.address(), config()).await;
    let sent = proto::Submit {
        request: Some(proto::RequestRef { id: 0, attempt: 3 }),
        trace_id: "trace".into(),
        prompt_tokens: 0,
        prompt_ids: vec![1, 2],
        resume_ids: vec![7, 8, 9],
        sampling: Some(proto::Sampling {
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(40),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(-1.0),
            frequency_penalty: Some(2.0),
            logit_bias: vec![proto::LogitBias {
                token_id: 4,
                bias: -100.0,
            }],
            seed: u64::MAX,
            logprobs: Some(0),
        }),
        max_tokens: 10,
        min_tokens: 5,
        stop_token_ids: vec![3],
        ignore_eos: true,
        priority: -5,
        deadline_ms: Some(1_500),
        arrival_us: 123,
        choice: 2,
        cache_salt: b"tenant".to_vec(),
        prompt_logprobs: Some(20),
    };
    let _stream = replica.submit(sent.clone()).expect("taken");
    let got = engine.submission().await;
    assert_eq!(got.deadline_us, Some(got.received_us + 1_500_000));
    let named = proto::Submit {
        request: got.submit.request,
        prompt_tokens: 2,
        ..sent
    };
    assert_eq!(got.submit, named);
    assert_eq!(got.submit.request.expect("named").attempt, 3);
}

#[tokio::test]
async fn outputs_carry_all_their_fields_and_the_time_of_receipt() {
    let engine = Engine::start(&unix());
    let replica = ready(&engine.address(), config()).await;
    let mut stream = replica.submit(submit(vec![1, 2], 4)).expect("taken");
    let submission = engine.submission().await;
    let logprob = proto::TokenLogprobs {
        token_id: 4,
        logprob: -0.5,
        rank: 1,
        top_ids: vec![4, 5],
        top_logprobs: vec![-0.5, -1.0],
    };
    let mut sent = step(submission.key, &[4], FinishReason::StopToken);
    sent.output.logprobs = vec![logprob.clone()];
    sent.output.prompt_logprobs = vec![proto::TokenLogprobs::default(), logprob];
    sent.output.cached_tokens = 1;
    sent.output.stop_token_id = 4;
    sent.output.times = Some(proto::StageTimes {
        queued_us: 2,
        steps: 9,
        ..Default::default()
    });
    engine.handle.emit(
        vec![sent.clone()],
        proto::Load {
            running: 3,
            ..Default::default()
        },
    );
    let got = soon("an output", stream.next())
        .await
        .expect("an output")
        .expect("no error");
    let mut expected = sent.output;
    expected.request = got.request;
    if let (Some(times), Some(told)) = (&mut expected.times, &got.times) {
        times.received_us = submission.received_us;
        assert!(told.emitted_us >= submission.received_us);
        times.emitted_us = told.emitted_us;
    }
    assert_eq!(got, expected);
    assert_eq!(replica.load().running, 3);
}

#[tokio::test]
async fn dropping_a_stream_cancels_its_request_in_the_engine() {
    let engine = Engine::start(&unix());
    let replica = ready(&engine.address(), config()).await;
    let stream = replica.submit(submit(vec![1], 4)).expect("taken");
    let key = engine.submission().await.key;
    drop(stream);
    assert_eq!((replica.in_flight(), replica.in_flight_tokens()), (0, 0));
    assert_eq!(engine.command().await, Command::Cancel(key));
    // Too late: nobody is there for it, and nobody is disturbed.
    engine.emit(key, &[1], FinishReason::Length);
    let mut next = replica.submit(submit(vec![2], 4)).expect("taken");
    let key = engine.submission().await.key;
    engine.emit(key, &[9], FinishReason::Eos);
    assert_eq!(
        soon("an output", next.next())
            .await
            .expect("some")
            .expect("ok")
            .token_ids,
        [9]
    );
}

#[tokio::test]
async fn a_reader_that_lags_gets_the_steps_merged() {
    let engine = Engine::start(&unix());
    let replica = ready(&engine.address(), config()).await;
    let mut slow = replica.submit(submit(vec![1], 3_000)).expect("taken");
    let slow_key = engine.submission().await.key;
    let mut other = replica.submit(submit(vec![1], 4)).expect("taken");
    let other_key = engine.submission().await.key;
    for id in 0..1_000 {
        engine.emit(slow_key, &[id], FinishReason::Unspecified);
    }
    // Frames are in order, so once the other's has come all of them have.
    engine.emit(other_key, &[7], FinishReason::Length);
    assert_eq!(
        soon("the other", other.next())
            .await
            .expect("some")
            .expect("ok")
            .token_ids,
        [7]
    );
    let merged = soon("an output", slow.next())
        .await
        .expect("some")
        .expect("ok");
    assert_eq!(merged.token_ids, (0..1_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn many_requests_share_two_sessions() {
    let engine = Engine::start(&unix());
    let replica = ready(
        &engine.address(),
        ReplicaConfig {
            sessions: 2,
            ..config()
        },
    )
    .await;
    let handle = engine.handle.clone();
    let work = tokio::spawn(async move {
        let mut running: Vec<(u64, u32, u32)> = Vec::new();
        let mut accepted = 0;
        while accepted < 256 || !running.is_empty() {
            for command in handle.poll(Duration::ZERO) {
                let Command::Submit(submission) = command else {
                    panic!("{command:?}")
                };
                accepted += 1;
                running.push((submission.key, submission.submit.prompt_ids[0], 0));
            }
            let mut outputs = Vec::new();
            running.retain_mut(|(key, base, given)| {
                *given += 1;
                let reason = if *given == 20 {
                    FinishReason::Length
                } else {
                    FinishReason::Unspecified
                };
                outputs.push(step(*key, &[*base + *given], reason));
                *given < 20
            });
            handle.emit(outputs, proto::Load::default());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut readers = tokio::task::JoinSet::new();
    for base in 0..256 {
        let mut stream = replica.submit(submit(vec![base], 20)).expect("taken");
        readers.spawn(async move {
            let mut ids = Vec::new();
            while let Some(output) = stream.next().await {
                ids.extend(output.expect("no error").token_ids);
            }
            assert_eq!(ids, (base + 1..=base + 20).collect::<Vec<_>>());
        });
    }
    soon("all readers", async {
        while let Some(done) = readers.join_next().await {
            done.expect("right ids")
        }
    })
    .await;
    soon("the loop", work).await.expect("no panic");
    assert_eq!((replica.in_flight(), replica.in_flight_tokens()), (0, 0));
}

#[tokio::test]
async fn a_replica_that_is_not_there_takes_nothing_until_it_is() {
    let address = unix();
    let replica = scalellm_engine_link::Replica::start(address.clone(), config());
    assert_eq!(
        replica.submit(submit(vec![1], 1)).map(|_| ()),
        Err(SubmitError::NotReady)
    );
    assert_eq!(replica.state(), ReplicaState::Connecting);
    let engine = Engine::start(&address);
    reach(&replica, ReplicaState::Ready).await;
    let _stream = replica.submit(submit(vec![1], 1)).expect("taken");
    assert_eq!(commands(&engine.handle).await.len(), 1);
}
