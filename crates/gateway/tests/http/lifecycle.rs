//! Clients that leave, limits that fill, and the gateway's own end.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use scalellm_fake_engine::Settings;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{
    Connection, Folder, LONG, Reply, Stack, engine, open, request, streamed_text, with_model,
};

fn endless() -> Settings {
    Settings {
        tbt_ms: 5.0,
        max_model_len: 1 << 20,
        ..engine()
    }
}

/// Fills a client's buffers soon.
pub fn fast() -> Settings {
    Settings {
        tokens_per_step: 64,
        tbt_ms: 0.2,
        ..endless()
    }
}

fn ask(stream: bool) -> hyper::Request<Full<Bytes>> {
    let body = with_model(json!({"prompt": "x", "max_tokens": 100_000, "stream": stream}));
    request(
        "POST",
        "/v1/completions",
        &[],
        Bytes::from(body.to_string()),
    )
}

/// A request for a completion, as bytes.
fn asked(fields: Value) -> Vec<u8> {
    let body = with_model(fields).to_string();
    let length = body.len();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {length}");
    format!("{head}\r\n\r\n{body}").into_bytes()
}

/// A stream of which the first bytes have been read.
async fn begun(stack: &Stack) -> (hyper::body::Incoming, Connection) {
    let (response, connection) = open(stack.address(), ask(true)).await;
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    body.frame().await.unwrap().unwrap();
    (body, connection)
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_frees_the_engine() {
    let stack = Stack::one(endless()).await;
    let (body, connection) = begun(&stack).await;
    assert_eq!(
        stack.metric("scalellm_replica_running_requests{", "").await,
        1.0
    );
    drop((body, connection));
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
    stack
        .wait_metric("scalellm_requests_total{", "status=\"499\"", 1.0)
        .await;
    stack
        .wait_metric("scalellm_generations_in_flight ", "", 0.0)
        .await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_frees_the_engine() {
    let stack = Stack::one(endless()).await;
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    let fields = json!({"prompt": "x", "max_tokens": 100_000});
    socket.write_all(&asked(fields)).await.unwrap();
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 1.0)
        .await;
    drop(socket);
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
    stack
        .wait_metric("scalellm_requests_total{", "status=\"499\"", 1.0)
        .await;
}

#[tokio::test]
async fn a_client_that_leaves_after_a_body_in_chunks_frees_the_engine() {
    let stack = Stack::one(endless()).await;
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    let body = with_model(json!({"prompt": "x", "max_tokens": 100_000})).to_string();
    let whole = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    socket.write_all(whole.as_bytes()).await.unwrap();
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 1.0)
        .await;
    drop(socket);
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
}

#[tokio::test]
async fn what_is_sent_while_a_request_is_answered_is_answered_after_it() {
    let slow = Settings {
        tbt_ms: 50.0,
        ..engine()
    };
    let stack = Stack::one(slow).await;
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    let fields = json!({"prompt": "x", "max_tokens": 6, "stream": true});
    socket.write_all(&asked(fields.clone())).await.unwrap();
    let mut answers = vec![0; 32];
    socket.read_exact(&mut answers).await.unwrap();
    // The answer has begun: this waits in the socket, where the client's end is looked for.
    socket.write_all(&asked(fields)).await.unwrap();
    let probe = "GET /health HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n";
    socket.write_all(probe.as_bytes()).await.unwrap();
    socket.read_to_end(&mut answers).await.unwrap();
    let answers = String::from_utf8(answers).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers}");
    assert_eq!(answers.matches("data: [DONE]").count(), 2, "{answers}");
}

#[tokio::test]
async fn a_client_of_a_unix_socket_that_leaves_frees_the_engine() {
    let folder = Folder::new();
    let path = folder.0.join("gateway.sock");
    let at = path.clone();
    let stack = Stack::start(vec![endless()], |config| config.unix_socket = Some(at)).await;
    let mut socket = tokio::net::UnixStream::connect(&path).await.unwrap();
    // Nothing is written to it meanwhile, which would tell.
    let fields = json!({"prompt": "x", "max_tokens": 100_000});
    socket.write_all(&asked(fields)).await.unwrap();
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 1.0)
        .await;
    drop(socket);
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
}

#[tokio::test]
async fn a_client_that_stops_reading_is_dropped() {
    let stack = Stack::start(vec![fast()], |config| config.write_timeout_s = 0.3).await;
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    // Every token with its logprobs, so that the socket's buffers fill soon.
    let fields = json!({"prompt": "x", "max_tokens": 900_000, "logprobs": 20, "stream": true});
    socket.write_all(&asked(fields)).await.unwrap();
    stack
        .wait_metric("scalellm_clients_stalled_total ", "", 1.0)
        .await;
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
    stack
        .wait_metric("scalellm_requests_in_flight ", "", 1.0)
        .await;
    drop(socket);
}

