use scalellm_engine_link::proto::control_request::Action;
use scalellm_engine_link::proto::engine_client::EngineClient;
use scalellm_engine_link::proto::{
    self, Calibrate, CalibrationShape, ControlRequest, ControlResponse, Drain, FinishReason,
    RefusalCode, Stop, to_engine::Message,
};
use scalellm_engine_link::{Command, EngineHandle, ListenerConfig, ReplicaState};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::raw::{Raw, channel, good};
use crate::support::{Engine, config, info, reach, ready, soon, submit, tcp, unix};

async fn control(engine: &Engine, action: Action) -> ControlResponse {
    let mut client = EngineClient::new(channel(&engine.address()).await);
    let request = ControlRequest {
        action: Some(action),
    };
    soon("control", client.control(request))
        .await
        .expect("an answer")
        .into_inner()
}

async fn health(engine: &Engine, service: &str) -> ServingStatus {
    let mut client = HealthClient::new(channel(&engine.address()).await);
    let request = HealthCheckRequest {
        service: service.into(),
    };
    client
        .check(request)
        .await
        .expect("an answer")
        .into_inner()
        .status()
}

#[tokio::test]
async fn a_draining_engine_finishes_what_it_has_and_takes_nothing_new() {
    let engine = Engine::start(&tcp());
    let service = "scalellm.engine.v1.Engine";
    assert_eq!(health(&engine, service).await, ServingStatus::Serving);
    let replica = ready(&engine.address(), config()).await;
    let mut raw = Raw::connect(&engine.address(), "raw", None).await;
    raw.welcome().await;
    let mut running = replica.submit(submit(vec![1], 10)).expect("taken");
    let key = engine.submission().await.key;
    assert!(control(&engine, Action::Drain(Drain {})).await.accepted);
    assert_eq!(engine.command().await, Command::Drain);
    reach(&replica, ReplicaState::Draining).await;
    assert!(replica.submit(submit(vec![1], 10)).is_err());
    raw.send(Message::Submit(Box::new(good(1)))).await;
    assert_eq!(
        raw.numbered().await.refusals[0].code(),
        RefusalCode::Draining
    );
    engine.emit(key, &[5], FinishReason::Eos);
    assert_eq!(
        soon("the end", running.next())
            .await
            .expect("some")
            .expect("ok")
            .token_ids,
        [5]
    );
    reach_health(&engine, service, ServingStatus::NotServing).await;
    // A second Drain changes nothing.
    assert!(control(&engine, Action::Drain(Drain {})).await.accepted);
    assert!(engine.handle.poll(std::time::Duration::ZERO).is_empty());
}

