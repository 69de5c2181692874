//! `GET /metrics`

mod models;
mod replicas;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use crate::app::App;
use crate::metrics::sample;

pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let live = app.live();
    let fleet = &live.fleet;
    let mut out = String::with_capacity(64 << 10);
    for (name, help, value) in [
        (
            "scalellm_requests_in_flight",
            "HTTP requests whose response has not ended.",
            app.in_flight(),
        ),
        (
            "scalellm_generations_in_flight",
            "Places of running requests, of max_in_flight for each model.",
            fleet
                .served
                .iter()
                .map(|served| served.admission.taken())
                .sum(),
        ),
        (
            "scalellm_tasks",
            "Tasks of the gateway: a few, and one for each connection.",
            tokio::runtime::Handle::current()
                .metrics()
                .num_alive_tasks(),
        ),
        (
            "scalellm_body_memory_bytes",
            "Memory held by request bodies, of max_body_memory_bytes.",
            app.body_memory.taken_bytes(),
        ),
        (
            "scalellm_text_queue",
            "Prompts that wait for a thread, of text_queue.",
            app.text_pool.queued(),
        ),
    ] {
        sample(&mut out, name, "gauge", help, value);
    }
    models::write_queues(&mut out, fleet);
    models::write_text_cache(&mut out, fleet);
    models::write_routing(&mut out, fleet);
    write_accounts(&mut out, &app);
    write_traces(&mut out, &app);
    models::write_upstreams(&mut out, fleet);
    app.metrics.write(&mut out);
    replicas::write(&mut out, fleet);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], out).into_response()
}

fn write_traces(out: &mut String, app: &App) {
    let Some(traces) = &app.traces else {
        return;
    };
    let counts = traces.counts();
    for (name, help, count) in [
        (
            "scalellm_traces_exported_total",
            "Requests whose trace the collector has taken.",
            &counts.exported,
        ),
        (
            "scalellm_traces_dropped_total",
            "Requests whose trace is lost: too many waited, or the collector did not take it.",
            &counts.dropped,
        ),
    ] {
        sample(out, name, "counter", help, count.load(Relaxed));
    }
}

fn write_accounts(out: &mut String, app: &App) {
    let Some(accounts) = &app.accounts else {
        return;
    };
    let counts = accounts.counts();
    for (name, kind, help, value) in [
        (
            "scalellm_accounts_database_up",
            "gauge",
            "1 while the database of keys and usage answers.",
            u64::from(counts.database_up),
        ),
        (
            "scalellm_accounts_database_failures_total",
            "counter",
            "Questions that it did not answer.",
            counts.database_failures,
        ),
        (
            "scalellm_accounts_keys",
            "gauge",
            "Keys in use lately.",
            counts.keys_known as u64,
        ),
        (
            "scalellm_usage_waiting",
            "gauge",
            "Ended requests whose usage is not written yet.",
            counts.usage_waiting as u64,
        ),
        (
            "scalellm_usage_written_total",
            "counter",
            "Ended requests whose usage is written.",
            counts.usage_written,
        ),
        (
            "scalellm_usage_lost_total",
            "counter",
            "Ended requests whose usage is lost: too much waited.",
            counts.usage_lost,
        ),
    ] {
        sample(out, name, kind, help, value);
    }
}
