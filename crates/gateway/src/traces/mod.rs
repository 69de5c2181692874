//! OpenTelemetry traces: each traced request's times, in batches and by a task of its own, to a collector.
//!
//! ```text
//! request ends --(bounded queue; full: dropped, counted)--> exporter --OTLP over HTTP, JSON--> collector
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::http::StatusCode;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

mod context;
mod spans;

pub use context::{Parent, TRACEPARENT, TraceContext};

use crate::config::UpstreamConfig;
use crate::error::GatewayError;
use crate::foreign::{Exchange, Failure, Upstream};
use crate::recent::EndedRequest;

/// Requests that wait to be exported; further ones are dropped.
const QUEUE: usize = 4096;
/// Requests of one batch: some fifteen spans each.
const BATCH: usize = 64;
/// What there is by then is sent.
const INTERVAL: Duration = Duration::from_secs(1);
const POST_TIMEOUT: Duration = Duration::from_secs(10);
/// A batch that the collector did not take is sent again after these times, and then dropped.
const SENT_AGAIN_AFTER: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
/// How long the last batches may take at the gateway's end.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);
/// Of a collector's answer.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Below the endpoint, in two parts: an upstream's base has a path.
const BASE: &str = "/v1";
const PATH: &str = "/traces";

pub struct Traces {
    queue: mpsc::Sender<Arc<EndedRequest>>,
    ratio: f64,
    counts: Arc<Counts>,
    stop: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
pub struct Counts {
    /// Requests whose spans the collector has taken.
    pub exported: AtomicU64,
    /// Requests whose spans are lost: too many waited, or the collector did not take them.
    pub dropped: AtomicU64,
}

impl Traces {
    /// Starts the exporter, so a runtime must be there.
    ///
    /// # Errors
    /// `GatewayError::Config` for an endpoint that is no URL.
    pub fn start(endpoint: &str, ratio: f64) -> Result<Traces, GatewayError> {
        let collector = Upstream::start_alone(&collector(endpoint), "otlp_endpoint")?;
        let (queue, ended) = mpsc::channel(QUEUE);
        let counts = Arc::new(Counts::default());
        let stop = watch::Sender::new(false);
        let exporter = Exporter {
            collector,
            counts: Arc::clone(&counts),
            stop: stop.subscribe(),
            is_failing: false,
        };
        Ok(Traces {
            queue,
            ratio,
            counts,
            stop,
            task: Mutex::new(Some(tokio::spawn(exporter.run(ended)))),
        })
    }

    /// The trace of a request, if it is to have one.
    #[must_use]
    pub fn begin(&self, parent: Option<Parent>, request_id: &str) -> Option<TraceContext> {
        TraceContext::begin(parent, request_id, self.ratio)
    }

    /// Never waits.
    pub fn offer(&self, request: Arc<EndedRequest>) {
        if self.queue.try_send(request).is_err() {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Sends what there is.
    pub async fn shutdown(&self) {
        self.stop.send_replace(true);
        let Some(mut task) = self.task.lock().take() else {
            return;
        };
        if tokio::time::timeout(CLOSE_WITHIN, &mut task).await.is_err() {
            task.abort();
        }
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
    }
}

/// Checks `otlp_endpoint` as it stands in the configuration.
///
/// # Errors
/// `GatewayError::Config` names what is allowed.
pub fn check_endpoint(endpoint: &str) -> Result<(), GatewayError> {
    collector(endpoint).base().map(drop).map_err(|reason| {
        GatewayError::Config(format!(
            "otlp_endpoint: got {endpoint:?} ({reason}), allowed is http:// or https://HOST[:PORT][/PATH]"
        ))
    })
}

fn collector(endpoint: &str) -> UpstreamConfig {
    UpstreamConfig {
        health_path: String::new(),
        ..UpstreamConfig::at(format!("{}{BASE}", endpoint.trim_end_matches('/')))
    }
}

struct Exporter {
    collector: Arc<Upstream>,
    counts: Arc<Counts>,
    stop: watch::Receiver<bool>,
    is_failing: bool,
}

/// Why a batch was not taken.
struct Refused {
    reason: String,
    /// It may be taken later.
    may_pass: bool,
}

impl Exporter {
    async fn run(mut self, mut ended: mpsc::Receiver<Arc<EndedRequest>>) {
        let mut stop = self.stop.clone();
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let room = BATCH - batch.len();
            let is_due = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                _ = tick.tick() => true,
                _ = ended.recv_many(&mut batch, room) => batch.len() >= BATCH,
            };
            if is_due {
                self.export(&mut batch).await;
            }
        }
        ended.close();
        loop {
            let room = BATCH - batch.len();
            if ended.recv_many(&mut batch, room).await == 0 {
                break;
            }
            self.export(&mut batch).await;
        }
        self.export(&mut batch).await;
    }

    /// Empties the batch, whatever becomes of it.
    async fn export(&mut self, batch: &mut Vec<Arc<EndedRequest>>) {
        if batch.is_empty() {
            return;
        }
        let requests = batch.len() as u64;
        let (document, spans) = spans::document(batch.drain(..).as_slice().iter().map(Arc::as_ref));
        let body = Bytes::from(document.to_string());
        let mut again = SENT_AGAIN_AFTER.into_iter();
        loop {
            let refused = match self.post(body.clone()).await {
                Ok(()) => {
                    self.counts.exported.fetch_add(requests, Relaxed);
                    if std::mem::take(&mut self.is_failing) {
                        tracing::info!(collector = &*self.collector.name, "traces are taken again");
                    }
                    return;
                }
                Err(refused) => refused,
            };
            let wait = again.next().filter(|_| refused.may_pass);
            if !std::mem::replace(&mut self.is_failing, true) {
                let reason = &refused.reason;
                tracing::warn!(
                    collector = &*self.collector.name,
                    reason,
                    "traces are not taken"
                );
            }
            let Some(wait) = wait else {
                self.counts.dropped.fetch_add(requests, Relaxed);
                tracing::debug!(requests, spans, "traces are dropped");
                return;
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = self.stop.wait_for(|stop| *stop) => {}
            }
        }
    }

    async fn post(&self, body: Bytes) -> Result<(), Refused> {
        let request = self.collector.post_json(PATH, body);
        let posting = async {
            let (head, mut exchange) = Exchange::start(&self.collector, request, || true).await?;
            exchange.collect(MAX_ANSWER_BYTES).await?;
            Ok::<_, Failure>(head.status)
        };
        let refused = |reason: String, may_pass| Err(Refused { reason, may_pass });
        match tokio::time::timeout(POST_TIMEOUT, posting).await {
            Ok(Ok(status)) if status.is_success() => Ok(()),
            // As the protocol says; what else is refused will be refused again.
            Ok(Ok(status)) => refused(
                format!("it answers {status}"),
                matches!(
                    status,
                    StatusCode::TOO_MANY_REQUESTS
                        | StatusCode::BAD_GATEWAY
                        | StatusCode::SERVICE_UNAVAILABLE
                        | StatusCode::GATEWAY_TIMEOUT
                ),
            ),
            Ok(Err(failure)) => refused(failure.to_string(), true),
            Err(_) => refused(format!("no answer within {POST_TIMEOUT:?}"), true),
        }
    }
}
