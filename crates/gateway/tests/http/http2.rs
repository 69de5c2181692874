//! HTTP/2: many requests on one connection, and clients that do not take what they asked for.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use scalellm_fake_engine::Settings;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::lifecycle::fast;
use crate::support::{LONG, Reply, Stack, engine, streamed_text, with_model};

/// A client whose streams have the smallest usual window.
struct Client {
    sender: SendRequest<Full<Bytes>>,
    connection: JoinHandle<hyper::Result<()>>,
    url: String,
}

impl Client {
    async fn connect(stack: &Stack) -> Client {
        let tcp = TcpStream::connect(stack.address()).await.unwrap();
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(65_535)
            .handshake(TokioIo::new(tcp))
            .await
            .unwrap();
        Client {
            sender,
            connection: tokio::spawn(connection),
            url: format!("http://{}/v1/completions", stack.address()),
        }
    }

    async fn ask(&self, fields: Value) -> Response<Incoming> {
        let body = Full::new(Bytes::from(with_model(fields).to_string()));
        let request = Request::post(&self.url).body(body).unwrap();
        self.sender.clone().send_request(request).await.unwrap()
    }

    /// The gateway ends the connection, while the sender would keep it.
    async fn is_ended(&mut self) -> hyper::Result<()> {
        let ended = tokio::time::timeout(LONG, &mut self.connection).await;
        ended.expect("the connection is closed").unwrap()
    }
}

#[tokio::test]
async fn many_requests_share_one_connection() {
    let stack = Stack::one(engine()).await;
    let client = Client::connect(&stack).await;
    let one = async |stream: bool| {
        let fields = json!({"prompt": "x", "max_tokens": 5, "stream": stream});
        Reply::read(client.ask(fields).await).await
    };
    let replies = futures_util::future::join_all((0..16).map(|index| one(index % 2 == 0))).await;
    for (index, reply) in replies.iter().enumerate() {
        if index % 2 == 0 {
            assert_eq!(streamed_text(&reply.events(), 0), "abcde");
        } else {
            assert_eq!(reply.ok()["choices"][0]["text"], "abcde");
        }
        assert!(reply.header("server-timing").contains("route;dur="));
    }
    drop(client.sender);
    client.connection.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stream_that_is_given_no_window_is_dropped_alone() {
    let stack = Stack::start(vec![fast()], |config| config.write_timeout_s = 0.3).await;
    let client = Client::connect(&stack).await;
    let fields = json!({"prompt": "x", "max_tokens": 900_000, "logprobs": 20, "stream": true});
    let unread = client.ask(fields).await;
    stack
        .wait_metric("scalellm_clients_stalled_total ", "", 1.0)
        .await;
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
    // The socket is read, and its other streams go on.
    let read = client.ask(json!({"prompt": "x", "max_tokens": 5})).await;
    assert_eq!(Reply::read(read).await.ok()["choices"][0]["text"], "abcde");
    let mut body = unread.into_body();
    let ended = loop {
        match body.frame().await {
            Some(Ok(_)) => {}
            other => break other,
        }
    };
    assert!(ended.is_some_and(|frame| frame.is_err()), "it was cut off");
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
    let slow = Settings {
        ttft_ms: 1500.0,
        ..engine()
    };
    let stack = Stack::start(vec![slow], |config| config.header_timeout_s = 0.2).await;
    let mut client = Client::connect(&stack).await;
    // It waits for longer than a connection may be idle.
    let reply = client.ask(json!({"prompt": "x", "max_tokens": 5})).await;
    assert_eq!(Reply::read(reply).await.ok()["choices"][0]["text"], "abcde");
    client.is_ended().await.unwrap();
}

#[tokio::test]
async fn an_idle_connection_does_not_wait_for_an_answer_to_be_read() {
    let stack = Stack::start(vec![fast()], |config| config.header_timeout_s = 0.2).await;
    let mut client = Client::connect(&stack).await;
    // Far more than the window, in one piece.
    let unread = client
        .ask(json!({"prompt": "x", "max_tokens": 2000, "logprobs": 20}))
        .await;
    assert_eq!(unread.status(), 200);
    // Whether that is an error to the client does not matter.
    client.is_ended().await.ok();
}
