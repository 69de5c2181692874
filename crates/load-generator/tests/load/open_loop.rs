use serde_json::{Value, json};

use crate::server::{Server, Step, good_stream};

#[test]
fn arrivals_do_not_wait_for_answers() {
    let server = Server::start(|_| good_stream(300, 0, 2));
    let row = server.measure(json!({"rate": 200.0, "requests": 40}));
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
    let row = server.measure(json!({"rate": 100.0, "requests": 20, "arrivals": "constant"}));
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
    let row = server.measure(json!({"rate": 100.0, "duration_s": 0.5, "arrivals": "constant"}));
    assert_eq!(row["completed"], 50, "{row}");
}

#[test]
fn equal_seeds_schedule_equally() {
    let server = Server::start(|_| good_stream(0, 0, 2));
    let starts = |seed: u64| -> Vec<Value> {
        let level = json!({"rate": 500.0, "requests": 10});
        let row = server.measure_with(level, |plan| plan["seed"] = json!(seed));
        let mut rows = row["records"]["rows"].as_array().expect("rows").clone();
        rows.sort_by(|a, b| a[2].as_f64().partial_cmp(&b[2].as_f64()).expect("times"));
        rows.iter().map(|row| row[2].clone()).collect()
    };
    assert_eq!(starts(1), starts(1));
    assert_ne!(starts(1), starts(2));
}

#[test]
fn sends_over_the_generators_limit_are_failures_of_their_own_kind() {
    let server = Server::start(|_| vec![Step::Hang]);
    let level = json!({"rate": 1000.0, "requests": 10});
    let row = server.measure_with(level, |plan| {
        plan["max_in_flight"] = json!(3);
        plan["timeout_s"] = json!(0.3);
    });
    assert_eq!(row["failures"]["overload"]["count"], 7, "{row}");
    assert_eq!(row["timed_out"], 3);
}
