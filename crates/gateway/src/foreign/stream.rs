//! A foreign engine's events on their way to the client. Nothing is read that the client does not take, so what waits
//! is bounded by the connection's buffers.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::time::Sleep;

use super::events::{Events, Usage};
use super::exchange::{Exchange, Failure};
use super::upstream::Upstream;
use crate::admission::Permit;
use crate::app::{App, Phase};
use crate::error::{ApiError, ErrorNote};
use crate::record::RequestRecord;
use crate::stages::Stage;

/// After `[DONE]` the upstream may take this long to end its answer; then the connection is not used again.
const END_WITHIN: Duration = Duration::from_secs(1);

/// The latest end of a request, and the setting that says so.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    pub at: Instant,
    pub setting: &'static str,
}

/// What a request is counted by.
pub struct Counting {
    pub record: Arc<RequestRecord>,
    pub permit: Permit,
    /// From the body's length, until the upstream tells.
    pub estimated_prompt_tokens: u64,
    pub choices: u32,
}

impl Counting {
    /// Takes in how far an answer has come.
    pub fn note(&mut self, events: u64, usage: Option<Usage>) {
        let estimate = Usage {
            prompt_tokens: self.estimated_prompt_tokens,
            completion_tokens: events,
            prompt_tokens_details: None,
        };
        let usage = usage.unwrap_or(estimate);
        self.permit
            .used(usage.prompt_tokens + usage.completion_tokens);
        self.record.update(|progress| {
            progress.prompt_tokens = usage.prompt_tokens;
            progress.cached_tokens = usage.cached_tokens();
            progress.output_tokens = usage.completion_tokens;
            progress.longest_choice_tokens =
                usage.completion_tokens.div_ceil(u64::from(self.choices));
        });
    }

    /// A part of the answer has come; the first one ends the wait for the upstream.
    pub fn came(&self, sent: Instant) {
        let now = Instant::now();
        self.record.update(|progress| {
            if progress.first_tokens.is_none() {
                let waited = now.saturating_duration_since(sent);
                progress.times.set(Stage::Upstream, waited);
                let first = now.saturating_duration_since(self.record.started);
                progress.times.set(Stage::First, first);
            }
            progress.tokens_came(now);
        });
    }
}

/// Events as an upstream sends them.
pub struct Source {
    exchange: Exchange,
    events: Events,
    /// When something came last.
    came: Instant,
}

impl Source {
    #[must_use]
    pub fn new(exchange: Exchange, events: Events) -> Source {
        Source {
            exchange,
            events,
            came: Instant::now(),
        }
    }

    /// Waits for the first events.
    ///
    /// # Errors
    /// There are none.
    pub async fn first(&mut self) -> Result<Bytes, Failure> {
        let first = std::future::poll_fn(|cx| self.poll(cx)).await?;
        first.ok_or_else(|| Failure::Lost("there was nothing in it".to_owned()))
    }

    /// The next whole events; `None` at the end.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Failure>> {
        loop {
            let Some(data) = ready!(self.exchange.poll_data(cx)) else {
                let whole = self.events.done || self.events.failed;
                let unfinished = || Failure::Lost("it ended without [DONE]".to_owned());
                return Poll::Ready(if whole { Ok(None) } else { Err(unfinished()) });
            };
            let data = data?;
            self.came = Instant::now();
            let events = self
                .events
                .push(data)
                .map_err(|_| Failure::Lost("an event does not end".to_owned()))?;
            if !events.is_empty() {
                return Poll::Ready(Ok(Some(events)));
            }
        }
    }
}

