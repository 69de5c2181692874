//! The fake engine keeps its settings' promises, seen through a gateway's client.

use std::sync::Arc;
use std::time::{Duration, Instant};

use scalellm_engine_link::proto::{self, FinishReason, RefusalCode, Submit};
use scalellm_engine_link::{
    Address, Replica, ReplicaConfig, ReplicaState, RequestStream, StreamError,
};
use scalellm_fake_engine::{FakeEngine, Faults, Garbage, LoadNumbers, Output, Refuse, Settings};

fn start(settings: Settings) -> FakeEngine {
    FakeEngine::start(&Address::Tcp("127.0.0.1:0".into()), settings).expect("a free port")
}

async fn reach(replica: &Replica, state: ReplicaState) {
    let mut changed = replica.changed();
    let reached = async {
        while replica.state() != state {
            changed.changed().await.expect("the replica lives");
        }
    };
    tokio::time::timeout(Duration::from_secs(10), reached)
        .await
        .expect("the state is reached");
}

async fn connect(engine: &FakeEngine) -> Arc<Replica> {
    let replica = Replica::start(engine.address().clone(), ReplicaConfig::default());
    reach(&replica, ReplicaState::Ready).await;
    replica
}

fn submit(max_tokens: u32) -> Submit {
    Submit {
        prompt_ids: vec![10, 11, 12],
        max_tokens,
        ..Default::default()
    }
}

async fn next(stream: &mut RequestStream) -> Option<Result<proto::Output, StreamError>> {
    tokio::time::timeout(Duration::from_secs(10), stream.next())
        .await
        .expect("something comes")
}

/// All ids and the last output.
async fn finish(mut stream: RequestStream) -> (Vec<u32>, proto::Output) {
    let (mut ids, mut last) = (Vec::new(), proto::Output::default());
    while let Some(output) = next(&mut stream).await {
        let output = output.expect("no error");
        ids.extend(&output.token_ids);
        last = output;
    }
    (ids, last)
}

async fn ids(settings: Settings, submit: Submit) -> (Vec<u32>, FinishReason) {
    let engine = start(settings);
    let replica = connect(&engine).await;
    let (ids, last) = finish(replica.submit(submit).expect("taken")).await;
    (ids, last.finish_reason())
}

#[tokio::test]
async fn each_output_kind_gives_its_ids() {
    for (output, expected) in [
        (Output::Echo, vec![10, 11, 12, 10, 11]),
        (Output::Fixed { ids: vec![7, 8] }, vec![7, 8, 7, 8, 7]),
        (
            Output::CountUp { from: 31_998 },
            vec![31_998, 31_999, 0, 1, 2],
        ),
    ] {
        let settings = Settings {
            output,
            ..Settings::default()
        };
        assert_eq!(
            ids(settings, submit(5)).await,
            (expected, FinishReason::Length)
        );
    }
}

#[tokio::test]
async fn noise_is_a_function_of_seed_choice_and_index_so_a_replay_goes_on() {
    let settings = || Settings {
        output: Output::Noise,
        ..Settings::default()
    };
    let request = |seed, choice, resume_ids| Submit {
        sampling: Some(proto::Sampling {
            seed,
            ..Default::default()
        }),
        choice,
        resume_ids,
        ..submit(20)
    };
    let (whole, _) = ids(settings(), request(5, 1, vec![])).await;
    let (rest, _) = ids(settings(), request(5, 1, whole[..8].to_vec())).await;
    assert_eq!(rest, whole[8..]);
    assert_ne!(ids(settings(), request(6, 1, vec![])).await.0, whole);
    assert_ne!(ids(settings(), request(5, 2, vec![])).await.0, whole);
}

#[tokio::test]
async fn requests_end_for_the_right_reason() {
    let eos = || Settings {
        eos_after: Some(3),
        ..Settings::default()
    };
    assert_eq!(
        ids(eos(), submit(10)).await,
        (vec![1, 2, 3, 0], FinishReason::Eos)
    );
    let ignoring = Submit {
        ignore_eos: true,
        ..submit(6)
    };
    assert_eq!(
        ids(eos(), ignoring).await,
        ((1..=6).collect(), FinishReason::Length)
    );
    let stop = Submit {
        stop_token_ids: vec![2, 4],
        min_tokens: 3,
        ..submit(10)
    };
    assert_eq!(
        ids(Settings::default(), stop).await,
        (vec![1, 2, 3, 4], FinishReason::StopToken)
    );
    let forced = Settings {
        max_tokens: Some(2),
        ..Settings::default()
    };
    assert_eq!(
        ids(forced, submit(10)).await,
        (vec![1, 2], FinishReason::Length)
    );
    let faults = Faults {
        error_after: Some(2),
        ..Faults::default()
    };
    let failing = Settings {
        faults,
        ..Settings::default()
    };
    assert_eq!(
        ids(failing, submit(10)).await,
        (vec![1, 2], FinishReason::Error)
    );
    let slow = Settings {
        ttft_ms: 50.0,
        ..Settings::default()
    };
    let hurried = Submit {
        deadline_ms: Some(10),
        ..submit(10)
    };
    assert_eq!(ids(slow, hurried).await, (vec![], FinishReason::Deadline));
}

