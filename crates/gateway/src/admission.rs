//! The way in: which model a request is for, its key's quotas, and its place among the running ones.

mod places;

use std::sync::Arc;
use std::time::{Duration, Instant};

use scalellm_accounts::Class;

use crate::app::{App, Phase};
use crate::auth;
use crate::error::{ApiError, ApiResult};
use crate::fair_queue::Ask;
use crate::fleet::{Limits, Model};
use crate::foreign::InFlight;
use crate::generation::PreparedPrompt;
use crate::metering;
use crate::quota;
use crate::record::RequestRecord;
use crate::request::Params;
use crate::served::Served;
use crate::stages::Stage;

pub use places::{Admission, Permit};

/// Output that is expected of a request which does not limit it, in tokens.
const USUAL_OUTPUT: f64 = 256.0;
const BYTES_PER_TOKEN: f64 = 4.0;

/// Between two looks for a replica that tells the model's limits.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a request was given on its way in.
pub struct Admitted {
    pub model: Arc<Model>,
    pub limits: Limits,
    pub permit: Permit,
}

/// Finds the request's model, a place in its key's quotas, and a place among the running requests. `turn` counts it as
/// the replicas' until its end.
///
/// # Errors
/// 404 for an unknown model, 400 if there is a choice and no name, 403 if the key is not for it, 429 beyond a quota,
/// 503 when all places and the queue are taken or no replica has been reached, 504 when the deadline is out of reach.
pub async fn admit(
    app: &App,
    record: &Arc<RequestRecord>,
    model_name: Option<&str>,
    params: &Params,
    prompts: usize,
    turn: Option<InFlight>,
) -> ApiResult<Admitted> {
    let live = app.live();
    let model = Arc::clone(live.fleet.find_or_only(model_name)?);
    name(record, &model.served)?;
    record.update(|progress| progress.own = Some(Arc::clone(&model)));
    let deadline = params
        .deadline_ms
        .map(|ms| record.started + Duration::from_millis(ms.into()));
    let limits = known_limits(app, &model, deadline)
        .await
        .inspect_err(|_| app.metrics.rejected("no_replica"))?;
    let_in(app, record).await?;
    let demand = Demand {
        choices: prompts.saturating_mul(params.n as usize),
        max_tokens: params.max_tokens,
    };
    // Asked for as long as it waits: a reload may change them.
    let places = || {
        let live = app.live();
        live.fleet.newer(&model).map_or_else(
            || live.fleet.places(&model, &live.config),
            |(newer, _)| live.fleet.places(&newer, &live.config),
        )
    };
    let mut permit = place(app, record, &model.served, demand, deadline, places).await?;
    permit.turn = turn;
    // While it waited its replicas may have gone, and others, or other hooks, may have come.
    let (model, limits) = match app.live().fleet.newer(&model) {
        Some((newer, limits)) => {
            record.update(|progress| {
                progress.model = Some(Arc::clone(&newer.served));
                progress.own = Some(Arc::clone(&newer));
            });
            (newer, limits)
        }
        None => (model, limits),
    };
    Ok(Admitted {
        model,
        limits,
        permit,
    })
}

/// The model's limits. Before any replica has told them, as after the gateway's restart, one is waited for.
async fn known_limits(app: &App, model: &Model, deadline: Option<Instant>) -> ApiResult<Limits> {
    let patience = Instant::now() + model.faults.config.replica_wait();
    let until = deadline.map_or(patience, |deadline| deadline.min(patience));
    loop {
        let limits = model.require_limits();
        if limits.is_ok() || Instant::now() >= until {
            return limits;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            () = app.wait_for(Phase::Stopping) => {
                return Err(ApiError::draining(app.drain_retry_after_s()));
            }
        }
    }
}

/// What a request wants computed.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    pub choices: usize,
    pub max_tokens: Option<u32>,
}

/// Notes which model a request is for.
///
/// # Errors
/// 403 if its key is not for this one.
pub fn name(record: &RequestRecord, served: &Arc<Served>) -> ApiResult<()> {
    auth::may_use(record, served)?;
    record.update(|progress| progress.model = Some(Arc::clone(served)));
    Ok(())
}

/// Finds a request's place in its key's quotas, and has it metered.
///
/// # Errors
/// 429.
pub async fn let_in(app: &App, record: &Arc<RequestRecord>) -> ApiResult<()> {
    quota::enter(app, record).await?;
    metering::begin(app, record);
    Ok(())
}

/// A place among the running requests of a model, of which there are `places` now.
///
/// # Errors
/// 503, 504.
pub async fn place(
    app: &App,
    record: &RequestRecord,
    served: &Served,
    demand: Demand,
    deadline: Option<Instant>,
    places: impl Fn() -> usize,
) -> ApiResult<Permit> {
    let ask = ask(app, record, demand);
    let entering = served.admission.enter(ask, deadline, places);
    let entered = record.timed_async(Stage::Admission, async {
        tokio::select! {
            // Most have their place at once: then nobody need listen for the gateway's end.
            biased;
            entered = entering => Some(entered),
            () = app.wait_for(Phase::Stopping) => None,
        }
    });
    entered
        .await
        .ok_or_else(|| ApiError::draining(app.drain_retry_after_s()))?
        .map_err(|refusal| {
            app.metrics.rejected(refusal.reason());
            refusal.error(app.live().config.max_in_flight)
        })
}

/// Refuses a request whose first token is predicted to come after its deadline.
///
/// # Errors
/// 504.
pub fn check_deadline(
    app: &App,
    model: &Model,
    prompts: &[PreparedPrompt],
    left: Duration,
    limit: &str,
) -> ApiResult<()> {
    let longest = prompts.iter().map(|prompt| prompt.ids.len()).max();
    match model.predict_first_token(longest.unwrap_or(0), app.clock.now_ms()) {
        Some(predicted) if predicted > left => {
            app.metrics.rejected("deadline_predicted");
            Err(ApiError::deadline(format!(
                "{limit} would be missed: the first token is predicted to take {} ms, {} ms are left",
                predicted.as_millis(),
                left.as_millis()
            )))
        }
        _ => Ok(()),
    }
}

fn ask(app: &App, record: &RequestRecord, demand: Demand) -> Ask {
    let choices = demand.choices.max(1);
    let prompt = record.update(|progress| progress.body_bytes) as f64 / BYTES_PER_TOKEN;
    let output = demand.max_tokens.map_or(USUAL_OUTPUT, f64::from);
    let (class, tenant, weight) = match record.key() {
        Some(state) => {
            let key = state.key();
            (key.class, key.tenant.clone(), key.weight as f64)
        }
        None => (Class::Standard, String::new(), 1.0),
    };
    Ask {
        class,
        tenant,
        weight,
        // More than there ever are would wait for ever.
        units: choices.min(app.live().config.max_in_flight),
        cost: prompt + output * choices as f64,
    }
}
