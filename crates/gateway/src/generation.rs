//! All choices of one request, while the engines work on them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use scalellm_accounts::Class;
use scalellm_engine_link::proto;
use scalellm_routing::stable_hash;
use tokio::sync::watch;
use tokio::time::Sleep;

use crate::admission::{self, Permit};
use crate::app::{App, Phase};
use crate::attempt::Attempt;
use crate::choice::{Choice, ChoiceEvent};
use crate::error::{ApiError, ApiResult};
use crate::fleet::Model;
use crate::record::RequestRecord;
use crate::request::Params;
use crate::routing::{RouteNote, RouteWish};
use crate::safety::answer::Answers;
use crate::stages::Stage;
use crate::submit::submit;

/// What a request has used, in tokens. Prompts count once, however many choices continue them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    /// How often a choice went on at a replica after its own died.
    pub replays: u32,
}

/// One of a request's prompts, checked against the model.
#[derive(Debug)]
pub struct PreparedPrompt {
    pub ids: Arc<[u32]>,
    pub max_tokens: u32,
}

/// Owns the request's place and its choices. Dropping it cancels what has not finished.
pub struct Generation {
    app: Arc<App>,
    record: Arc<RequestRecord>,
    model: Arc<Model>,
    choices: Vec<Choice>,
    prompt_tokens: Vec<usize>,
    submitted: Instant,
    deadline: Option<(Pin<Box<Sleep>>, &'static str)>,
    phase: watch::Receiver<Phase>,
    /// Comes after events that were ready with it.
    error: Option<Box<ApiError>>,
    seen_first: bool,
    permit: Permit,
    /// Checks of what is said.
    answers: Option<Box<Answers>>,
}

impl Generation {
    /// Submits `n` choices of each prompt, numbered prompt by prompt.
    ///
    /// # Errors
    /// 503 when no replica takes them, 504 when the deadline has passed already.
    pub fn start(
        app: &Arc<App>,
        record: &Arc<RequestRecord>,
        model: &Arc<Model>,
        prompts: &[PreparedPrompt],
        params: &Params,
        permit: Permit,
    ) -> ApiResult<Generation> {
        let start = Instant::now();
        let limits = [
            (
                params
                    .deadline_ms
                    .map(|ms| Duration::from_millis(ms.into())),
                "deadline_ms",
            ),
            (app.live().config.request_timeout(), "request_timeout_s"),
        ];
        let nearest = limits
            .into_iter()
            .filter_map(|(limit, name)| Some((limit?, name)))
            .min();
        let left = match nearest {
            Some((limit, name)) => {
                let left = limit.saturating_sub(record.started.elapsed());
                if left.is_zero() {
                    return Err(late(name));
                }
                Some((left, name))
            }
            None => None,
        };
        if params.deadline_ms.is_some()
            && let Some((left, name)) = left
        {
            admission::check_deadline(app, model, prompts, left, name)?;
        }
        let wish = wish(record, params);
        for prompt in prompts {
            if let Some(left) = model.faults.refused_prompts.left(&prompt.ids, start) {
                app.metrics.rejected("prompt_refused");
                return Err(ApiError::prompt_refused(left));
            }
        }
        let deadline = left.map(|(left, _)| start + left);
        let seed = params.seed.unwrap_or_else(rand::random);
        let mut choices = Vec::with_capacity(prompts.len() * params.n as usize);
        for (index, prompt) in prompts.iter().enumerate() {
            let mut replica = None;
            for choice in 0..params.n {
                let submit = submit(record, app, prompt, params, seed, choice);
                let attempt =
                    Attempt::start(app, model, submit, &prompt.ids, wish, deadline, replica)?;
                if choices.is_empty() {
                    note_route(record, model, &attempt);
                }
                // The choices of a prompt share its prefix: they belong on one replica.
                replica = attempt.replica();
                choices.push(Choice::new(
                    choices.len(),
                    index,
                    &prompt.ids,
                    attempt,
                    model,
                    params,
                ));
            }
        }
        record.add(Stage::Route, start.elapsed());
        let prompt_tokens: Vec<usize> = prompts.iter().map(|prompt| prompt.ids.len()).collect();
        record.update(|progress| {
            progress.prompt_tokens = prompt_tokens.iter().map(|n| *n as u64).sum();
            progress.replica = choices
                .first()
                .and_then(|choice| model.address(choice.replica?));
        });
        Ok(Generation {
            answers: Answers::of(&model.served, choices.len()),
            app: Arc::clone(app),
            record: Arc::clone(record),
            model: Arc::clone(model),
            choices,
            prompt_tokens,
            submitted: Instant::now(),
            deadline: left.map(|(left, name)| (Box::pin(tokio::time::sleep(left)), name)),
            phase: app.watch_phase(),
            error: None,
            seen_first: false,
            permit,
        })
    }