#[tokio::test]
async fn a_full_gateway_sheds_with_503() {
    let stack = Stack::start(vec![endless()], |config| {
        config.max_in_flight = 1;
        config.max_queued = 0;
    })
    .await;
    let running = begun(&stack).await;
    let reply = stack.complete(json!({"prompt": "x"})).await;
    assert_eq!(reply.error(503)["code"], "overloaded");
    assert_eq!(reply.header("retry-after"), "1");
    assert_eq!(
        stack
            .metric("scalellm_rejected_total{", "max_in_flight")
            .await,
        1.0
    );
    drop(running);
    stack
        .wait_metric("scalellm_generations_in_flight ", "", 0.0)
        .await;
    stack.complete(json!({"prompt": "x"})).await.ok();
}

#[tokio::test]
async fn a_drain_under_load_loses_nothing_and_refuses_the_rest() {
    // Slow to begin, so that all are there before one has ended.
    let steady = Settings {
        ttft_ms: 3000.0,
        tbt_ms: 4.0,
        ..engine()
    };
    let mut stack = Stack::one(steady).await;
    let address = stack.address();
    let running: Vec<_> = (0..32)
        .map(|_| {
            let body =
                with_model(json!({"prompt": "x", "max_tokens": 60, "stream": true})).to_string();
            tokio::spawn(async move {
                let (response, _connection) = open(
                    address,
                    request("POST", "/v1/completions", &[], Bytes::from(body)),
                )
                .await;
                Reply::read(response).await
            })
        })
        .collect();
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 32.0)
        .await;
    stack.gateway.drain();
    let refused = stack.complete(json!({"prompt": "x"})).await;
    assert_eq!(refused.error(503)["code"], "draining");
    assert_eq!(
        (refused.header("retry-after"), refused.header("connection")),
        ("30", "close")
    );
    assert_eq!(stack.get("/ready").await.status, 503);
    assert_eq!(stack.get("/health").await.status, 200);
    for reply in running {
        let events = reply.await.unwrap().events();
        assert_eq!(streamed_text(&events, 0).len(), 60);
        assert_eq!(
            events.last().unwrap()["choices"][0]["finish_reason"],
            "length"
        );
    }
    tokio::time::timeout(LONG, stack.gateway.ended())
        .await
        .unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_drain_that_takes_too_long_ends_streams_with_an_error() {
    let mut stack = Stack::start(vec![endless()], |config| config.drain_timeout_s = 0.2).await;
    let (body, _connection) = begun(&stack).await;
    let whole = tokio::spawn(open(stack.address(), ask(false)));
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 2.0)
        .await;
    let start = Instant::now();
    stack.gateway.drain();
    let rest = body.collect().await.unwrap().to_bytes();
    assert!(start.elapsed() > Duration::from_millis(190));
    let last = String::from_utf8(rest.to_vec()).unwrap();
    assert!(
        last.contains("\"code\":\"draining\"") && !last.contains("[DONE]"),
        "{last}"
    );
    let (response, _connection) = whole.await.unwrap();
    Reply::read(response).await.error(503);
    tokio::time::timeout(LONG, stack.gateway.ended())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stop_ends_at_once() {
    let mut stack = Stack::one(endless()).await;
    let (body, _connection) = begun(&stack).await;
    stack.gateway.drain();
    let start = Instant::now();
    stack.gateway.stop();
    body.collect().await.unwrap();
    tokio::time::timeout(LONG, stack.gateway.ended())
        .await
        .unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn a_taken_port_is_an_error_that_names_it() {
    let stack = Stack::one(engine()).await;
    let model = scalellm_gateway::ModelConfig {
        name: "m".to_owned(),
        aliases: Vec::new(),
        path: stack.folder.0.clone(),
        replicas: vec![stack.socket(0)],
        ..scalellm_gateway::ModelConfig::default()
    };
    let config = scalellm_gateway::Config {
        port: stack.address().port(),
        models: vec![model],
        ..Default::default()
    };
    let error = scalellm_gateway::Gateway::start(config)
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains(&stack.address().to_string()), "{error}");
}

#[tokio::test]
async fn a_connection_that_sends_no_request_is_closed() {
    let stack = Stack::start(vec![engine()], |config| config.header_timeout_s = 0.2).await;
    for start in ["", "P", "GET / HTTP/1.1\r\nhost: t\r\nx: "] {
        let mut socket = TcpStream::connect(stack.address()).await.unwrap();
        socket.write_all(start.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        tokio::time::timeout(LONG, socket.read_to_end(&mut rest))
            .await
            .unwrap()
            .unwrap();
        assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
    }
}

/// The engine protocol's deadlines end at 7 days.
#[tokio::test]
async fn a_time_limit_of_months_is_no_error() {
    let stack = Stack::start(vec![engine()], |config| config.request_timeout_s = 1e7).await;
    stack.complete(json!({"prompt": "x"})).await.ok();
}
