//! A request's way to an upstream, and its answer's way back.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;

use super::ForeignModel;
use super::asked::Asked;
use super::events::{Answers, Events};
use super::exchange::{Exchange, Failure};
use super::failed::Failed;
use super::head::Head;
use super::stream::{Counting, Deadline, Stream};
use super::upstream::Upstream;
use crate::admission::{self, Demand};
use crate::app::{App, Phase};
use crate::body::{self, ReadBody, Reading};
use crate::error::{ApiError, ApiResult};
use crate::quota;
use crate::record::{REQUEST_ID_HEADER, RequestRecord};
use crate::routing::RouteNote;
use crate::safety;
use crate::stages::Stage;
use crate::traces::TRACEPARENT;

/// A request goes to its upstream and, before the first byte of an answer, to one more.
const MAX_ATTEMPTS: usize = 2;
/// Of an answer that is not streamed.
const MAX_ANSWER_BYTES: usize = 32 << 20;
/// Of an answer that is an error.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// Reserved of a key's tokens for a request that does not limit its output.
const UNLIMITED_OUTPUT_TOKENS: u32 = 1024;
const BYTES_PER_TOKEN: u64 = 4;

/// What of a client's headers goes on, beside those that the gateway makes.
static SENT_ON: [HeaderName; 2] = [
    HeaderName::from_static(TRACEPARENT),
    HeaderName::from_static("tracestate"),
];
const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);
const SENT_BACK: [HeaderName; 3] = [
    header::CONTENT_TYPE,
    header::CACHE_CONTROL,
    header::RETRY_AFTER,
];

/// What is asked of an upstream.
#[derive(Debug, Clone, Copy)]
pub enum Endpoint {
    Chat,
    Completions,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Endpoint::Chat => "/chat/completions",
            Endpoint::Completions => "/completions",
        }
    }
}

/// The answer to a request whose model is computed elsewhere; `None` if the replicas here are to answer.
///
/// # Errors
/// The request is refused, or no upstream answers it.
pub async fn relayed(
    app: &Arc<App>,
    record: &Arc<RequestRecord>,
    endpoint: Endpoint,
    headers: &HeaderMap,
    body: &ReadBody<'_>,
) -> ApiResult<Option<Response>> {
    let live = app.live();
    if !live.fleet.has_foreign() {
        return Ok(None);
    }
    let bytes = body.bytes.clone();
    let asked = body::parse(app, record, &body.bytes, Reading::Scan, Asked::read).await?;
    let Some(model) = live.fleet.foreign(asked.model.as_deref())?.cloned() else {
        return Ok(None);
    };
    let relay = Relay {
        app,
        record,
        endpoint,
        headers,
        model,
        asked,
        body: bytes,
        deadline: None,
    };
    relay.run().await.map(Some)
}

struct Relay<'a> {
    app: &'a Arc<App>,
    record: &'a Arc<RequestRecord>,
    endpoint: Endpoint,
    headers: &'a HeaderMap,
    model: Arc<ForeignModel>,
    asked: Asked,
    body: Bytes,
    deadline: Option<Deadline>,
}

