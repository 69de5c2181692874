//! One upstream's answer, up to its first event or its end; and a second one's beside it, if the first is late.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderName, header};
use bytes::Bytes;
use futures_util::future::{Either, select};
use scalellm_accounts::Class;

use super::{Relay, has_type, respond};
use crate::foreign::events::Events;
use crate::foreign::exchange::{Exchange, Failure};
use crate::foreign::failed::Failed;
use crate::foreign::head::Head;
use crate::foreign::pick::Reason;
use crate::foreign::stream::Source;
use crate::foreign::upstream::Upstream;
use crate::record::REQUEST_ID_HEADER;
use crate::routing::RouteNote;
use crate::stages::Stage;
use crate::traces::TRACEPARENT;

/// Of an answer that is not streamed.
const MAX_ANSWER_BYTES: usize = 32 << 20;
/// Of an answer that is an error.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// What of a client's headers goes on, beside those that the gateway makes.
static SENT_ON: [HeaderName; 2] = [
    HeaderName::from_static(TRACEPARENT),
    HeaderName::from_static("tracestate"),
];
const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);

/// An answer that is a success, and when it was asked for.
#[expect(
    clippy::large_enum_variant,
    reason = "it is taken apart at once, and most are streams"
)]
pub enum Answer {
    /// With its first events: what fails before them can be tried elsewhere.
    Stream(Head, Instant, Source, Bytes),
    Whole(Head, Instant, Bytes),
}

impl Relay<'_> {
    /// The upstream to try next, and why that.
    pub fn next(&self, tried: &[usize]) -> Option<(usize, Reason)> {
        let wish = self.record.update(|progress| progress.wish);
        self.model.pick(tried, wish.session, &self.prompt)
    }

    /// Notes that a request goes to it.
    fn chosen(&self, (index, reason): (usize, Reason), tried: &mut Vec<usize>) -> &Arc<Upstream> {
        self.model.picker.chosen(reason);
        tried.push(index);
        let upstream = &self.model.upstreams[index];
        self.told(upstream, reason);
        upstream.sent(&self.prompt);
        upstream
    }

    fn told(&self, upstream: &Upstream, reason: Reason) {
        self.record.update(|progress| {
            progress.replica = Some(Arc::clone(&upstream.name));
            progress.route = progress
                .wish
                .explain
                .then(|| RouteNote::upstream(&upstream.told_as, reason.name()));
        });
    }

    /// Asks the upstream that was chosen, and another one beside it if it has not begun to answer in time, and that is
    /// wanted: who begins first answers, and the other connection is closed, which ends the request there.
    pub async fn attempts(
        &self,
        choice: (usize, Reason),
        tried: &mut Vec<usize>,
    ) -> Result<(Arc<Upstream>, Answer), Failed> {
        let upstream = self.chosen(choice, tried);
        let first = self.attempt(upstream);
        // One that is not streamed says nothing before its end: that it is late means nothing.
        match self
            .model
            .hedge_after
            .filter(|_| self.asked.stream && !self.is_batch())
        {
            None => first.await,
            Some(after) => Box::pin(self.hedged(upstream, first, after, choice, tried)).await,
        }
    }

    async fn hedged(
        &self,
        upstream: &Upstream,
        first: impl Future<Output = Result<(Arc<Upstream>, Answer), Failed>>,
        after: Duration,
        choice: (usize, Reason),
        tried: &mut Vec<usize>,
    ) -> Result<(Arc<Upstream>, Answer), Failed> {
        let mut first = pin!(first);
        if let Ok(ended) = tokio::time::timeout(after, &mut first).await {
            return ended;
        }
        let Some(index) = self.beside(tried) else {
            return first.await;
        };
        self.app.metrics.faults.hedged();
        let second = self.attempt(self.chosen((index, Reason::Hedge), tried));
        // What is the client's doing ends both; what is not leaves the other.
        let (ended, by_first) = match select(first, pin!(second)).await {
            Either::Left((Err(failed), second)) if !failed.is_for_client() => (second.await, false),
            Either::Right((Err(failed), first)) if !failed.is_for_client() => (first.await, true),
            Either::Left((ended, _)) => (ended, true),
            Either::Right((ended, _)) => (ended, false),
        };
        if by_first {
            self.told(upstream, choice.1);
        } else if ended.is_ok() {
            self.app.metrics.faults.hedge_won();
            // The next ones need not wait for it as well.
            upstream.health.refused(None);
        }
        ended
    }

    /// One to ask beside another, if the budget allows.
    fn beside(&self, tried: &[usize]) -> Option<usize> {
        let may = self.model.is_one_beside(tried) && self.model.may_hedge();
        let (index, _) = may.then(|| self.next(tried)).flatten()?;
        Some(index)
    }

    /// Nobody waits for it.
    fn is_batch(&self) -> bool {
        let key = self.record.key();
        key.is_some_and(|state| state.key().class == Class::Batch)
    }

    /// Asks one upstream.
    async fn attempt(&self, upstream: &Arc<Upstream>) -> Result<(Arc<Upstream>, Answer), Failed> {
        let start = Instant::now();
        let request = self.request(upstream);
        self.record.add(Stage::Route, start.elapsed());
        let sent = Instant::now();
        let limit = upstream.timeouts.first_byte;
        let lost = |failure: Failure| Failed::lost(self.record, upstream, &failure);
        let may_resend = || {
            let may = self.model.may_retry();
            if may {
                self.app.metrics.faults.retried();
            }
            may
        };
        let exchange = Exchange::start(upstream, request, may_resend);
        let (head, mut exchange) = self
            .within(limit, "first_byte_timeout_s", exchange)
            .await
            .map_err(lost)?;
        upstream.reached();
        if !head.status.is_success() {
            return Err(self.refused(upstream, &head, &mut exchange).await);
        }
        if is_encoded(&head) {
            let what = "it is compressed, which was not asked for".to_owned();
            return Err(lost(Failure::Lost(what)));
        }
        let answer = if has_type(&head.headers, "text/event-stream") {
            let events = Events::new(self.answers(upstream), self.asked.usage_is_ours);
            let mut source = Source::new(exchange, events);
            let left = limit.saturating_sub(sent.elapsed());
            let first = self
                .within(left, "first_byte_timeout_s", source.first())
                .await
                .map_err(lost)?;
            Answer::Stream(head, sent, source, first)
        } else {
            let whole = exchange.collect(MAX_ANSWER_BYTES);
            let json = self
                .within(limit, "first_byte_timeout_s", whole)
                .await
                .map_err(lost)?;
            if !json.trim_ascii_start().starts_with(b"{") {
                return Err(lost(Failure::Lost("it is no JSON object".to_owned())));
            }
            Answer::Whole(head, sent, json)
        };
        upstream.health.succeeded();
        Ok((Arc::clone(upstream), answer))
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

fn is_encoded(head: &Head) -> bool {
    head.headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|value| value != "identity")
}
