//! One choice's way through the engines: routed, submitted, and moved on when its replica fails it.
//!
//! ```text
//!  start --> Running --outputs--> finished
//!   |  ^        |   ^
//!   |  |  lost, |   | submitted again with all ids received,
//!   v  |  drained   | to a replica that continues them exactly
//!  Waiting      v   |
//!    |        Paused --no such replica in time, or too many deaths--> error
//!    '--none in `replica_wait_s`--> error
//! ```
//!
//! What a replica refuses goes to one other at once: nothing has begun. While the first replica says nothing, a second
//! may be asked beside it (`hedge`).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use scalellm_engine_link::proto::{self, FinishReason};
use scalellm_engine_link::{LostCause, RequestStream, StreamError};
use scalellm_routing::Choice;
use tokio::time::{Sleep, sleep};

use crate::app::App;
use crate::error::ApiResult;
use crate::fault_metrics::Waiting;
use crate::fleet::Model;
use crate::replay::{Cause, Failures, Loss, Pause, Place};
use crate::routing::{Placement, RouteWish};
use crate::stages::micros;

mod hedge;
mod lost;
mod sending;

use hedge::Hedge;
use lost::given_up;

/// Replicas that a choice is offered to before one has taken it.
const MAX_OFFERS: u32 = 2;
/// Between two looks for a replica to go on at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A choice's outputs. Dropping it cancels the choice in the engine.
pub struct Attempt {
    run: Run,
    prompt: Arc<[u32]>,
    /// What a replica is sent, but for the prompt; `resume_ids` are all ids received.
    submit: proto::Submit,
    wish: RouteWish,
    /// Kept until the first output.
    placement: Option<Placement>,
    deadline: Option<Instant>,
    place: Place,
    /// The engine there, as it described itself.
    engine: Option<Arc<proto::DescribeResponse>>,
    /// Whether it has given an output.
    answered: bool,
    tries: u32,
    replays: u32,
    /// Losses but for those by which a replica hands on, while it ends, what has got on there.
    losses: u32,
    ids_at_loss: usize,
    refusals: u32,
    failures: Failures,
    /// Since when it waits, or waited, for a replica that takes it.
    waits_since: Option<Instant>,
    waited: Duration,
    pause: Option<Box<Pause>>,
    /// Until the first output, or failure.
    hedge: Option<Box<Hedge>>,
}

enum Run {
    Running(RequestStream),
    /// For its first replica; none is there.
    Waiting {
        timer: Pin<Box<Sleep>>,
        _counted: Waiting,
    },
    Paused(Pin<Box<Sleep>>),
}

impl Attempt {
    /// Submits to `preferred`, or where the policy says. `submit` is without the prompt's ids.
    ///
    /// # Errors
    /// 503 when no replica takes it, and none is waited for.
    pub fn start(
        app: &App,
        model: &Model,
        submit: proto::Submit,
        prompt: &Arc<[u32]>,
        wish: RouteWish,
        deadline: Option<Instant>,
        preferred: Option<usize>,
    ) -> ApiResult<Attempt> {
        model.faults.request();
        let mut attempt = Attempt {
            run: Run::Paused(Box::pin(sleep(Duration::ZERO))),
            prompt: Arc::clone(prompt),
            submit,
            wish,
            placement: None,
            deadline,
            place: Place::default(),
            engine: None,
            answered: false,
            tries: 0,
            replays: 0,
            losses: 0,
            ids_at_loss: 0,
            refusals: 0,
            failures: Failures::default(),
            waits_since: None,
            waited: Duration::ZERO,
            pause: None,
            hedge: None,
        };
        attempt.begin(app, model, preferred)?;
        Ok(attempt)
    }

    /// Submits what has not begun, or waits for a replica to come.
    fn begin(&mut self, app: &App, model: &Model, preferred: Option<usize>) -> ApiResult<()> {
        if !self.submit_to_any(app, model, preferred) {
            return self.wait_for_replica(app, model);
        }
        self.waited = self.waits_since.map_or(Duration::ZERO, |at| at.elapsed());
        let hedge_after = model.faults.config.hedge_after();
        // Nobody waits for batch work.
        self.hedge = hedge_after.filter(|_| !self.wish.batch).map(Hedge::after);
        Ok(())
    }

