use serde_json::{Value, json};

use crate::server::{Server, Step, end, every_ms, good_stream, head, piece, token};

/// Runs four requests of which the odd ones meet `fault`; the even ones must not suffer.
fn half_meet(fault: Vec<Step>) -> Value {
    let server = Server::start(move |request| match request.number % 2 {
        0 => good_stream(0, 0, 2),
        _ => fault.clone(),
    });
    let level = json!({"concurrency": 1, "requests": 4});
    let row = server.measure_with(level, |plan| plan["timeout_s"] = json!(5));
    assert_eq!(row["completed"], 2, "{row}");
    row
}

#[track_caller]
fn assert_fails_as(kind: &str, example: &str, fault: Vec<Step>) {
    let row = half_meet(fault);
    assert_eq!(row["failed"], 2, "{row}");
    assert_eq!(row["failures"][kind]["count"], 2, "{kind}: {row}");
    let message = row["failures"][kind]["example"].as_str().expect("example");
    assert!(message.contains(example), "{message}");
}

fn bytes(text: &str) -> Step {
    Step::Send(text.as_bytes().to_vec())
}

fn stream(events: &[&str]) -> Vec<Step> {
    let mut steps = vec![head("text/event-stream")];
    steps.extend(events.iter().map(|event| piece(event)));
    steps.push(end());
    steps
}

#[test]
fn a_port_where_nobody_listens_counts_as_connect() {
    let port = Server::start(|_| vec![]).address.port();
    let plan = json!({
        "url": format!("http://127.0.0.1:{port}"), "endpoint": "chat", "model": "m",
        "max_tokens": 1, "prompts": [{"text": "a"}], "levels": [{"concurrency": 2, "requests": 4}],
    });
    let plan = scalellm_load_generator::Plan::from_json(&plan.to_string()).expect("plan");
    let run = scalellm_load_generator::Run::start(plan).expect("run");
    let row = crate::server::row(crate::server::finish(run));
    assert_eq!(row["failures"]["connect"]["count"], 4, "{row}");
    assert_eq!(
        (&row["completed"], &row["level"]),
        (&json!(0), &json!("ok"))
    );
    assert_eq!(row["ttft_ms"]["p50"], Value::Null);
}

#[test]
fn a_refusal_counts_as_status_with_its_message_and_keeps_the_connection() {
    let body = r#"{"error":{"message":"no such model 'm'"}}"#;
    let answer = format!(
        "HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    assert_fails_as(
        "status",
        "HTTP 404: {\"error\":{\"message\":\"no such model",
        vec![bytes(&answer)],
    );
}

#[test]
fn broken_connections_count_as_reset_before_and_inside_the_answer() {
    for fault in [Step::Reset, Step::Close] {
        let server = Server::start(move |_| vec![fault.clone()]);
        let row = server.measure(json!({"concurrency": 1, "requests": 3}));
        assert_eq!(row["failures"]["reset"]["count"], 3, "{row}");
        assert_eq!(row["resent"], 0, "{row}");
    }
    assert_fails_as(
        "reset",
        "",
        vec![
            head("text/event-stream"),
            token(),
            Step::Wait(20),
            Step::Reset,
        ],
    );
    assert_fails_as(
        "reset",
        "",
        vec![head("text/event-stream"), token(), Step::Close],
    );
}

#[test]
fn a_kept_connection_that_ends_unanswered_costs_no_request_but_is_counted() {
    for fault in [Step::Reset, Step::Close] {
        let server = Server::start(move |request| match request.number % 2 {
            0 => good_stream(0, 0, 2),
            _ => vec![fault.clone()],
        });
        let row = server.measure(json!({"concurrency": 1, "requests": 4}));
        assert_eq!((&row["completed"], &row["failed"]), (&json!(4), &json!(0)));
        assert_eq!(row["resent"], 3, "{row}");
    }
}

#[test]
fn a_kept_connection_that_ends_long_after_the_request_counts_as_reset() {
    let row = half_meet(vec![Step::Wait(400), Step::Reset]);
    assert_eq!(row["failures"]["reset"]["count"], 2, "{row}");
    assert_eq!(row["resent"], 0, "{row}");
}

