//! Servers elsewhere that fail: what is tried elsewhere, what the client is told, and that every wait ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use scalellm_gateway::UpstreamConfig;

use super::foreign::{DONE, HI, WHOLE, ask, gateway};
use super::foreign_health::nobody;
use super::upstream::{Act, Mock, answer, chunk, json, last_chunk, stream, stream_head};

#[tokio::test]
async fn a_connection_that_the_upstream_has_closed_costs_no_request() {
    let mock = Mock::start(|_| vec![json(WHOLE), Act::Close]).await;
    let stack = gateway(vec![mock.upstream()]).await;
    for _ in 0..5 {
        assert_eq!(ask(&stack, r#"{"model":"chat"}"#).await.status, 200);
    }
    // One that it closes just when the next request is on its way.
    let count = Arc::new(AtomicUsize::new(0));
    let mock = Mock::start(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        1 => vec![Act::Reset],
        _ => vec![json(WHOLE)],
    })
    .await;
    let stack = gateway(vec![mock.upstream()]).await;
    assert_eq!(ask(&stack, "{}").await.status, 200);
    assert_eq!(ask(&stack, "{}").await.status, 200);
    assert_eq!(
        stack.metric("scalellm_upstream_failures_total", "").await,
        0.0
    );
}

#[tokio::test]
async fn requests_that_are_sent_again_stay_within_the_budget_for_retries() {
    let count = Arc::new(AtomicUsize::new(0));
    // Every connection breaks at its second request.
    let mock = Mock::start(move |_| match count.fetch_add(1, Ordering::SeqCst) % 2 {
        0 => vec![json(WHOLE)],
        _ => vec![Act::Reset],
    })
    .await;
    let stack = gateway(vec![mock.upstream()]).await;
    let mut failed = 0;
    for _ in 0..20 {
        failed += usize::from(ask(&stack, "{}").await.status == 502);
    }
    let retries = stack.metric("scalellm_retries_total", "").await;
    assert_eq!(mock.seen().len(), 20 + retries as usize);
    assert!(failed > 0 && retries <= 10.0 + 0.2 * 20.0, "{retries}");
}

#[tokio::test]
async fn what_fails_before_the_first_byte_is_tried_elsewhere() {
    let good = Mock::start(|seen| match seen.body.contains("\"stream\":true") {
        true => stream(&[HI, DONE]),
        false => vec![json(WHOLE)],
    })
    .await;
    let garbage = "HTTP/2000 maybe\r\n\u{7}\r\n\r\n";
    let bads: Vec<(&str, Vec<Act>)> = vec![
        ("no head", vec![Act::Reset]),
        ("garbage", vec![Act::Send(garbage.into()), Act::Close]),
        (
            "half a body",
            vec![
                Act::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".to_vec()),
                Act::Close,
            ],
        ),
        (
            "no JSON",
            vec![answer("200 OK", "content-type: text/html\r\n", "<html>")],
        ),
        ("a stream that resets", vec![stream_head(), Act::Reset]),
        ("an empty stream", vec![stream_head(), last_chunk()]),
        (
            "half an event",
            vec![stream_head(), chunk("data: {\"a\""), Act::Close],
        ),
        (
            "compressed",
            vec![answer("200 OK", "content-encoding: gzip\r\n", "zip")],
        ),
        ("500", vec![answer("500 Internal Server Error", "", "oh")]),
        ("503", vec![answer("503 Service Unavailable", "", "")]),
        ("429", vec![answer("429 Too Many Requests", "", "{}")]),
        ("401", vec![answer("401 Unauthorized", "", "{}")]),
        (
            "301",
            vec![answer("301 Moved Permanently", "location: /x\r\n", "")],
        ),
        (
            "a head without end",
            vec![Act::Forever(b"x-a: 0123456789\r\n".to_vec())],
        ),
    ];
    for (what, acts) in bads {
        let bad = Mock::start(move |_| acts.clone()).await;
        let fallback = UpstreamConfig {
            fallback: true,
            ..good.upstream()
        };
        let stack = gateway(vec![bad.upstream(), fallback]).await;
        let streamed = what.contains("stream") || what.contains("event");
        let body = format!(r#"{{"model":"chat","stream":{streamed}}}"#);
        let expected = if streamed {
            [HI, DONE].concat()
        } else {
            WHOLE.to_owned()
        };
        assert_eq!(ask(&stack, &body).await.text(), expected, "{what}");
        assert_eq!(
            stack.metric("scalellm_retries_total", "").await,
            1.0,
            "{what}"
        );
        assert_eq!(bad.seen().len(), 1, "{what}");
    }
}

#[tokio::test]
async fn what_the_client_did_wrong_goes_back_as_it_came() {
    let told = r#"{"error":{"message":"temperature: too hot","type":"BadRequest","param":null,"code":400}}"#;
    let headers = "content-type: application/json\r\nretry-after: 7\r\nserver: secret\r\n";
    for (status, number) in [
        ("400 Bad Request", 400),
        ("404 Not Found", 404),
        ("422 Unprocessable Entity", 422),
        ("429 Too Many Requests", 429),
    ] {
        let mock = Mock::start(move |_| vec![answer(status, headers, told)]).await;
        let stack = gateway(vec![mock.upstream()]).await;
        let reply = ask(&stack, "{}").await;
        assert_eq!((reply.status, reply.text().as_str()), (number, told));
        assert_eq!(
            (reply.header("retry-after"), reply.header("server")),
            ("7", "")
        );
        assert_eq!(
            stack.metric("scalellm_upstream_failures_total", "").await,
            0.0
        );
    }
}

#[tokio::test]
async fn what_the_upstream_did_wrong_is_told_in_our_words() {
    for (acts, status, code) in [
        (vec![answer("500 Oh", "", "trace")], 502, "upstream_failed"),
        (
            vec![answer("401 Unauthorized", "", "{}")],
            502,
            "upstream_failed",
        ),
        (
            vec![answer("503 Busy", "retry-after: 9\r\n", "")],
            503,
            "upstream_busy",
        ),
        (vec![answer("504 Late", "", "")], 504, "upstream_timeout"),
        (vec![Act::Reset], 502, "upstream_failed"),
    ] {
        let mock = Mock::start(move |_| acts.clone()).await;
        let stack = gateway(vec![mock.upstream()]).await;
        let reply = ask(&stack, "{}").await;
        assert_eq!(reply.error(status)["code"], code);
        if status == 503 {
            assert_eq!(reply.header("retry-after"), "9");
        }
    }
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event() {
    for (what, acts) in [
        ("reset", vec![Act::Reset]),
        ("closed", vec![Act::Close]),
        ("half an event", vec![chunk("data: {"), Act::Close]),
        ("no [DONE]", vec![last_chunk()]),
        (
            "no chunk",
            vec![Act::Send(b"not hex\r\n".to_vec()), Act::Close],
        ),
        (
            "an event without end",
            vec![Act::Forever(
                format!("400\r\n{}\r\n", "x".repeat(1024)).into(),
            )],
        ),
    ] {
        let script: Vec<Act> = [stream_head(), chunk(HI)].into_iter().chain(acts).collect();
        let mock = Mock::start(move |_| script.clone()).await;
        let stack = gateway(vec![mock.upstream()]).await;
        let reply = ask(&stack, r#"{"model":"chat","stream":true}"#).await;
        let text = reply.text();
        assert!(
            text.starts_with(HI) && !text.contains("data: [DONE]"),
            "{what}: {text}"
        );
        assert_eq!(
            reply.events_of("data: ").last().unwrap()["error"]["code"],
            "upstream_failed",
            "{what}"
        );
        assert_eq!(
            stack
                .metric("scalellm_requests_total", "status=\"502\"")
                .await,
            1.0,
            "{what}"
        );
        if what != "no [DONE]" {
            mock.wait_closed().await;
        }
    }
}

#[tokio::test]
async fn every_wait_has_its_end() {
    let hang = || vec![Act::Hang];
    let begun = || vec![stream_head(), chunk(HI), Act::Hang];
    let busy = || {
        let event = format!("{:x}\r\n{HI}\r\n", HI.len());
        vec![stream_head(), Act::Forever(event.into())]
    };
    let no_event = || vec![stream_head(), chunk("data: {"), Act::Hang];
    let half = || {
        vec![
            Act::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".to_vec()),
            Act::Hang,
        ]
    };
    let mut short = nobody().await;
    short.first_byte_timeout_s = 0.05;
    short.idle_timeout_s = 0.05;
    let mut long = nobody().await;
    long.first_byte_timeout_s = 600.0;
    type Case<'a> = (
        &'a str,
        fn() -> Vec<Act>,
        &'a UpstreamConfig,
        &'a str,
        &'a str,
    );
    let cases: [Case; 7] = [
        (
            "no head",
            hang,
            &short,
            r#"{"model":"chat"}"#,
            "upstream_timeout",
        ),
        (
            "half a body",
            half,
            &short,
            r#"{"model":"chat"}"#,
            "upstream_timeout",
        ),
        (
            "no event",
            no_event,
            &short,
            r#"{"model":"chat","stream":true}"#,
            "upstream_timeout",
        ),
        (
            "no next event",
            begun,
            &short,
            r#"{"model":"chat","stream":true}"#,
            "upstream_timeout",
        ),
        (
            "deadline",
            hang,
            &long,
            r#"{"model":"chat","deadline_ms":50}"#,
            "deadline_exceeded",
        ),
        (
            "deadline in a stream",
            begun,
            &long,
            r#"{"model":"chat","stream":true,"deadline_ms":500}"#,
            "deadline_exceeded",
        ),
        (
            "deadline in a stream that always has more",
            busy,
            &long,
            r#"{"model":"chat","stream":true,"deadline_ms":100}"#,
            "deadline_exceeded",
        ),
    ];
    for (what, acts, config, body, code) in cases {
        let mock = Mock::start(move |_| acts()).await;
        let config = UpstreamConfig {
            url: mock.upstream().url,
            ..config.clone()
        };
        let stack = gateway(vec![config]).await;
        let reply = ask(&stack, body).await;
        if reply.status == 200 {
            assert_eq!(
                reply.events_of("data: ").last().unwrap()["error"]["code"],
                code,
                "{what}"
            );
        } else {
            assert_eq!(reply.error(504)["code"], code, "{what}");
        }
        assert!(!mock.seen()[0].body.contains("deadline_ms"));
        mock.wait_closed().await;
    }
}
