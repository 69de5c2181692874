//! Servers elsewhere that are down, refuse, or fail what they are asked: who gets requests then.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use scalellm_gateway::UpstreamConfig;
use tokio::net::TcpListener;
use tokio::sync::Notify;

use super::foreign::{DONE, HI, WHOLE, ask, gateway};
use super::support::{LONG, Reply, Stack, open, request};
use super::upstream::{Act, Mock, answer, before, chunk, json, last_chunk, stream_head, upstream};

/// An address where nobody listens.
async fn nobody_at() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

pub async fn nobody() -> UpstreamConfig {
    upstream(&format!("http://{}/v1", nobody_at().await))
}

#[tokio::test]
async fn one_that_refuses_at_once_does_not_draw_all_requests() {
    let refusing = Mock::start(|_| vec![answer("429 Too Many Requests", "", "{}")]).await;
    let good = Mock::start(|_| vec![json(WHOLE)]).await;
    let stack = gateway(vec![refusing.upstream(), good.upstream()]).await;
    let start = Instant::now();
    // More than retries are saved for.
    for _ in 0..60 {
        ask(&stack, "{}").await.ok();
    }
    // Once a second, to see whether it still refuses.
    let tried = refusing.seen().len();
    assert!(
        tried >= 1 && tried <= 1 + start.elapsed().as_secs() as usize,
        "{tried}"
    );
    assert_eq!(good.seen().len(), 60);
}

#[tokio::test]
async fn one_that_is_down_gets_no_requests() {
    let good = Mock::start(|_| vec![json(WHOLE)]).await;
    let stack = gateway(vec![nobody().await, good.upstream()]).await;
    for _ in 0..6 {
        assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
    }
    assert_eq!(stack.metric("scalellm_upstream_up", "").await, 1.0);
    assert_eq!(stack.metric("scalellm_retries_total", "").await, 1.0);
    assert_eq!(stack.get("/ready").await.status, 200);
    let stack = gateway(vec![nobody().await]).await;
    ask(&stack, "{}").await.error(502);
    let error = ask(&stack, "{}").await.error(503);
    assert_eq!(error["code"], "no_replica");
    assert!(!error.to_string().contains("127.0.0.1"), "{error}");
    assert_eq!(stack.get("/ready").await.status, 503);
}

#[tokio::test]
async fn health_is_asked_for_and_found_again() {
    let sick = Arc::new(AtomicUsize::new(1));
    let for_mock = Arc::clone(&sick);
    let mock = Mock::start(move |seen| match seen.head.starts_with("GET /v1/models ") {
        true if for_mock.load(Ordering::SeqCst) == 1 => vec![answer("500 Oh", "", "")],
        _ => vec![json(WHOLE)],
    })
    .await;
    let config = UpstreamConfig {
        health_path: "/models".to_owned(),
        health_interval_s: 0.02,
        ..mock.upstream()
    };
    let stack = gateway(vec![config]).await;
    stack.wait_metric("scalellm_upstream_up", "", 0.0).await;
    ask(&stack, "{}").await.error(503);
    sick.store(0, Ordering::SeqCst);
    stack.wait_metric("scalellm_upstream_up", "", 1.0).await;
    assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
}

/// A server whose page about its health is fine, and which fails requests while it is told to.
async fn failing() -> (Mock, Arc<AtomicBool>) {
    let fails = Arc::new(AtomicBool::new(true));
    let told = Arc::clone(&fails);
    let mock = Mock::start(move |seen| {
        let is_asked = seen.head.starts_with("POST ");
        match is_asked && told.load(Ordering::SeqCst) {
            // At once again, if it were for it.
            true => vec![answer("500 Oh", "retry-after: 0\r\n", "oh")],
            false => vec![json(WHOLE)],
        }
    })
    .await;
    (mock, fails)
}

/// A gateway whose breakers open after three failures, before `first`, which is asked for its health all the time,
/// and others.
async fn with_breakers(first: &Mock, others: Vec<UpstreamConfig>, open_s: f64) -> Stack {
    let first = UpstreamConfig {
        health_path: "/models".to_owned(),
        health_interval_s: 0.02,
        ..first.upstream()
    };
    Stack::start(Vec::new(), |config| {
        before([vec![first], others].concat())(config);
        config.faults.breaker_failures = 3;
        config.faults.breaker_open_s = open_s;
        config.faults.breaker_probes = 1;
    })
    .await
}

fn fallback(mock: &Mock) -> UpstreamConfig {
    UpstreamConfig {
        fallback: true,
        ..mock.upstream()
    }
}

const OPEN: &str = "scalellm_upstream_breaker_open";