async fn reach_health(engine: &Engine, service: &str, status: ServingStatus) {
    soon("health", async {
        while health(engine, service).await != status {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_loops_health_is_what_the_loop_does_and_not_the_listener() {
    let config = ListenerConfig {
        hung_after: std::time::Duration::from_millis(50),
        ..Default::default()
    };
    let engine = Engine::start_with(&tcp(), info(), config);
    // It listens, and its loop has not come round yet.
    reach_health(&engine, "loop", ServingStatus::NotServing).await;
    let waits = |handle: EngineHandle| {
        tokio::task::spawn_blocking(move || handle.poll(std::time::Duration::from_secs(10)))
    };
    let poll = waits(engine.handle.clone());
    reach_health(&engine, "loop", ServingStatus::Serving).await;
    assert!(control(&engine, Action::Drain(Drain {})).await.accepted);
    soon("the poll", poll).await.expect("no panic");
    // Now nobody polls: it hangs. That it drains is another matter.
    reach_health(&engine, "loop", ServingStatus::NotServing).await;
    let poll = waits(engine.handle.clone());
    reach_health(&engine, "loop", ServingStatus::Serving).await;
    reach_health(&engine, "", ServingStatus::NotServing).await;
    assert!(control(&engine, Action::Stop(Stop {})).await.accepted);
    soon("the poll", poll).await.expect("no panic");
}

#[tokio::test]
async fn stop_reaches_the_loop() {
    let engine = Engine::start(&tcp());
    assert!(control(&engine, Action::Stop(Stop {})).await.accepted);
    let mut commands = engine.commands().await;
    if commands.len() == 1 {
        commands.extend(engine.commands().await);
    }
    assert_eq!(commands, [Command::Drain, Command::Stop]);
}

#[tokio::test]
async fn calibration_is_for_idle_engines_and_shapes_within_limits() {
    let engine = Engine::start(&tcp());
    let shape = CalibrationShape {
        decode_seqs: 4,
        context_tokens: 100,
        prefill_tokens: 0,
    };
    let handle = engine.handle.clone();
    let answering = tokio::spawn(async move {
        let commands = crate::support::commands(&handle).await;
        let [Command::Calibrate { ticket, shapes }] = commands.as_slice() else {
            panic!("{commands:?}")
        };
        handle.answer_calibrate(*ticket + 1, vec![9.0]);
        handle.answer_calibrate(*ticket, vec![1.5; shapes.len()]);
    });
    let response = control(
        &engine,
        Action::Calibrate(Calibrate {
            shapes: vec![shape; 2],
        }),
    )
    .await;
    assert_eq!(
        (response.accepted, response.step_ms),
        (true, vec![1.5, 1.5])
    );
    answering.await.expect("no panic");
    for (shapes, complaint) in [
        (vec![], "1 to 64"),
        (vec![shape; 65], "1 to 64"),
        (
            vec![CalibrationShape {
                decode_seqs: 5,
                ..shape
            }],
            "shapes[0].decode_seqs is 5; allowed is 0 to 4",
        ),
        (
            vec![
                shape,
                CalibrationShape {
                    prefill_tokens: 100_001,
                    ..shape
                },
            ],
            "shapes[1].prefill_tokens",
        ),
    ] {
        let response = control(&engine, Action::Calibrate(Calibrate { shapes })).await;
        assert!(
            !response.accepted && response.message.contains(complaint),
            "{}",
            response.message
        );
    }
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    raw.send(Message::Submit(Box::new(good(1)))).await;
    engine.submission().await;
    let response = control(
        &engine,
        Action::Calibrate(Calibrate {
            shapes: vec![shape],
        }),
    )
    .await;
    assert!(
        !response.accepted && response.message.contains("idle"),
        "{}",
        response.message
    );
}

#[tokio::test]
async fn control_without_an_action_is_an_error() {
    let engine = Engine::start(&tcp());
    let mut client = EngineClient::new(channel(&engine.address()).await);
    let error = client
        .control(ControlRequest { action: None })
        .await
        .expect_err("refused");
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    let described = client
        .describe(proto::DescribeRequest {})
        .await
        .expect("described")
        .into_inner();
    assert_eq!(described, crate::support::info());
}

#[tokio::test]
async fn the_last_steps_are_told_to_whoever_asks() {
    let kept = ListenerConfig {
        kept_steps: 3,
        ..ListenerConfig::default()
    };
    let engine = Engine::start_with(&unix(), info(), kept);
    let replica = ready(&engine.address(), config()).await;
    let noted = |number: u64| proto::StepTimes {
        number,
        started_us: number * 10,
        requests: 2,
        tokens: 3,
        phases: vec![proto::PhaseTime {
            name: "forward".to_owned(),
            us: 9,
        }],
        expert_use: None,
    };
    for number in 1..=5 {
        engine.handle.note_step(noted(number));
    }
    let steps = soon("steps", replica.steps(0)).await.expect("told");
    assert_eq!(steps, [noted(3), noted(4), noted(5)]);
    let steps = soon("steps", replica.steps(40)).await.expect("told");
    assert_eq!(steps, [noted(5)]);
    engine.kill();
    assert!(soon("steps", replica.steps(0)).await.is_err());
}
