//! What a request holds of its key's budgets and what it used, from its admission to its end.

use std::sync::Arc;
use std::time::Instant;

use scalellm_accounts::{Live, Meters, RUNNING, Reservation, Usage};

use crate::app::App;
use crate::record::{Progress, RequestRecord};
use crate::stages::{Clock, Stage};

/// Ends with the request, at the latest when its record is dropped: then what is reserved is given back.
#[derive(Default)]
pub struct Metering {
    pub reservation: Option<Reservation>,
    /// Whether it holds the request's tokens already.
    pub has_tokens: bool,
    /// Of its row of usage.
    number: Option<u64>,
}

/// Has the usage writer look at the request from now on.
pub fn begin(app: &App, record: &Arc<RequestRecord>) {
    let Some(accounts) = &app.accounts else {
        return;
    };
    if record.update(|progress| progress.metering.number.is_some()) {
        return; // it goes another way now
    }
    let live = Arc::new(LiveRequest {
        record: Arc::clone(record),
        clock: app.clock,
    });
    let number = accounts.meters().begin(live);
    record.update(|progress| progress.metering.number = Some(number));
}

/// Settles what was reserved and hands the request's usage to the writer.
pub fn end(
    meters: Option<&Arc<Meters>>,
    record: &RequestRecord,
    clock: &Clock,
    status: u16,
    outcome: &'static str,
) {
    let ended = record.update(|progress| {
        if let Some(mut reservation) = progress.metering.reservation.take() {
            let tokens = progress.prompt_tokens + progress.output_tokens;
            reservation.used(i64::try_from(tokens).unwrap_or(i64::MAX));
        }
        let number = progress.metering.number.take()?;
        Some((
            number,
            usage(record, progress, clock, i64::from(status), outcome),
        ))
    });
    if let (Some((number, usage)), Some(meters)) = (ended, meters) {
        meters.end(number, usage);
    }
}

struct LiveRequest {
    record: Arc<RequestRecord>,
    clock: Clock,
}

impl Live for LiveRequest {
    fn usage(&self) -> Usage {
        self.record
            .update(|progress| usage(&self.record, progress, &self.clock, 0, RUNNING))
    }
}

fn usage(
    record: &RequestRecord,
    progress: &Progress,
    clock: &Clock,
    status: i64,
    outcome: &'static str,
) -> Usage {
    let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let took = Instant::now().saturating_duration_since(record.started);
    Usage {
        request_id: Arc::clone(&record.id),
        key: record.key().map(|state| state.key()),
        model: progress
            .model
            .as_ref()
            .map(|model| Arc::clone(&model.name))
            .unwrap_or_default(),
        route: record.route,
        started_at_ms: count(clock.unix_us(record.started) / 1000),
        duration_us: count(crate::stages::micros(took)),
        first_token_us: progress.times.get_us(Stage::First).map(count),
        prompt_tokens: count(progress.prompt_tokens),
        cached_tokens: count(progress.cached_tokens),
        output_tokens: count(progress.output_tokens),
        replays: progress.replays.into(),
        status,
        outcome,
        safety: progress.safety.text().to_owned(),
    }
}
