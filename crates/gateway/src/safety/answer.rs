//! What an engine of our own says. Text passes its choice's hooks once, after stop strings and before it is
//! serialised; a replica's death is over before that, so nothing is checked or let out twice.

use std::sync::Arc;

use super::chain::Chain;
use super::{Notes, Safety};
use crate::choice::{ChoiceEvent, Finish, StopReason};
use crate::error::ApiResult;
use crate::record::RequestRecord;
use crate::request::Params;
use crate::served::Served;

/// The choices of one request.
pub struct Answers {
    safety: Arc<Safety>,
    choices: Vec<Chain>,
}

impl Answers {
    /// `None` where no hook looks at answers.
    #[must_use]
    pub fn of(served: &Served, choices: usize) -> Option<Box<Answers>> {
        let safety = served
            .safety
            .as_ref()
            .filter(|safety| safety.checks_responses())?;
        Some(Box::new(Answers {
            choices: (0..choices).map(|_| Chain::new(safety)).collect(),
            safety: Arc::clone(safety),
        }))
    }

    /// Leaves in each event what may be let out, and tells which choices a hook has ended.
    ///
    /// # Errors
    /// A hook refuses the request.
    pub async fn check(
        &mut self,
        events: &mut [ChoiceEvent],
        record: &RequestRecord,
        served: &Served,
    ) -> ApiResult<Vec<usize>> {
        let notes = Notes { record, served };
        let mut ended = Vec::new();
        for event in events {
            let chain = &mut self.choices[event.choice];
            let last = event.finish.is_some();
            if let Some(end) = chain
                .push(&self.safety, &mut event.text, last, notes)
                .await?
            {
                event.finish = Some(Finish {
                    reason: end.finish_reason,
                    stop_reason: Some(StopReason::Text(end.hook.to_string())),
                });
                record.update(|progress| progress.finish = Some(end.finish_reason));
                ended.push(event.choice);
            }
        }
        Ok(ended)
    }
}

/// Token ids and logprobs would tell what is held back or masked: they are not asked for, and `warning` says so.
pub fn leave_out(served: &Served, params: &mut Params, warning: &mut Option<String>) {
    let reads = served
        .safety
        .as_ref()
        .is_some_and(|safety| safety.reads_responses());
    if !reads || !(params.return_token_ids || params.logprobs.is_some()) {
        return;
    }
    if params.prompt_logprobs_for_echo {
        params.prompt_logprobs = None;
    }
    params.logprobs = None;
    params.return_token_ids = false;
    let before = warning.take().map(|text| text + "; ").unwrap_or_default();
    *warning = Some(format!("{before}{LEFT_OUT}"));
}

/// What a client is told who asked for more than text.
pub const LEFT_OUT: &str = "logprobs and token ids are left out: this model's answers are checked";
