//! What comes of a choice that its replica lost, or would not take: it pauses and goes on elsewhere, waits for a replica
//! to come, or ends.

use std::time::{Duration, Instant};

use scalellm_engine_link::LostCause;
use scalellm_engine_link::proto::{self, RefusalCode};
use tokio::time::sleep;

use super::{Attempt, LOOK_AGAIN, MAX_OFFERS, Run};
use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fleet::Model;
use crate::replay::{Cause, Loss, MAX_DEATHS, Pause, Place, is_hopeless};

impl Attempt {
    /// The replica there has lost the choice. Returns how many deaths in a row that makes.
    pub(super) fn blame(&mut self, app: &App, model: &Model, place: Place, cause: Cause) -> u32 {
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

    /// The replica has lost the choice: it pauses, or ends.
    pub(super) fn lose(&mut self, app: &App, model: &Model, loss: Loss) -> ApiResult<()> {
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
    pub(super) fn wait_for_replica(&mut self, app: &App, model: &Model) -> ApiResult<()> {
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
    pub(super) fn go_on(&mut self, app: &App, model: &Model) -> ApiResult<()> {
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
    pub(super) fn refused(
        &mut self,
        app: &App,
        model: &Model,
        refusal: proto::Refusal,
    ) -> ApiResult<()> {
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
pub fn given_up(error: String) -> Loss {
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