    /// Why the policy chose the replica, while it has not answered.
    #[must_use]
    pub fn route(&self) -> Option<Choice> {
        self.placement.as_ref().map(|placement| placement.choice)
    }

    /// The replica that runs it now, or ran it last; `None` while it waits for its first.
    #[must_use]
    pub fn replica(&self) -> Option<usize> {
        (!matches!(self.run, Run::Waiting { .. })).then_some(self.place.replica)
    }

    /// For how long no replica took it.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Replicas that it outlived.
    #[must_use]
    pub fn replays(&self) -> u32 {
        self.replays
    }

    /// The next output. After an error, or the output with a finish reason, it must not be polled again.
    pub fn poll_output(
        &mut self,
        app: &App,
        model: &Arc<Model>,
        cx: &mut Context<'_>,
    ) -> Poll<ApiResult<proto::Output>> {
        loop {
            let loss = match &mut self.run {
                Run::Waiting { timer, .. } => {
                    ready!(timer.as_mut().poll(cx));
                    self.begin(app, model, None)?;
                    continue;
                }
                Run::Paused(timer) => {
                    ready!(timer.as_mut().poll(cx));
                    self.go_on(app, model)?;
                    continue;
                }
                Run::Running(stream) => match ready!(match stream.poll_next_unpin(cx) {
                    Poll::Pending => self.poll_hedge(app, model, cx).map(|o| Some(Ok(o))),
                    said @ Poll::Ready(_) => said,
                }) {
                    Some(Ok(output)) if output.finish_reason() != FinishReason::Cancelled => {
                        self.received(app, model, &output);
                        return Poll::Ready(Ok(self.first_told(output)));
                    }
                    Some(Ok(mut output)) => {
                        output.finish_reason = FinishReason::Unspecified as i32;
                        let loss = given_up(std::mem::take(&mut output.error));
                        if output.token_ids.is_empty() {
                            loss
                        } else {
                            self.received(app, model, &output);
                            self.lose(app, model, loss)?;
                            return Poll::Ready(Ok(self.first_told(output)));
                        }
                    }
                    Some(Err(StreamError::Refused(refusal))) => {
                        self.refused(app, model, refusal)?;
                        continue;
                    }
                    Some(Err(StreamError::Lost { cause, reason })) => Loss {
                        cause: Cause::Lost(cause),
                        reason,
                    },
                    None => Loss {
                        cause: Cause::Lost(LostCause::Nonsense),
                        reason: "it ended the request without a reason".to_owned(),
                    },
                },
            };
            self.lose(app, model, loss)?;
        }
    }

    /// Takes in what the engine gave.
    fn received(&mut self, app: &App, model: &Model, output: &proto::Output) {
        let Place { replica, epoch } = self.place;
        if output.finish_reason() == FinishReason::Error {
            // A request that forbids tokens may have forbidden all: that is not the replica's failure.
            let forbids = self.submit.min_tokens > 0
                || (self.submit.sampling.as_ref()).is_some_and(|s| !s.logit_bias.is_empty());
            if !forbids {
                model.faults.failed(replica, epoch, app.clock.now_ms());
            }
        } else if !self.answered {
            model.faults.succeeded(replica, epoch, app.clock.now_ms());
        }
        self.answered = true;
        self.hedge = None;
        self.placement = None;
        self.submit.resume_ids.extend(&output.token_ids);
        if let Some(pause) = self.pause.take() {
            let us = micros(pause.since.elapsed());
            app.metrics.faults.paused_us(us);
            if pause.loss.cause == Cause::Drained {
                model.served.metrics.hand_over_pause.observe_us(us);
            }
        }
    }

    /// Only the first replica's word on the prompt counts: a later one may have it from an earlier try.
    fn first_told(&self, mut output: proto::Output) -> proto::Output {
        if self.replays > 0 && self.submit.resume_ids.len() > output.token_ids.len() {
            output.cached_tokens = 0;
        }
        output
    }
}