    /// What is new of the choices: all that is there, at least one event. `None` when all have finished.
    ///
    /// # Errors
    /// The request's end; everything that still ran is cancelled.
    pub async fn next(&mut self) -> Option<ApiResult<Vec<ChoiceEvent>>> {
        if let Some(error) = self.error.take() {
            return Some(Err(self.fail(error)));
        }
        if self.is_finished() {
            return None;
        }
        let Generation {
            app,
            record,
            model,
            choices,
            deadline,
            phase,
            error,
            ..
        } = self;
        let mut work = Work {
            app,
            record,
            model,
            choices,
            error,
        };
        let events = tokio::select! {
            biased;
            events = std::future::poll_fn(|cx| work.poll_events(cx)) => Ok(events),
            _ = phase.wait_for(|now| *now >= Phase::Stopping) => {
                Err(ApiError::draining(app.drain_retry_after_s()))
            }
            name = expired(deadline) => Err(late(name)),
        };
        Some(match events {
            Ok(events) if events.is_empty() => {
                let error = self
                    .error
                    .take()
                    .unwrap_or_else(|| ApiError::internal("a step without outputs"));
                Err(self.fail(error))
            }
            Ok(mut events) => {
                self.note_progress(&events);
                match self.check(&mut events).await {
                    Ok(()) => Ok(events),
                    Err(error) => Err(self.fail(error)),
                }
            }
            Err(error) => Err(self.fail(error)),
        })
    }

    /// Leaves in the events what the model's hooks let out.
    async fn check(&mut self, events: &mut [ChoiceEvent]) -> ApiResult<()> {
        let Some(answers) = &mut self.answers else {
            return Ok(());
        };
        // In a box, for which every stream would have room otherwise, with hooks or without.
        let checked = Box::pin(answers.check(events, &self.record, &self.model.served));
        for choice in checked.await? {
            self.choices[choice].stop();
        }
        Ok(())
    }

    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.error.is_none() && self.choices.iter().all(Choice::is_finished)
    }

    #[must_use]
    pub fn usage(&self) -> Usage {
        let mut cached = vec![None; self.prompt_tokens.len()];
        for choice in &self.choices {
            // The first choice's count is the prompt's: the others find what the first has stored.
            cached[choice.prompt].get_or_insert(u64::from(choice.cached_tokens));
        }
        Usage {
            prompt_tokens: self.prompt_tokens.iter().map(|n| *n as u64).sum(),
            cached_tokens: cached.into_iter().flatten().sum(),
            completion_tokens: self
                .choices
                .iter()
                .map(|choice| u64::from(choice.output_tokens))
                .sum(),
            replays: self.choices.iter().map(|choice| choice.replays).sum(),
        }
    }

    /// Which prompt a choice continues.
    #[must_use]
    pub fn prompt_of(&self, choice: usize) -> usize {
        self.choices[choice].prompt
    }

    #[must_use]
    pub fn choice_count(&self) -> usize {
        self.choices.len()
    }

    fn fail(&mut self, error: Box<ApiError>) -> Box<ApiError> {
        let replays = self.usage().replays;
        self.choices.clear();
        self.error = None;
        let note = error.note();
        self.record.update(|progress| {
            progress.failed = Some((error.status.as_u16(), note));
            progress.replays = replays;
        });
        error
    }

    fn note_progress(&mut self, events: &[ChoiceEvent]) {
        let now = Instant::now();
        let usage = self.usage();
        self.permit
            .used(usage.prompt_tokens + usage.completion_tokens);
        let longest = self
            .choices
            .iter()
            .map(|choice| choice.output_tokens)
            .max()
            .unwrap_or(0);
        let finish = events
            .iter()
            .find_map(|event| event.finish.as_ref())
            .map(|finish| finish.reason);
        let ended = events.iter().filter(|event| event.finish.is_some());
        let engine_last = ended
            .filter_map(|event| self.choices[event.choice].last_times.take())
            .max_by_key(|times| times.finished_us);
        self.record.update(|progress| {
            progress.cached_tokens = usage.cached_tokens;
            progress.output_tokens = usage.completion_tokens;
            progress.longest_choice_tokens = longest.into();
            progress.tokens_came(now);
            progress.finish = finish.or(progress.finish);
            progress.replays = usage.replays;
            if engine_last.is_some() {
                progress.engine_last = engine_last;
            }
        });
        if !self.seen_first {
            self.seen_first = true;
            let times = self.choices[events[0].choice].first_times.take();
            let choice = &self.choices[events[0].choice];
            self.note_first(now, times.unwrap_or_default(), choice);
        }
    }