#[test]
fn a_kept_connection_that_ends_inside_the_answers_head_counts_as_reset() {
    let row = half_meet(vec![bytes("HTTP/1.1 200 OK\r\ncont"), Step::Close]);
    assert_eq!(row["failures"]["reset"]["count"], 2, "{row}");
    assert_eq!(row["resent"], 0, "{row}");
}

#[test]
fn what_is_not_http_or_not_a_stream_of_the_api_counts_as_garbage() {
    assert_fails_as(
        "garbage",
        "",
        vec![bytes("\u{1}\u{2}hello\r\n\r\n"), Step::Close],
    );
    assert_fails_as(
        "garbage",
        "text/html",
        vec![head("text/html"), piece("<html>"), end()],
    );
    assert_fails_as(
        "garbage",
        "not a server-sent",
        stream(&["<html>\n<body>\n</body>\n"]),
    );
    assert_fails_as(
        "garbage",
        "not an API chunk",
        stream(&["data: {\"choices\":\n\n"]),
    );
    assert_fails_as(
        "garbage",
        "without choices",
        stream(&["data: {\"tokens\":[1]}\n\n"]),
    );
    let endless = "x".repeat(5 << 20);
    assert_fails_as("garbage", "grew over", stream(&["data: ", &endless]));
}

#[test]
fn a_stream_that_stops_without_saying_so_is_unfinished() {
    let event = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
    assert_fails_as("unfinished", "without [DONE]", stream(&[event]));
    let close_delimited = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
    assert_fails_as(
        "unfinished",
        "",
        vec![bytes(close_delimited), bytes(event), Step::Close],
    );
}

#[test]
fn answers_without_a_token_are_empty() {
    assert_fails_as("empty", "without a byte", stream(&[]));
    assert_fails_as("empty", "without a token", stream(&["data: [DONE]\n\n"]));
}

#[test]
fn an_error_event_counts_as_error_with_its_words() {
    let events = [
        "data: {\"choices\":[{\"text\":\"a\"}]}\n\n",
        "data: {\"error\":{\"message\":\"engine lost\"}}\n\n",
    ];
    assert_fails_as("error", "engine lost", stream(&events));
}

#[test]
fn a_stream_that_never_ends_times_out_and_marks_the_level() {
    let server = Server::start(|request| match request.number {
        0..8 => good_stream(0, 0, 2),
        8 => {
            let mut steps = vec![head("text/event-stream")];
            steps.extend((0..200).flat_map(|_| [token(), Step::Wait(10)]));
            steps
        }
        _ => vec![Step::Hang],
    });
    let level = json!({"concurrency": 2, "requests": 10});
    let row = server.measure_with(level, |plan| plan["timeout_s"] = json!(0.4));
    assert_eq!(
        (&row["completed"], &row["timed_out"]),
        (&json!(8), &json!(2)),
        "{row}"
    );
    assert_eq!(row["failed"], 0);
    assert_eq!(
        (&row["level"], &row["level_published_rule"]),
        (&json!("timeout"), &json!("ok"))
    );
    let late = row["records"]["rows"].as_array().expect("rows").iter();
    let late: Vec<_> = late.filter(|row| row[0] == "timed_out").collect();
    assert!(
        late.iter().any(|row| row[10].as_u64() > Some(1)),
        "chunks are kept: {late:?}"
    );
}

#[test]
fn when_nobody_finishes_both_rules_say_timeout() {
    let server = Server::start(|_| vec![Step::Hang]);
    let level = json!({"concurrency": 3, "requests": 3});
    let row = server.measure_with(level, |plan| plan["timeout_s"] = json!(0.1));
    assert_eq!(row["timed_out_share"], 1.0);
    assert_eq!(
        (&row["level"], &row["level_published_rule"]),
        (&json!("timeout"), &json!("timeout"))
    );
}

#[test]
fn a_kept_connection_that_the_server_closed_meanwhile_fails_no_request() {
    let server = Server::start(|_| {
        let mut steps = good_stream(0, 0, 2);
        steps.push(Step::Close);
        steps
    });
    let row = server.measure(json!({"send_at_s": every_ms(20.0, 10)}));
    assert_eq!(row["completed"], 10, "{row}");
}
