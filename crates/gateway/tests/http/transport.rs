//! Keys, limits of bodies and heads, connections that live on.

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{LONG, Stack, engine, request, send, with_model};

#[tokio::test]
async fn keys_guard_all_but_the_open_routes() {
    let stack = Stack::start(vec![engine()], |config| {
        config.api_keys = vec!["secret".to_owned()]
    })
    .await;
    let body = || Bytes::from(with_model(json!({"prompt": "x", "max_tokens": 2})).to_string());
    for path in [
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
    ] {
        let reply = send(stack.address(), request("POST", path, &[], body())).await;
        let error = reply.error(401);
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("authentication_error"), &json!("invalid_api_key"))
        );
        assert_eq!(reply.header("www-authenticate"), "Bearer");
    }
    stack.get("/v1/models").await.error(401);
    for (value, status) in [
        ("Bearer secret", 200),
        ("Bearer wrong", 401),
        ("Bearer secrets", 401),
        ("secret", 401),
    ] {
        let headers = [("authorization", value)];
        let reply = send(
            stack.address(),
            request("POST", "/v1/completions", &headers, body()),
        )
        .await;
        assert_eq!(reply.status, status, "{value}");
    }
    for path in ["/health", "/ready", "/version", "/metrics", "/"] {
        assert_eq!(stack.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn a_protocol_is_recognised_byte_by_byte() {
    let stack = Stack::one(engine()).await;
    // A settings frame follows an HTTP/2 client's preface, and the server's own answers it.
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let asked = b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n";
    // What begins like a preface, and is none.
    let misled = b"PRI * HTTP/1.1\r\nhost: t\r\n\r\n";
    for (bytes, answer) in [
        (&http2[..], &b"\0\0"[..]),
        (asked, b"HTTP/1.1 200"),
        (misled, b"HTTP/1.1 4"),
    ] {
        let mut socket = TcpStream::connect(stack.address()).await.unwrap();
        socket.set_nodelay(true).unwrap();
        for byte in bytes {
            socket.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut found = vec![0; answer.len()];
        let read = tokio::time::timeout(LONG, socket.read_exact(&mut found)).await;
        read.unwrap().unwrap();
        assert_eq!(found, answer, "{}", String::from_utf8_lossy(bytes));
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_unread() {
    let stack = Stack::start(vec![engine()], |config| config.max_body_bytes = 100_000).await;
    // Declared: the answer comes before a byte of the 100 MB was sent.
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 100000000\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(LONG, socket.read(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(
        answer.starts_with("HTTP/1.1 413") && answer.contains("100000 bytes"),
        "{answer}"
    );
    drop(socket);
    // Sent whole, without waiting for an answer: it still arrives.
    let big = Bytes::from(vec![b' '; 64 << 20]);
    let error = send(
        stack.address(),
        request("POST", "/v1/completions", &[], big),
    )
    .await
    .error(413);
    assert_eq!(error["code"], "body_too_large");
    // Undeclared.
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("{:x}\r\n{}\r\n", 60_000, "x".repeat(60_000));
    for _ in 0..2 {
        socket.write_all(chunk.as_bytes()).await.unwrap();
    }
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(LONG, socket.read(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(String::from_utf8_lossy(&answer[..read]).starts_with("HTTP/1.1 413"));
    stack.complete(json!({"prompt": "x"})).await.ok();
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_a_408() {
    let stack = Stack::start(vec![engine()], |config| config.body_timeout_s = 0.2).await;
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\n{";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(LONG, socket.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 408"));
}

#[tokio::test]
async fn bodies_that_fill_their_memory_hold_off_others_until_they_go() {
    let stack = Stack::start(vec![engine()], |config| {
        config.max_body_bytes = 64 << 10;
        config.max_body_memory_bytes = 64 << 10;
    })
    .await;
    let mut hoarder = TcpStream::connect(stack.address()).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\n{";
    hoarder.write_all(head.as_bytes()).await.unwrap();
    stack
        .wait_metric("scalellm_body_memory_bytes ", "", f64::from(64 << 10))
        .await;
    let reply = stack.complete(json!({"prompt": "x"})).await;
    assert_eq!(reply.error(503)["code"], "overloaded");
    assert_eq!(reply.header("retry-after"), "1");
    drop(hoarder);
    stack
        .wait_metric("scalellm_body_memory_bytes ", "", 0.0)
        .await;
    stack.complete(json!({"prompt": "x"})).await.ok();
}

#[tokio::test]
async fn a_connection_lives_on_after_errors() {
    let stack = Stack::one(engine()).await;
    let tcp = TcpStream::connect(stack.address()).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(tcp)).await.unwrap();
    let connection = tokio::spawn(connection);
    let good = with_model(json!({"prompt": "x", "max_tokens": 2})).to_string();
    for (method, path, body, status) in [
        ("POST", "/v1/completions", good.as_str(), 200),
        ("POST", "/v1/completions", "{", 400),
        ("GET", "/nothing", "", 404),
        ("POST", "/health", "small body", 405),
        ("GET", "/v1/completions", "", 405),
        (
            "POST",
            "/v1/completions",
            "{\"model\": \"x\", \"prompt\": \"x\"}",
            404,
        ),
        ("HEAD", "/health", "", 200),
        ("POST", "/v1/completions", good.as_str(), 200),
    ] {
        sender.ready().await.unwrap();
        let body = Bytes::copy_from_slice(body.as_bytes());
        let response = sender
            .send_request(request(method, path, &[], body))
            .await
            .unwrap();
        assert_eq!(response.status(), status, "{method} {path}");
        response.into_body().collect().await.unwrap();
    }
    drop(sender);
    connection.await.unwrap().unwrap();
    stack
        .wait_metric("scalellm_requests_total{", "status=\"499\"", 0.0)
        .await;
}

#[tokio::test]
async fn headers_of_any_case_and_ids_are_honoured() {
    let stack = Stack::one(engine()).await;
    let mut socket = TcpStream::connect(stack.address()).await.unwrap();
    let body = with_model(json!({"prompt": "x", "max_tokens": 2})).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHOST: t\r\nCoNtEnT-LeNgTh: {}\r\nX-REQUEST-ID: my-id.7\r\nConnection: Close\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(LONG, socket.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        answer.contains("x-request-id: my-id.7\r\n") && answer.contains("\"id\":\"cmpl-my-id.7\""),
        "{answer}"
    );
    let long = "y".repeat(129);
    for bad in ["a b", long.as_str()] {
        let reply = send(
            stack.address(),
            request("GET", "/health", &[("x-request-id", bad)], Bytes::new()),
        )
        .await;
        assert_eq!(reply.header("x-request-id").len(), 32);
    }
}
