use std::sync::atomic::Ordering;
use std::time::Duration;

use scalellm_load_generator::Run;
use serde_json::{Value, json};

use crate::server::{Server, Step, end, finish, good_stream, head, row, token};

fn number(row: &Value, path: &str) -> f64 {
    row.pointer(path)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("{path} in {row}"))
}

#[test]
fn set_delays_come_back_as_ttft_tbt_and_e2e() {
    let server = Server::start(|_| good_stream(50, 10, 20));
    let row = server.measure(json!({"concurrency": 4, "requests": 12, "warmup": 4}));
    assert_eq!(
        (&row["completed"], &row["failed"]),
        (&json!(12), &json!(0)),
        "{row}"
    );
    // The server waits at least this long; how much longer is the machine's mood.
    assert!(number(&row, "/ttft_ms/p50") >= 50.0 && number(&row, "/ttft_ms/p50") < 5000.0);
    assert!(number(&row, "/e2e_ms/p50") >= 50.0 + 19.0 * 10.0);
    assert!(number(&row, "/tbt_ms/p50") > 1.0 && number(&row, "/tbt_ms/p50") < 1000.0);
    assert!(number(&row, "/max_gap_ms/p50") >= number(&row, "/itl_ms/p50") * 0.9);
    assert_eq!(row["output_tokens"], 12 * 20);
    assert_eq!(row["input_tokens"], 12 * 3);
    assert_eq!(row["token_sources"], json!({"usage": 12}));
    assert_eq!(
        (&row["level"], &row["level_published_rule"]),
        (&json!("ok"), &json!("ok"))
    );
    assert_eq!(row["concurrency"], 4);
    assert_eq!(row["rate"], Value::Null);
    assert_eq!(row["records"]["rows"].as_array().expect("rows").len(), 12);
    assert!(number(&row, "/generator/lag/send_ms/p99") < 5000.0);
}

#[test]
fn connections_are_kept_one_for_each_open_request() {
    let server = Server::start(|_| good_stream(1, 1, 3));
    let row = server.measure(json!({"concurrency": 3, "requests": 30}));
    assert_eq!(row["completed"], 30);
    let opened = server.connections.load(Ordering::Relaxed);
    assert!(
        (1..=3).contains(&opened),
        "{opened} connections for 3 clients"
    );
}

#[test]
fn a_stall_inside_a_stream_shows_as_its_longest_gap() {
    let server = Server::start(|_| {
        let mut steps = good_stream(5, 5, 10);
        steps.insert(8, Step::Wait(300));
        steps
    });
    let row = server.measure(json!({"concurrency": 2, "requests": 4}));
    assert!(number(&row, "/max_gap_ms/p50") >= 250.0, "{row}");
    assert!(number(&row, "/itl_ms/max") >= 250.0);
    assert!(number(&row, "/itl_ms/p50") < 250.0);
}

#[test]
fn clients_begin_over_the_ramp_and_none_before_its_turn() {
    // Longer than the ramp, so that no client sends twice.
    let server = Server::start(|_| good_stream(600, 1, 3));
    let row = server.measure(json!({"concurrency": 3, "requests": 3, "ramp_s": 0.3}));
    let records = row["records"]["rows"].as_array().expect("rows");
    let mut starts: Vec<f64> = records.iter().map(|record| number(record, "/2")).collect();
    starts.sort_by(f64::total_cmp);
    assert_eq!(row["records"]["columns"][2], "start_ms");
    assert!(starts[1] >= 100.0 && starts[2] >= 200.0, "{starts:?}");
}

#[test]
fn a_duration_ends_the_sends_and_lets_open_requests_finish() {
    let server = Server::start(|_| good_stream(20, 1, 3));
    let row = server.measure(json!({"concurrency": 2, "duration_s": 0.3}));
    assert!(row["completed"].as_u64().expect("count") >= 2, "{row}");
    assert_eq!((&row["failed"], &row["cancelled"]), (&json!(0), &json!(0)));
}

#[test]
fn an_answer_that_is_not_streamed_has_no_ttft_but_its_tokens() {
    let server = Server::start(|request| {
        assert_eq!(request.body["stream"], false);
        let body = r#"{"choices":[{"text":"x","finish_reason":"length"}],
            "usage":{"prompt_tokens":3,"completion_tokens":5}}"#;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length";
        vec![Step::Send(
            format!("{head}: {}\r\n\r\n{body}", body.len()).into_bytes(),
        )]
    });
    let level = json!({"concurrency": 2, "requests": 6});
    let row = server.measure_with(level, |plan| plan["stream"] = json!(false));
    assert_eq!(
        (&row["completed"], &row["output_tokens"]),
        (&json!(6), &json!(30)),
        "{row}"
    );
    assert_eq!(row["ttft_ms"]["p50"], Value::Null);
    assert!(number(&row, "/e2e_ms/p50") >= 0.0);
}