impl Relay<'_> {
    async fn run(mut self) -> ApiResult<Response> {
        let (app, record) = (self.app, self.record);
        let choices = self.asked.n.max(1);
        let demand = Demand {
            choices: choices as usize,
            max_tokens: self.asked.max_tokens,
        };
        self.deadline = self.deadline();
        let places = || app.live().config.max_in_flight;
        let deadline = self.deadline.map(|deadline| deadline.at);
        let served = &self.model.served;
        admission::name(record, served)?;
        if !self.model.is_ready() {
            app.metrics.rejected("no_replica");
            return Err(self.model.no_upstream());
        }
        admission::let_in(app, record).await?;
        let permit = admission::place(app, record, served, demand, deadline, places).await?;
        // While it waited its upstreams may have gone, and others, or other hooks, may have come.
        let live = app.live();
        let mut others = live.fleet.foreign.iter();
        if let Some(now) = others.find(|now| now.served.name == self.model.served.name) {
            self.model = Arc::clone(now);
        }
        let served = Arc::clone(&self.model.served);
        record.update(|progress| progress.model = Some(Arc::clone(&served)));
        if let Some(body) = safety::request::relayed(app, record, &served, &self.body).await? {
            self.asked = Asked::read(&body)?;
            self.body = body;
        }
        let prompt_tokens = self.body.len() as u64 / BYTES_PER_TOKEN;
        let output = u64::from(self.asked.max_tokens.unwrap_or(UNLIMITED_OUTPUT_TOKENS));
        let most = prompt_tokens + output * u64::from(choices);
        quota::reserve(app, record, i64::try_from(most).unwrap_or(i64::MAX)).await?;
        let mut counting = Some(Counting {
            record: Arc::clone(record),
            permit,
            estimated_prompt_tokens: prompt_tokens,
            choices,
        });
        self.model.request_came();
        let wish = record.update(|progress| progress.wish);
        let mut tried = Vec::new();
        let mut refusal = None;
        while tried.len() < MAX_ATTEMPTS {
            let Some((index, reason)) = self.model.pick(&tried, wish.session) else {
                break;
            };
            if refusal.is_some() {
                if !self.model.may_retry() {
                    break;
                }
                app.metrics.faults.retried();
            }
            self.model.picker.chosen(reason);
            tried.push(index);
            let upstream = Arc::clone(&self.model.upstreams[index]);
            record.update(|progress| {
                progress.replica = Some(Arc::clone(&upstream.name));
                progress.route = wish
                    .explain
                    .then(|| RouteNote::upstream(&upstream.told_as, reason.name()));
            });
            upstream.counts.requests.fetch_add(1, Relaxed);
            upstream.health.sent();
            let failed = tokio::select! {
                biased;
                attempt = self.attempt(&upstream, &mut counting) => match attempt {
                    Ok(response) => return Ok(response),
                    Err(failed) => failed,
                },
                () = app.wait_for(Phase::Stopping) => {
                    return Err(ApiError::draining(app.drain_retry_after_s()));
                }
            };
            refusal = Some(failed.answer);
            if !failed.elsewhere {
                break;
            }
        }
        refusal.map_or_else(|| Err(self.model.no_upstream()), |refusal| *refusal)
    }

    fn deadline(&self) -> Option<Deadline> {
        let own = self.asked.deadline_ms.map(Duration::from_millis);
        [
            (own, "deadline_ms"),
            (
                self.app.live().config.request_timeout(),
                "request_timeout_s",
            ),
        ]
        .into_iter()
        .filter_map(|(limit, setting)| {
            let at = self.record.started + limit?;
            Some(Deadline { at, setting })
        })
        .min_by_key(|deadline| deadline.at)
    }

    /// Sends the request to one upstream. `counting` is taken by an answer that is a stream.
    async fn attempt(
        &self,
        upstream: &Arc<Upstream>,
        counting: &mut Option<Counting>,
    ) -> Result<Response, Failed> {
        let start = Instant::now();
        let request = self.request(upstream);
        self.record.add(Stage::Route, start.elapsed());
        let first_byte = upstream.timeouts.first_byte;
        let sent = Instant::now();
        let may_resend = || {
            let may = self.model.may_retry();
            if may {
                self.app.metrics.faults.retried();
            }
            may
        };
        let exchange = Exchange::start(upstream, request, may_resend);
        let (head, mut exchange) = self
            .within(first_byte, "first_byte_timeout_s", exchange)
            .await
            .map_err(|failure| Failed::lost(self.record, upstream, &failure))?;
        if !head.status.is_success() {
            return Err(self.refused(upstream, &head, &mut exchange).await);
        }
        if is_encoded(&head.headers) {
            let failure = Failure::Lost("it is compressed, which was not asked for".to_owned());
            return Err(Failed::lost(self.record, upstream, &failure));
        }
        let name = self
            .asked
            .model
            .as_deref()
            .unwrap_or(&self.model.served.name);
        let answers = Answers::new((name != upstream.model).then_some(name));
        let is_stream = has_type(&head.headers, "text/event-stream");
        if is_stream && let Some(counted) = counting.take() {
            let events = Events::new(answers, self.asked.usage_is_ours);
            let mut stream = Stream::new(
                self.app,
                upstream,
                exchange,
                events,
                counted,
                sent,
                self.deadline,
            );
            let left = first_byte.saturating_sub(sent.elapsed());
            let waited = self
                .within(left, "first_byte_timeout_s", stream.wait_for_first())
                .await;
            if let Err(failure) = waited {
                *counting = Some(stream.into_counting());
                return Err(Failed::lost(self.record, upstream, &failure));
            }
            let body = Body::new(stream);
            return Ok(respond(
                &head,
                match self.checked() {
                    Some(checked) => checked.stream(body),
                    None => body,
                },
            ));
        }
        let whole = exchange.collect(MAX_ANSWER_BYTES);
        let idle = upstream.timeouts.first_byte;
        let json = self
            .within(idle, "first_byte_timeout_s", whole)
            .await
            .map_err(|failure| Failed::lost(self.record, upstream, &failure))?;
        if !json.trim_ascii_start().starts_with(b"{") {
            let failure = Failure::Lost("it is no JSON object".to_owned());
            return Err(Failed::lost(self.record, upstream, &failure));
        }
        upstream.succeeded();
        self.record.update(|progress| {
            progress.times.set(Stage::Upstream, sent.elapsed());
        });
        if let Some(counting) = counting {
            let usage = answers.usage(&json).map(|(usage, _)| usage);
            if usage.is_none() {
                upstream.counts.estimated.fetch_add(1, Relaxed);
            }
            counting.note(json.len() as u64 / BYTES_PER_TOKEN, usage);
        }
        let mut json = answers.renamed(&json).map_or(json, Bytes::from);
        if let Some(checked) = self.checked() {
            json = Box::pin(checked.whole(&json))
                .await
                .map_err(Failed::for_good)?;
        }
        Ok(respond(&head, Body::from(json)))
    }

    /// What checks the answer, if anything does.
    fn checked(&self) -> Option<safety::relayed::Relayed> {
        // A completion may have a choice for each of several prompts.
        let choices = matches!(self.endpoint, Endpoint::Chat).then_some(self.asked.n);
        let wants_usage = self.asked.stream && !self.asked.usage_is_ours;
        safety::relayed::Relayed::of(&self.model.served, self.record, choices, wants_usage)
    }

    /// Waits for an upstream no longer than `limit`, and than the request may live.
    async fn within<T>(
        &self,
        limit: Duration,
        setting: &'static str,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let until = Instant::now() + limit;
        let (until, setting) = match self.deadline {
            Some(deadline) if deadline.at < until => (deadline.at, deadline.setting),
            _ => (until, setting),
        };
        tokio::time::timeout_at(until.into(), work)
            .await
            .unwrap_or(Err(Failure::Late(setting)))
    }

    /// An answer that is not a success.
    async fn refused(&self, upstream: &Upstream, head: &Head, exchange: &mut Exchange) -> Failed {
        let body = exchange.collect(MAX_ERROR_BYTES);
        let body = self
            .within(upstream.timeouts.idle, "idle_timeout_s", body)
            .await
            .unwrap_or_default();
        Failed::refused(upstream, head, respond(head, Body::from(body)))
    }

    /// What is sent to an upstream, in parts.
    fn request(&self, upstream: &Upstream) -> Vec<Bytes> {
        let mut parts = self.asked.parts(&self.body, &upstream.model);
        let made: [(&HeaderName, &[u8]); 2] = [
            (&header::CONTENT_TYPE, b"application/json"),
            (&REQUEST_ID, self.record.id.as_bytes()),
        ];
        let trace = self.record.trace.and_then(|trace| trace.header());
        let given = SENT_ON.iter().filter_map(|name| {
            let ours = trace.as_ref().filter(|_| *name == TRACEPARENT);
            let value = ours.or_else(|| self.headers.get(name))?;
            Some((name, value.as_bytes()))
        });
        let headers: Vec<_> = made.into_iter().chain(given).collect();
        let body_bytes = parts.iter().map(Bytes::len).sum();
        let path = self.endpoint.path();
        parts.insert(0, upstream.head("POST", path, &headers, body_bytes));
        parts
    }
}

fn copy(names: &[HeaderName], from: &HeaderMap, to: &mut HeaderMap) {
    for name in names {
        if let Some(value) = from.get(name) {
            to.insert(name.clone(), value.clone());
        }
    }
}

fn respond(head: &Head, body: Body) -> Response {
    let mut response = body.into_response();
    *response.status_mut() = head.status;
    copy(&SENT_BACK, &head.headers, response.headers_mut());
    if has_type(&head.headers, "text/event-stream") {
        let name = HeaderName::from_static("x-accel-buffering");
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static("no"));
    }
    response
}

fn has_type(headers: &HeaderMap, kind: &str) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.trim_start().starts_with(kind))
}

fn is_encoded(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|value| value != "identity")
}