/// The body of a streamed answer.
pub struct Stream {
    app: Arc<App>,
    upstream: Arc<Upstream>,
    source: Source,
    counting: Counting,
    /// What came until then is counted.
    counted: Option<Instant>,
    sent: Instant,
    /// Events that came before the head was answered.
    first: Option<Bytes>,
    ended: bool,
    deadline: Option<Deadline>,
    /// Fires now and then, and looks whether it is too late.
    timer: Pin<Box<Sleep>>,
    stopping: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Stream {
    #[must_use]
    pub fn new(
        app: &Arc<App>,
        upstream: &Arc<Upstream>,
        source: Source,
        first: Bytes,
        counting: Counting,
        sent: Instant,
        deadline: Option<Deadline>,
    ) -> Stream {
        let stopping = {
            let app = Arc::clone(app);
            async move { app.wait_for(Phase::Stopping).await }
        };
        let mut stream = Stream {
            app: Arc::clone(app),
            upstream: Arc::clone(upstream),
            source,
            counting,
            counted: None,
            sent,
            first: Some(first),
            ended: false,
            deadline,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            stopping: Box::pin(stopping),
        };
        let limit = stream.next_limit();
        stream.timer.as_mut().reset(limit.into());
        stream.count();
        stream
    }

    /// The next whole events; `None` at the end.
    fn poll_events(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Failure>> {
        let events = self.source.poll(cx);
        self.count();
        events
    }

    /// Counts what has come since it was last called.
    fn count(&mut self) {
        let Source { events, came, .. } = &self.source;
        if events.count > 0 && self.counted.replace(*came) != Some(*came) {
            self.counting.came(self.sent);
            self.counting.note(events.count, events.usage);
        }
    }

    fn next_limit(&self) -> Instant {
        let idle = if self.source.events.done {
            END_WITHIN
        } else {
            self.upstream.timeouts.idle
        };
        let next = self.source.came + idle;
        self.deadline.map_or(next, |deadline| next.min(deadline.at))
    }

    /// The error that ends a stream at what came last.
    fn overdue(&self) -> Option<Box<ApiError>> {
        if self.app.phase() >= Phase::Stopping {
            return Some(ApiError::draining(self.app.drain_retry_after_s()));
        }
        let passed = self
            .deadline
            .filter(|deadline| deadline.at <= self.source.came);
        passed.map(|deadline| late(deadline.setting))
    }

    /// The error that ends a wait which has lasted too long.
    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<Option<Box<ApiError>>> {
        if self.stopping.as_mut().poll(cx).is_ready() {
            let retry_after_s = self.app.drain_retry_after_s();
            return Poll::Ready(Some(ApiError::draining(retry_after_s)));
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let limit = self.next_limit();
            if limit <= Instant::now() {
                break;
            }
            self.timer.as_mut().reset(limit.into());
        }
        if self.source.events.done {
            return Poll::Ready(None);
        }
        match self.deadline {
            Some(deadline) if deadline.at <= Instant::now() => {
                Poll::Ready(Some(late(deadline.setting)))
            }
            _ => {
                let failure = Failure::Late("idle_timeout_s");
                self.upstream.lost(&failure);
                Poll::Ready(Some(error(&self.upstream, &failure)))
            }
        }
    }

    /// The last event of a stream that an error ends.
    fn fail(&mut self, error: &ApiError) -> Bytes {
        let note = error.note();
        self.ended = true;
        let status = error.status.as_u16();
        self.counting
            .record
            .update(|progress| progress.failed = Some((status, note)));
        [b"data: ".as_slice(), &error.to_json(), b"\n\n"]
            .concat()
            .into()
    }

    fn end(&mut self) {
        self.ended = true;
        if self.source.events.failed {
            let note = ErrorNote {
                code: Some("upstream_failed"),
                param: None,
                message: Some("the upstream told of an error in its stream".to_owned()),
            };
            let status = StatusCode::BAD_GATEWAY.as_u16();
            self.counting
                .record
                .update(|progress| progress.failed = Some((status, note)));
            return;
        }
        if self.source.events.usage.is_none() {
            self.upstream.counts.estimated.fetch_add(1, Relaxed);
        }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let error = match this.poll_events(cx) {
            // An upstream that always has more would never come to the timers.
            Poll::Ready(Ok(Some(events))) => match this.overdue() {
                Some(error) if !this.source.events.done => error,
                _ => return Poll::Ready(Some(Ok(Frame::data(events)))),
            },
            Poll::Ready(Ok(None)) => {
                this.end();
                return Poll::Ready(None);
            }
            Poll::Ready(Err(failure)) => {
                this.upstream.lost(&failure);
                this.upstream.counts.failures.fetch_add(1, Relaxed);
                error(&this.upstream, &failure)
            }
            Poll::Pending => match ready!(this.poll_limits(cx)) {
                Some(error) => error,
                None => {
                    this.end();
                    return Poll::Ready(None);
                }
            },
        };
        Poll::Ready(Some(Ok(Frame::data(this.fail(&error)))))
    }
}

/// A failure as the client is told of it.
#[must_use]
pub fn error(upstream: &Upstream, failure: &Failure) -> Box<ApiError> {
    // Why it cannot be reached may tell its address: that is in the log.
    let reason = match failure {
        Failure::Connect(_) => "it cannot be reached".to_owned(),
        other => other.to_string(),
    };
    let message = format!("the upstream {} failed: {reason}", upstream.told_as);
    match failure {
        Failure::Late(_) => ApiError::upstream_late(message),
        _ => ApiError::upstream_failed(message),
    }
}

#[must_use]
pub fn late(setting: &str) -> Box<ApiError> {
    ApiError::deadline(format!("the request was not finished within its {setting}"))
}