    /// Takes the engine's times of the first token into the request's stages.
    fn note_first(&self, now: Instant, times: Box<proto::StageTimes>, choice: &Choice) {
        let between = |from: u64, to: u64| {
            Duration::from_micros(if from == 0 {
                0
            } else {
                to.saturating_sub(from)
            })
        };
        let prefill = between(times.first_scheduled_us, times.first_token_us);
        // An engine that does not tell when it emitted did so at once.
        let emitted_us = times.emitted_us.max(times.first_token_us);
        let in_engine = between(times.received_us, emitted_us);
        self.record.update(|progress| {
            // Only the sum of both ways does not depend on the two hosts' clocks; its parts do.
            let submitted = self.submitted + choice.waited;
            let link = now
                .saturating_duration_since(submitted)
                .saturating_sub(in_engine + progress.times.own_output_work());
            let submitted_us = self.app.clock.unix_us(submitted);
            let link_out = between(submitted_us, times.received_us).min(link);
            progress.replica = choice.replica.and_then(|at| self.model.address(at));
            progress.times.add(Stage::Route, choice.waited);
            for (stage, took) in [
                (Stage::LinkOut, link_out),
                (
                    Stage::Queue,
                    between(times.received_us, times.first_scheduled_us),
                ),
                (Stage::Prefill, prefill),
                (Stage::Emit, between(times.first_token_us, emitted_us)),
                (Stage::LinkBack, link - link_out),
                (
                    Stage::First,
                    now.saturating_duration_since(self.record.started),
                ),
            ] {
                progress.times.set(stage, took);
            }
            progress.first_detokenise_us = progress.times.get_us(Stage::Detokenise);
            progress.engine_first = Some(times);
        });
        let computed =
            self.prompt_tokens[choice.prompt].saturating_sub(choice.cached_tokens as usize);
        let took_us = crate::stages::micros(prefill);
        let now_ms = self.app.clock.now_ms();
        let routing = &self.model.routing;
        if let Some(replica) = choice.replica {
            routing.observe_prefill(replica, computed, took_us, now_ms);
        }
    }
}

/// The parts of a generation that a poll needs.
struct Work<'a> {
    app: &'a App,
    record: &'a RequestRecord,
    model: &'a Arc<Model>,
    choices: &'a mut [Choice],
    error: &'a mut Option<Box<ApiError>>,
}

impl Work<'_> {
    /// Every output that is there now, so that the tokens of one step leave in one write.
    fn poll_events(&mut self, cx: &mut Context<'_>) -> Poll<Vec<ChoiceEvent>> {
        let mut events = Vec::new();
        for choice in self
            .choices
            .iter_mut()
            .filter(|choice| !choice.is_finished())
        {
            let Poll::Ready(output) = choice.poll_output(self.app, self.model, cx) else {
                continue;
            };
            let start = Instant::now();
            *self.error = match output {
                Ok(output) => {
                    let (event, failure) = choice.take(output);
                    if failure.is_none() || !event.token_ids.is_empty() {
                        events.push(event);
                    }
                    failure
                }
                Err(error) => Some(error),
            };
            self.record.add(Stage::Detokenise, start.elapsed());
            if self.error.is_some() {
                break;
            }
        }
        if events.is_empty() && self.error.is_none() {
            Poll::Pending
        } else {
            Poll::Ready(events)
        }
    }
}

async fn expired(deadline: &mut Option<(Pin<Box<Sleep>>, &'static str)>) -> &'static str {
    match deadline {
        Some((timer, name)) => {
            timer.await;
            name
        }
        None => std::future::pending().await,
    }
}

fn late(limit: &str) -> Box<ApiError> {
    ApiError::deadline(format!("the request was not finished within its {limit}"))
}

fn wish(record: &RequestRecord, params: &Params) -> RouteWish {
    let wish = record.update(|progress| progress.wish);
    let of_body = params.session.as_ref();
    RouteWish {
        session: wish
            .session
            .or_else(|| of_body.map(|name| stable_hash(name.as_bytes()))),
        batch: record
            .key()
            .is_some_and(|state| state.key().class == Class::Batch),
        ..wish
    }
}

fn note_route(record: &RequestRecord, model: &Model, attempt: &Attempt) {
    let replica = attempt.replica().and_then(|at| model.replicas.get(at));
    if let (Some(choice), Some(replica)) = (attempt.route(), replica) {
        record.update(|progress| {
            progress.route = progress
                .wish
                .explain
                .then(|| RouteNote::new(replica, choice));
        });
    }
}
