//! A request's way to an upstream, and its answer's way back.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use scalellm_routing::Prefixes;

use super::ForeignModel;
use super::asked::Asked;
use super::beside::{Chosen, Turn};
use super::events::Answers;
use super::head::Head;
use super::stream::{Counting, Deadline, Stream};
use super::upstream::Upstream;
use crate::admission::{self, Demand};
use crate::app::{App, Phase};
use crate::error::{ApiError, ApiResult};
use crate::quota;
use crate::record::RequestRecord;
use crate::safety;
use crate::stages::Stage;

mod attempt;

use attempt::Answer;

/// A request goes to its upstream and, before the first byte of an answer, to one more.
const MAX_ATTEMPTS: usize = 2;
/// Reserved of a key's tokens for a request that does not limit its output.
const UNLIMITED_OUTPUT_TOKENS: u32 = 1024;
const BYTES_PER_TOKEN: u64 = 4;

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

/// A request on its way to an upstream.
pub struct Relay<'a> {
    pub(super) app: &'a Arc<App>,
    pub(super) record: &'a Arc<RequestRecord>,
    pub(super) endpoint: Endpoint,
    pub(super) headers: &'a HeaderMap,
    pub(super) model: Arc<ForeignModel>,
    pub(super) asked: Asked,
    pub(super) body: Bytes,
    pub(super) prompt: Prefixes,
    /// The first to ask, where that was chosen before.
    pub(super) chosen: Option<Chosen>,
    pub(super) deadline: Option<Deadline>,
    /// No upstream gave an answer, and another server might.
    pub(super) unanswered: bool,
}

impl Relay<'_> {
    /// Whose turn it is. Ids are for the replicas, whose tokenizer they are of.
    pub fn turn(&self, own_is_ready: bool) -> Turn {
        if own_is_ready && self.asked.prompt.is_ids(&self.body) {
            return Turn::Replicas(self.model.for_replicas());
        }
        let wish = self.record.update(|progress| progress.wish);
        self.model.turn(own_is_ready, wish.session, &self.prompt)
    }

    /// Whether the replicas are to answer what no upstream did.
    pub fn goes_to_replicas(&self) -> bool {
        let live = self.app.live();
        let own = live.fleet.own(&self.model.served);
        let goes = self.unanswered
            && self.model.shares()
            && own.is_some_and(|model| model.is_ready())
            && self.model.may_retry();
        if goes {
            self.app.metrics.faults.retried();
        }
        goes
    }

    /// # Errors
    /// The request is refused, or no upstream answers it.
    pub async fn run(&mut self) -> ApiResult<Response> {
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
            self.unanswered = true;
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
        let counting = Counting {
            record: Arc::clone(record),
            permit,
            estimated_prompt_tokens: prompt_tokens,
            choices,
        };
        self.model.request_came();
        let chosen = self.chosen.take();
        let mut first = chosen.and_then(|chosen| self.model.still(chosen));
        let mut tried = Vec::new();
        let mut refusal = None;
        for _ in 0..MAX_ATTEMPTS {
            let Some(next) = first.take().or_else(|| self.next(&tried)) else {
                break;
            };
            if refusal.is_some() {
                if !self.model.may_retry() {
                    break;
                }
                app.metrics.faults.retried();
            }
            let attempt = tokio::select! {
                biased;
                attempt = self.attempts(next, &mut tried) => attempt,
                () = app.wait_for(Phase::Stopping) => {
                    return Err(ApiError::draining(app.drain_retry_after_s()));
                }
            };
            let failed = match attempt {
                Ok((upstream, answer)) => return self.answer(&upstream, answer, counting).await,
                Err(failed) => failed,
            };
            if !failed.elsewhere {
                return *failed.answer;
            }
            refusal = Some(failed.answer);
        }
        self.unanswered = true;
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

    /// What goes to the client, now that an upstream has begun to answer.
    async fn answer(
        &self,
        upstream: &Arc<Upstream>,
        answer: Answer,
        mut counting: Counting,
    ) -> ApiResult<Response> {
        let (head, sent, json) = match answer {
            Answer::Stream(head, sent, source, first) => {
                let stream = Stream::new(
                    self.app,
                    upstream,
                    source,
                    first,
                    counting,
                    sent,
                    self.deadline,
                );
                let body = Body::new(stream);
                let body = match self.checked() {
                    Some(checked) => checked.stream(body),
                    None => body,
                };
                return Ok(respond(&head, body));
            }
            Answer::Whole(head, sent, json) => (head, sent, json),
        };
        self.record.update(|progress| {
            progress.times.set(Stage::Upstream, sent.elapsed());
        });
        let answers = self.answers(upstream);
        let usage = answers.usage(&json).map(|(usage, _)| usage);
        if usage.is_none() {
            upstream.counts.estimated.fetch_add(1, Relaxed);
        }
        counting.note(json.len() as u64 / BYTES_PER_TOKEN, usage);
        let mut json = answers.renamed(&json).map_or(json, Bytes::from);
        if let Some(checked) = self.checked() {
            json = Box::pin(checked.whole(&json)).await?;
        }
        Ok(respond(&head, Body::from(json)))
    }

    /// How its answers become ours.
    fn answers(&self, upstream: &Upstream) -> Answers {
        let name = self
            .asked
            .model
            .as_deref()
            .unwrap_or(&self.model.served.name);
        Answers::new((name != upstream.model).then_some(name))
    }

    /// What checks the answer, if anything does.
    fn checked(&self) -> Option<safety::relayed::Relayed> {
        // A completion may have a choice for each of several prompts.
        let choices = matches!(self.endpoint, Endpoint::Chat).then_some(self.asked.n);
        let wants_usage = self.asked.stream && !self.asked.usage_is_ours;
        safety::relayed::Relayed::of(&self.model.served, self.record, choices, wants_usage)
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
