use serde_json::json;

use crate::server::{Server, Step, every_ms, good_stream};

#[test]
fn arrivals_do_not_wait_for_answers() {
    let server = Server::start(|_| good_stream(300, 0, 2));
    let row = server.measure(json!({"rate": 200.0, "send_at_s": every_ms(5.0, 40)}));
    assert_eq!(row["completed"], 40, "{row}");
    assert_eq!(row["rate"], 200.0);
    // One after the other they would take twelve seconds.
    assert!(row["duration_s"].as_f64().expect("duration") < 6.0, "{row}");
}

#[test]
fn a_stalled_server_shows_in_the_wait_from_the_scheduled_send() {
    // One connection at a time is served: a queue builds up, and every wait in it must show.
    let busy = std::sync::Mutex::new(());
    let server = Server::start(move |_| {
        let _one_at_a_time = busy.lock().expect("lock");
        std::thread::sleep(std::time::Duration::from_millis(40));
        good_stream(0, 0, 2)
    });
    let row = server.measure(json!({"send_at_s": every_ms(10.0, 20)}));
    assert_eq!(row["completed"], 20, "{row}");
    // Sent over 200 ms, served over 800: the last waits 600, the median 300.
    assert!(
        row["ttft_ms"]["p99"].as_f64().expect("p99") >= 500.0,
        "{row}"
    );
    assert!(
        row["ttft_ms"]["p50"].as_f64().expect("p50") >= 200.0,
        "{row}"
    );
}

#[test]
fn a_duration_bounds_the_arrivals() {
    let server = Server::start(|_| good_stream(0, 0, 2));
    let row = server.measure(json!({"duration_s": 0.5, "send_at_s": every_ms(10.0, 100)}));
    assert_eq!(row["completed"], 50, "{row}");
}

#[test]
fn each_scheduled_send_takes_the_prompt_of_its_place() {
    let server = Server::start(|_| good_stream(0, 0, 2));
    let send_at_s = [0.0, 0.0, 0.05, 0.05, 0.2];
    let row = server.measure_with(json!({"send_at_s": send_at_s}), |plan| {
        plan["prompts"] = (0..5).map(|id| json!({"token_ids": [id]})).collect();
    });
    let mut rows = row["records"]["rows"].as_array().expect("rows").clone();
    rows.sort_by_key(|row| row[1].as_u64());
    let starts: Vec<_> = rows
        .iter()
        .map(|row| row[2].as_f64().expect("time"))
        .collect();
    assert_eq!(starts, send_at_s.map(|at| at * 1e3));
}

#[test]
fn a_conversation_goes_on_with_the_answers_and_waits_from_when_its_user_has_thought() {
    let server = Server::start(|request| {
        let messages = request.body["messages"].as_array().expect("messages");
        let roles: Vec<_> = messages.iter().map(|message| &message["role"]).collect();
        assert_eq!(roles[..2], ["system", "user"]);
        assert!(
            roles[2..]
                .chunks(2)
                .all(|pair| pair == ["assistant", "user"])
        );
        for answer in messages
            .iter()
            .filter(|message| message["role"] == "assistant")
        {
            assert_eq!(answer["content"], " a a a", "the server's own answer");
        }
        good_stream(0, 0, 3)
    });
    let row = server.measure_with(json!({"send_at_s": [0.0, 0.01]}), |plan| {
        plan["endpoint"] = json!("chat");
        plan["prompts"] = json!([{
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "turns": [{"text": "v", "after_s": 0.05}, {"text": "w"}],
        }]);
    });
    assert_eq!(
        (&row["completed"], &row["failed"]),
        (&json!(6), &json!(0)),
        "{row}"
    );
    let rows = row["records"]["rows"].as_array().expect("rows");
    let turns = |turn: u64| rows.iter().filter(move |row| row[12] == turn);
    assert_eq!(
        (turns(0).count(), turns(1).count(), turns(2).count()),
        (2, 2, 2)
    );
    assert!(
        turns(1).all(|row| row[2].as_f64() >= Some(50.0)),
        "thinking: {rows:?}"
    );
    // The wait does not count the thinking.
    assert!(
        turns(1).all(|row| row[7].as_f64() < row[2].as_f64()),
        "{rows:?}"
    );
}

#[test]
fn sends_over_the_generators_limit_are_failures_of_their_own_kind() {
    let server = Server::start(|_| vec![Step::Hang]);
    let level = json!({"send_at_s": every_ms(1.0, 10)});
    let row = server.measure_with(level, |plan| {
        plan["max_in_flight"] = json!(3);
        plan["timeout_s"] = json!(0.3);
    });
    assert_eq!(row["failures"]["overload"]["count"], 7, "{row}");
    assert_eq!(row["timed_out"], 3);
}