#[tokio::test]
async fn one_that_fails_its_requests_gets_none_though_its_health_is_fine() {
    let (bad, _) = failing().await;
    let good = Mock::start(|_| vec![json(WHOLE)]).await;
    let stack = with_breakers(&bad, vec![fallback(&good)], 600.0).await;
    for _ in 0..8 {
        assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
    }
    assert_eq!(bad.seen().len(), 3);
    assert_eq!(good.seen().len(), 8);
    // Its health's page, asked meanwhile, says nothing of its requests.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
    assert_eq!(bad.seen().len(), 3);
    assert_eq!(stack.metric(OPEN, &bad.address.to_string()).await, 1.0);
    assert_eq!(stack.metric(OPEN, &good.address.to_string()).await, 0.0);
    let opened = stack.metric("scalellm_upstream_breakers_opened_total", "");
    assert_eq!(opened.await, 1.0);
    let listed = stack.get("/admin/v1/replicas").await.ok();
    assert_eq!(listed["models"][0]["upstreams"][0]["breaker_open"], true);
    assert_eq!(listed["models"][0]["upstreams"][0]["state"], "up");
}

#[tokio::test]
async fn one_request_tries_it_and_closes_its_breaker_when_it_is_well() {
    let (bad, fails) = failing().await;
    let good = Mock::start(|_| vec![json(WHOLE)]).await;
    let stack = with_breakers(&bad, vec![fallback(&good)], 0.05).await;
    let opened = "scalellm_upstream_breakers_opened_total";
    let start = Instant::now();
    // A try that fails opens it again.
    while stack.metric(opened, "").await < 2.0 {
        assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
        assert!(start.elapsed() < LONG);
    }
    assert_eq!(bad.seen().len(), 4);
    fails.store(false, Ordering::SeqCst);
    while stack.metric(OPEN, "").await > 0.0 {
        assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
        assert!(start.elapsed() < LONG);
    }
    assert_eq!(bad.seen().len(), 5);
    let before = good.seen().len();
    assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
    assert_eq!((bad.seen().len(), good.seen().len()), (6, before));
}

#[tokio::test]
async fn a_breaker_does_not_close_the_shop() {
    let (bad, fails) = failing().await;
    let stack = with_breakers(&bad, Vec::new(), 600.0).await;
    for _ in 0..5 {
        ask(&stack, "{}").await.error(502);
    }
    assert_eq!(stack.metric(OPEN, "").await, 1.0);
    fails.store(false, Ordering::SeqCst);
    assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
}

#[tokio::test]
async fn what_a_client_did_wrong_opens_no_breaker() {
    let strict = Mock::start(|_| vec![answer("422 Unprocessable", "", "{}")]).await;
    let stack = with_breakers(&strict, Vec::new(), 600.0).await;
    for _ in 0..8 {
        assert_eq!(ask(&stack, "{}").await.status, 422);
    }
    assert_eq!(stack.metric(OPEN, "").await, 0.0);
}

#[tokio::test]
async fn who_has_too_much_to_do_for_now_is_not_broken() {
    let busy = Mock::start(|_| vec![answer("503 Busy", "retry-after: 0\r\n", "{}")]).await;
    let stack = with_breakers(&busy, Vec::new(), 600.0).await;
    for _ in 0..8 {
        ask(&stack, "{}").await.error(503);
    }
    assert_eq!(stack.metric(OPEN, "").await, 0.0);
}

#[tokio::test]
async fn one_that_nobody_asks_is_back_with_its_first_word() {
    let gate = Arc::new(Notify::new());
    let wait = Arc::clone(&gate);
    // A listener that takes nobody, then the server at the same address.
    let address = nobody_at().await;
    let stack = gateway(vec![upstream(&format!("http://{address}/v1"))]).await;
    ask(&stack, "{}").await.error(502);
    ask(&stack, "{}").await.error(503);
    let mock = Mock::at(address, move |seen| match seen.body.contains("long") {
        true => vec![
            stream_head(),
            chunk(HI),
            Act::Wait(Arc::clone(&wait)),
            chunk(DONE),
            last_chunk(),
        ],
        false => vec![json(WHOLE)],
    })
    .await;
    // It is tried after some seconds, by one request.
    let start = Instant::now();
    let body = Bytes::from(r#"{"stream":true,"user":"long"}"#);
    let (response, _connection) = loop {
        let asked = request("POST", "/v1/chat/completions", &[], body.clone());
        let (response, connection) = open(stack.address(), asked).await;
        if response.status() == 200 {
            break (response, connection);
        }
        assert!(start.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    // While its answer still runs, others get theirs.
    assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
    gate.notify_one();
    assert_eq!(Reply::read(response).await.text(), [HI, DONE].concat());
    assert_eq!(mock.seen().len(), 2);
}