#[tokio::test]
async fn logprobs_times_and_cached_tokens_come_when_asked_for() {
    let engine = start(Settings {
        cached_tokens: 2,
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    let sampling = proto::Sampling {
        logprobs: Some(2),
        ..Default::default()
    };
    let asked = Submit {
        sampling: Some(sampling),
        prompt_logprobs: Some(1),
        ..submit(1)
    };
    let (_, last) = finish(replica.submit(asked).expect("taken")).await;
    assert_eq!(
        (last.logprobs.len(), last.logprobs[0].top_ids.len()),
        (1, 2)
    );
    assert_eq!(
        (last.prompt_logprobs.len(), last.prompt_logprobs[1].token_id),
        (3, 11)
    );
    assert_eq!(last.cached_tokens, 2);
    let times = last.times.expect("in the last output");
    let order = [
        times.received_us,
        times.queued_us,
        times.first_token_us,
        times.finished_us,
    ];
    assert!(order.is_sorted() && order[0] > 0, "{order:?}");
}

#[tokio::test]
async fn outputs_come_at_their_times() {
    let engine = start(Settings {
        ttft_ms: 100.0,
        tbt_ms: 20.0,
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    let sent = Instant::now();
    let mut streams: Vec<_> = (0..64)
        .map(|_| replica.submit(submit(11)).expect("taken"))
        .collect();
    let mut first = Vec::new();
    for stream in &mut streams {
        assert!(next(stream).await.is_some());
        first.push(sent.elapsed());
    }
    assert!(first[0] >= Duration::from_millis(100), "{:?}", first[0]);
    for stream in streams {
        finish(stream).await;
    }
    // Due times are absolute, so lateness never adds up; only the machine can be late.
    let whole = sent.elapsed();
    assert!(whole >= Duration::from_millis(299), "{whole:?}");
    assert!(whole < Duration::from_millis(600), "{whole:?}");
}

#[tokio::test]
async fn requests_beyond_max_num_seqs_wait_and_show_in_the_load() {
    let engine = start(Settings {
        ttft_ms: 400.0,
        max_num_seqs: 2,
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    let streams: Vec<_> = (0..5)
        .map(|_| replica.submit(submit(1)).expect("taken"))
        .collect();
    tokio::time::timeout(Duration::from_secs(5), async {
        while (replica.load().running, replica.load().waiting) != (2, 3) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the load shows it");
    drop(streams);
    tokio::time::timeout(Duration::from_secs(5), async {
        while (replica.load().running, replica.load().kv_blocks_used) != (0, 0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("cancelled requests leave");
}

#[tokio::test]
async fn load_numbers_can_be_set() {
    let load = LoadNumbers {
        running: Some(9),
        backlog_tokens: Some(1_234),
        ..LoadNumbers::default()
    };
    let engine = start(Settings {
        load,
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    finish(replica.submit(submit(1)).expect("taken")).await;
    assert_eq!(
        (replica.load().running, replica.load().backlog_tokens),
        (9, 1_234)
    );
    assert_eq!(replica.info().expect("described").epoch, engine.epoch());
}

#[tokio::test]
async fn refusals_come_although_the_load_looks_well() {
    for (refuse, code) in [
        (Refuse::Full, RefusalCode::Full),
        (Refuse::Draining, RefusalCode::Draining),
    ] {
        let faults = Faults {
            refuse: Some(refuse),
            ..Faults::default()
        };
        let engine = start(Settings {
            faults,
            ..Settings::default()
        });
        let replica = connect(&engine).await;
        match next(&mut replica.submit(submit(1)).expect("taken")).await {
            Some(Err(StreamError::Refused(refusal))) => assert_eq!(refusal.code(), code),
            other => panic!("{other:?}"),
        }
        assert_eq!(replica.state(), ReplicaState::Ready);
    }
}

#[tokio::test]
async fn it_dies_after_so_many_outputs() {
    let faults = Faults {
        die_after_outputs: Some(3),
        ..Faults::default()
    };
    let engine = start(Settings {
        faults,
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    let mut stream = replica.submit(submit(10)).expect("taken");
    let error = loop {
        match next(&mut stream).await.expect("an error comes first") {
            Ok(output) => assert!(output.token_ids.iter().all(|&id| id <= 3)),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StreamError::Lost { .. }), "{error}");
    reach(&replica, ReplicaState::Lost).await;
    tokio::time::timeout(Duration::from_secs(5), async {
        while !engine.is_over() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("its thread ends");
}

#[tokio::test]
async fn a_hang_is_seen_by_its_age_and_ends_when_told_so() {
    let faults = Faults {
        hang_after_steps: Some(1),
        hang_ms: Some(700),
        ..Faults::default()
    };
    let engine = start(Settings {
        faults,
        tbt_ms: 5.0,
        ..Settings::default()
    });
    let config = ReplicaConfig {
        hung_after: Duration::from_millis(200),
        ..ReplicaConfig::default()
    };
    let replica = Replica::start(engine.address().clone(), config);
    reach(&replica, ReplicaState::Ready).await;
    let mut stream = replica.submit(submit(10)).expect("taken");
    assert_eq!(
        next(&mut stream)
            .await
            .expect("one step")
            .expect("no error")
            .token_ids,
        [1]
    );
    let error = next(&mut stream)
        .await
        .expect("an end")
        .expect_err("an error");
    assert!(error.to_string().contains("has not come round"), "{error}");
    reach(&replica, ReplicaState::Ready).await;
}

#[tokio::test]
async fn garbage_breaks_nothing_but_its_requests() {
    let garbage = |kind| Faults {
        garbage: Some(kind),
        ..Faults::default()
    };
    let engine = start(Settings {
        faults: garbage(Garbage::TooManyIds),
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    for _ in 0..3 {
        let error = next(&mut replica.submit(submit(2)).expect("taken"))
            .await
            .expect("an end")
            .expect_err("an error");
        assert!(
            error.to_string().contains("more ids than max_tokens"),
            "{error}"
        );
        assert_eq!(
            (replica.state(), replica.in_flight()),
            (ReplicaState::Ready, 0)
        );
    }
    let engine = start(Settings {
        faults: garbage(Garbage::Ids),
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    let (ids, _) = finish(replica.submit(submit(2)).expect("taken")).await;
    assert_eq!(ids, [u32::MAX; 2]);
    let engine = start(Settings {
        faults: garbage(Garbage::Bytes),
        ..Settings::default()
    });
    let replica = Replica::start(engine.address().clone(), ReplicaConfig::default());
    let mut changed = replica.changed();
    let ready = async {
        while replica.state() != ReplicaState::Ready {
            changed.changed().await.expect("the replica lives");
        }
    };
    let waited = tokio::time::timeout(Duration::from_millis(500), ready).await;
    assert!(waited.is_err(), "garbage passed for an engine");
}

#[tokio::test]
async fn wrong_settings_and_taken_addresses_are_errors() {
    let engine = start(Settings::default());
    let taken = FakeEngine::start(engine.address(), Settings::default())
        .err()
        .expect("taken");
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    let wrong = Settings {
        tbt_ms: f64::NAN,
        ..Settings::default()
    };
    let error = FakeEngine::start(engine.address(), wrong)
        .err()
        .expect("refused");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    engine.stop();
}

#[tokio::test]
async fn prompts_are_computed_one_after_the_other_and_remembered() {
    let engine = start(Settings {
        prefill_ms_per_token: 2.0,
        block_size: 4,
        prefix_cache: true,
        ..Settings::default()
    });
    let replica = connect(&engine).await;
    let prompt = |first: u32| Submit {
        prompt_ids: (first..first + 20).collect(),
        ..submit(3)
    };
    let took_us = |output: proto::Output| {
        let times = output.times.expect("times");
        times.first_token_us - times.queued_us
    };
    let both = [
        replica.submit(prompt(100)).expect("submitted"),
        replica.submit(prompt(200)).expect("submitted"),
    ];
    let mut ends = Vec::new();
    for stream in both {
        ends.push(finish(stream).await.1);
    }
    assert!(ends.iter().all(|end| took_us(end.clone()) >= 40_000));
    assert!(ends.iter().any(|end| took_us(end.clone()) >= 75_000));
    let mut again = replica.submit(prompt(100)).expect("submitted");
    let first = next(&mut again).await.expect("one").expect("an output");
    assert_eq!(
        first.cached_tokens, 19,
        "all but one of the prompt's tokens"
    );
    let load = replica.load();
    let token_ms = load.step_cost.expect("a cost").token_ms;
    assert!((token_ms - 2.0).abs() < 1e-6);
    replica.shutdown().await;
}