#[test]
fn prompts_are_taken_in_turn_with_key_and_extra_fields() {
    let server = Server::start(|request| {
        let ids = json!([[1], [2], [3]]);
        assert_eq!(
            request.body["prompt"],
            ids[request.number % 3],
            "in turn, over the warm-up"
        );
        assert_eq!(request.body["top_k"], 4);
        assert!(request.head.starts_with("post /v1/completions http/1.1"));
        assert!(request.head.contains("authorization: bearer secret"));
        good_stream(0, 0, 2)
    });
    let run = Run::start(server.plan(
        json!({"concurrency": 1, "requests": 5, "warmup": 2}),
        |plan| {
            plan["prompts"] = json!([{"token_ids": [1]}, {"token_ids": [2]}, {"token_ids": [3]}]);
            plan["api_key"] = json!("secret");
            plan["extra_body"] = json!({"top_k": 4});
        },
    ));
    let report = finish(run.expect("run"));
    assert_eq!((report.prompts_sent, report.prompts), (7, 3));
    assert_eq!(row(report)["completed"], 5);
}

#[test]
fn a_stop_keeps_what_was_measured_and_counts_the_open_ones_as_cancelled() {
    let server = Server::start(|request| match request.number {
        0..4 => good_stream(0, 0, 2),
        _ => vec![head("text/event-stream"), token(), Step::Hang],
    });
    let level = json!({"concurrency": 2, "requests": 100});
    let run = Run::start(server.plan(level, |_| {})).expect("run");
    while run.progress().completed < 4 || run.progress().in_flight < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    run.stop();
    let report = finish(run);
    assert!(report.interrupted);
    let row = row(report);
    assert_eq!(
        (&row["completed"], &row["cancelled"]),
        (&json!(4), &json!(2)),
        "{row}"
    );
    assert_eq!(row["failed"], 0);
}

#[test]
fn a_closed_loop_counts_a_conversations_turns_as_requests() {
    let server = Server::start(|request| {
        let turn = request.number % 3;
        let said = ["start", "start a a more", "start a a more a a last"];
        assert_eq!(request.body["prompt"], said[turn]);
        assert_eq!(request.body["max_tokens"], [5, 16, 7][turn]);
        good_stream(0, 0, 2)
    });
    let level = json!({"concurrency": 1, "requests": 7});
    let row = server.measure_with(level, |plan| {
        let turns = json!([{"text": " more"}, {"text": " last", "max_tokens": 7}]);
        plan["prompts"] = json!([{"text": "start", "max_tokens": 5, "turns": turns}]);
    });
    assert_eq!(
        (&row["completed"], &row["failed"]),
        (&json!(7), &json!(0)),
        "{row}"
    );
}

#[test]
fn gaps_are_recorded_when_asked_for() {
    let server = Server::start(|_| good_stream(0, 1, 5));
    let level = json!({"concurrency": 1, "requests": 2});
    let row = server.measure_with(level, |plan| plan["record_gaps"] = json!(true));
    let columns = row["records"]["columns"].as_array().expect("columns");
    assert_eq!(columns.last(), Some(&json!("gaps_us")));
    let first = row["records"]["rows"][0].as_array().expect("row");
    assert_eq!(first.len(), columns.len());
    assert_eq!(
        first.last().and_then(Value::as_array).map(Vec::len),
        Some(4),
        "{first:?}"
    );
}

#[test]
fn a_body_that_never_ends_after_done_costs_its_connection_and_no_request() {
    let server = Server::start(|_| {
        let mut steps = good_stream(0, 0, 2);
        let last = steps.len() - 1;
        steps[last] = Step::Hang;
        steps
    });
    let row = server.measure(json!({"concurrency": 1, "requests": 2}));
    assert_eq!(row["completed"], 2);
    assert!(number(&row, "/e2e_ms/max") < 10_000.0);
    assert_eq!(server.connections.load(Ordering::Relaxed), 2);
}

#[test]
fn chunks_that_arrive_byte_by_byte_count_once() {
    let server = Server::start(|_| {
        let mut steps = vec![head("text/event-stream")];
        let event = "data: {\"choices\":[{\"text\":\" é\"}]}\r\n\r\ndata: [DONE]\r\n\r\n";
        for byte in event.bytes() {
            steps.push(Step::Send([b"1\r\n", &[byte][..], b"\r\n"].concat()));
        }
        steps.push(end());
        steps
    });
    let row = server.measure(json!({"concurrency": 1, "requests": 2}));
    assert_eq!(
        (&row["completed"], &row["output_tokens"]),
        (&json!(2), &json!(2)),
        "{row}"
    );
    assert_eq!(row["token_sources"], json!({"chunks": 2}));
}

#[test]
fn requests_bear_their_number_as_id_and_trace_where_the_plan_asks() {
    let server = Server::start(|request| {
        let id = format!("00000000000000ab{:016x}", request.number + 1);
        let expected = [
            format!("x-request-id: {id}"),
            format!("traceparent: 00-{id}-{:016x}-01", request.number + 1),
        ];
        for header in expected {
            assert!(request.head.contains(&header), "{}", request.head);
        }
        good_stream(0, 0, 2)
    });
    let level = json!({"concurrency": 1, "requests": 2, "warmup": 1});
    let row = server.measure_with(level.clone(), |plan| {
        plan["trace_prefix"] = json!("00000000000000ab");
    });
    assert_eq!(row["completed"], 2, "{row}");
    let ids: Vec<_> = row["records"]["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|request| request[13].clone())
        .collect();
    let id = |number: u64| json!(format!("00000000000000ab{number:016x}"));
    assert_eq!(ids, [id(2), id(3)], "the first was the warm-up's");
    let plain = Server::start(|request| {
        assert!(!request.head.contains("x-request-id"), "{}", request.head);
        good_stream(0, 0, 2)
    });
    assert_eq!(plain.measure(level)["completed"], 2);
}
