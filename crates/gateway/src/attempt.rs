//! One choice's way through the engines: routed, submitted, and moved on when its replica fails it.
//!
//! ```text
//!  start --> Running --outputs--> finished
//!    |          |   ^
//!    Waiting----|---'  where a replica may come (`replica_wait_s`)
//!               |   ^
//!   lost,       |   | submitted again with all ids received,
//!   drained     v   | to a replica that continues them exactly
//!             Paused --no such replica in time, or too many deaths--> error
//! ```
//!
//! What a replica refuses goes to one other at once: nothing has begun. While the first replica says nothing, a second
//! may be asked beside it (`hedge`).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use scalellm_engine_link::proto::{self, FinishReason, RefusalCode};
use scalellm_engine_link::{LostCause, RequestStream, StreamError};
use scalellm_routing::Choice;
use tokio::time::{Sleep, sleep};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fault_metrics::Waiting;
use crate::fleet::Model;
use crate::replay::{Cause, Failures, Loss, MAX_DEATHS, Pause, Place, is_hopeless};
use crate::routing::{Placement, RouteWish};
use crate::stages::micros;

mod hedge;
mod sending;

use hedge::Hedge;

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

    /// The replica there has lost the choice. Returns how many deaths in a row that makes.
    fn blame(&mut self, app: &App, model: &Model, place: Place, cause: Cause) -> u32 {
        if !matches!(cause, Cause::Drained | Cause::Lost(LostCause::Closed)) {
            let now_ms = app.clock.now_ms();
            model.faults.failed(place.replica, place.epoch, now_ms);
        }
        if cause.is_death() {
            self.failures.died(place, self.submit.resume_ids.len())
        } else {
            0
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

    /// The replica has lost the choice: it pauses, or ends.
    fn lose(&mut self, app: &App, model: &Model, loss: Loss) -> ApiResult<()> {
        let faults = &model.faults.config;
        let (now, now_ms) = (Instant::now(), app.clock.now_ms());
        let ids = self.submit.resume_ids.len();
        self.placement = None;
        self.failures.note(self.place, now);
        let deaths = self.blame(app, model, self.place, loss.cause);
        if deaths >= MAX_DEATHS {
            model.faults.refused_prompts.refuse(&self.prompt, now);
            app.metrics.faults.not_replayed("deaths");
            return Err(ApiError::replica_deaths(deaths, faults.poison_refused_s));
        }
        if self.take_second() {
            return Ok(());
        }
        // A deployment may change its shape any number of times while a request runs.
        let handed_on = loss.cause == Cause::Drained && ids > self.ids_at_loss;
        self.ids_at_loss = ids;
        self.losses += u32::from(!handed_on);
        let in_the_way = if loss.cause == Cause::Lost(LostCause::Nonsense) {
            Some(("nonsense", "what it said is of no use".to_owned()))
        } else if !faults.replay && (ids > 0 || self.tries >= MAX_OFFERS) {
            Some(("off", "replays are off".to_owned()))
        } else if self.losses > faults.max_replays {
            let limit = faults.max_replays;
            Some((
                "limit",
                format!("it has been moved max_replays, {limit}, times"),
            ))
        } else if !handed_on && !model.faults.may_replay(now_ms) {
            Some(("budget", "too much is being replayed already".to_owned()))
        } else {
            None
        };
        if let Some((reason, message)) = in_the_way {
            app.metrics.faults.not_replayed(reason);
            return Err(ApiError::engine_lost(&format!(
                "{}; {message}",
                loss.reason
            )));
        }
        tracing::warn!(
            trace_id = self.submit.trace_id,
            choice = self.submit.choice,
            cause = loss.cause.name(),
            reason = loss.reason,
            ids,
            "a choice has lost its replica"
        );
        let pause = self.pause.get_or_insert_with(|| {
            Box::new(Pause {
                since: now,
                until: now + faults.replay_wait(),
                _waiting: app.metrics.faults.waits(),
                loss: loss.clone(),
            })
        });
        pause.loss = loss;
        self.run = Run::Paused(Box::pin(sleep(Duration::ZERO)));
        Ok(())
    }

    /// No replica takes what has not begun: looks again later, or says so.
    fn wait_for_replica(&mut self, app: &App, model: &Model) -> ApiResult<()> {
        let since = *self.waits_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= model.faults.config.replica_wait() {
            app.metrics.rejected("no_replica");
            return Err(model.no_replica());
        }
        self.run = Run::Waiting {
            timer: Box::pin(sleep(LOOK_AGAIN)),
            _counted: app.metrics.faults.waits(),
        };
        Ok(())
    }

    /// Ends the pause if a replica is there, or looks again later.
    fn go_on(&mut self, app: &App, model: &Model) -> ApiResult<()> {
        if self.submit_to_any(app, model, None) {
            return Ok(());
        }
        let Some(pause) = &self.pause else {
            return Err(model.no_replica());
        };
        let begun = !self.submit.resume_ids.is_empty();
        let engine = self.engine.as_deref().filter(|_| begun);
        let (reason, message) = if engine.is_some_and(|first| is_hopeless(model, first)) {
            let message = "the replicas that are there have other weights or compute otherwise";
            ("other_engine", message.to_owned())
        } else if !model.faults.config.replay && !begun {
            return self.wait_for_replica(app, model);
        } else if !model.faults.config.replay {
            ("off", "no other replica takes it".to_owned())
        } else if Instant::now() >= pause.until {
            let limit = model.faults.config.replay_wait_s;
            let message = format!("no replica to go on at came within replay_wait_s, {limit} s");
            ("no_replica", message)
        } else {
            self.run = Run::Paused(Box::pin(sleep(LOOK_AGAIN)));
            return Ok(());
        };
        app.metrics.faults.not_replayed(reason);
        let lost = &pause.loss.reason;
        Err(ApiError::engine_lost(&format!("{lost}; {message}")))
    }

    /// The engine would not take the choice.
    fn refused(&mut self, app: &App, model: &Model, refusal: proto::Refusal) -> ApiResult<()> {
        let elsewhere = matches!(refusal.code(), RefusalCode::Draining | RefusalCode::Full);
        if !elsewhere {
            return Err(refused(model, refusal));
        }
        self.placement = None;
        self.failures.note(self.place, Instant::now());
        if self.take_second() {
            return Ok(());
        }
        if self.pause.is_some() {
            self.run = Run::Paused(Box::pin(sleep(LOOK_AGAIN)));
            return Ok(());
        }
        self.refusals += 1;
        let offer = self.refusals < MAX_OFFERS && model.faults.may_retry(app.clock.now_ms());
        if offer && self.submit_to_any(app, model, None) {
            app.metrics.faults.retried();
            return Ok(());
        }
        if refusal.code() == RefusalCode::Draining {
            return self.wait_for_replica(app, model);
        }
        Err(refused(model, refusal))
    }
}

/// Why an engine ends what nobody asked it to end.
fn given_up(error: String) -> Loss {
    if error.is_empty() {
        Loss {
            cause: Cause::Drained,
            reason: "it is stopping".to_owned(),
        }
    } else {
        Loss {
            cause: Cause::Crashed,
            reason: error,
        }
    }
}

fn refused(model: &Model, refusal: proto::Refusal) -> Box<ApiError> {
    match refusal.code() {
        RefusalCode::Invalid => ApiError::field(client_field(&refusal.field), refusal.message),
        RefusalCode::Draining => model.no_replica(),
        RefusalCode::Full => ApiError::busy("overloaded", refusal.message, 1),
        RefusalCode::Duplicate | RefusalCode::Unspecified => ApiError::internal(format!(
            "the engine refused the request: {}",
            refusal.message
        )),
    }
}

/// The client's name of a field of the engine protocol.
fn client_field(field: &str) -> String {
    let field = field.strip_prefix("sampling.").unwrap_or(field);
    if field.starts_with("prompt_ids") || field == "prompt_tokens" {
        "prompt".to_owned()
    } else {
        field.to_owned()
    }
}
