//! One text of an answer on its way through a model's hooks, as it comes.

use std::sync::Arc;

use super::classifier::Judged;
use super::limits::Measured;
use super::look_back::LookBack;
use super::{Check, Hook, Notes, Safety, refused};
use crate::config::safety::{Action, OnFailure};
use crate::error::{ApiError, ApiResult};

/// OpenAI's `finish_reason` of an answer that a filter has ended.
const FILTERED: &str = "content_filter";

/// What each hook knows of the text so far.
pub struct Chain(Vec<State>);

enum State {
    /// It does not look at answers.
    Unseen,
    Text(Vec<LookBack>),
    Limits(Measured),
    Classifier(Judged),
}

/// Why a hook has ended the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub finish_reason: &'static str,
    pub hook: Arc<str>,
}

impl Chain {
    pub fn new(safety: &Safety) -> Chain {
        let state = |hook: &Hook| match &hook.check {
            _ if !hook.checks_responses() => State::Unseen,
            Check::Text(rules) => State::Text(rules.iter().map(|_| LookBack::default()).collect()),
            Check::Limits(_) => State::Limits(Measured::default()),
            Check::Classifier(_) => State::Classifier(Judged::default()),
        };
        Chain(safety.hooks.iter().map(state).collect())
    }

    /// Takes new text, `last` if no more comes; what may be let out now is in its place afterwards. With an end nothing
    /// more must be pushed.
    ///
    /// # Errors
    /// A hook refuses the whole request.
    pub async fn push(
        &mut self,
        safety: &Safety,
        text: &mut String,
        mut last: bool,
        notes: Notes<'_>,
    ) -> ApiResult<Option<End>> {
        let mut end = None;
        for (hook, state) in safety.hooks.iter().zip(&mut self.0) {
            let ended = match (&hook.check, state) {
                (Check::Text(rules), State::Text(held)) => {
                    let rules = rules.iter().zip(held);
                    rules
                        .fold(false, |ended, (rule, held)| {
                            let mut out = String::with_capacity(text.len());
                            let ends = held.push(rule, text, last || ended, &mut out, |found| {
                                notes.decided(hook, hook.action.name(), Some(found));
                                hook.action == Action::Mask
                            });
                            *text = out;
                            ended || ends
                        })
                        .then_some(FILTERED)
                }
                (Check::Limits(limits), State::Limits(measured)) => {
                    measured.push(limits, text).map(|beyond| {
                        notes.decided(hook, hook.action.name(), None);
                        beyond.finish_reason()
                    })
                }
                (Check::Classifier(classifier), State::Classifier(judged)) => {
                    judged.push(text);
                    text.clear();
                    let mut flagged = false;
                    while let Some(part) = judged.next(classifier, last) {
                        if flags(hook, classifier, &part, notes).await? {
                            notes.decided(hook, hook.action.name(), None);
                            flagged = true;
                            break;
                        }
                        judged.release(classifier, last, text);
                    }
                    flagged.then_some(FILTERED)
                }
                _ => None,
            };
            if let Some(finish_reason) = ended {
                if hook.action == Action::Refuse {
                    return Err(refused(hook, "the answer"));
                }
                last = true;
                end = Some(End {
                    finish_reason,
                    hook: Arc::clone(&hook.name),
                });
            }
        }
        Ok(end)
    }
}

/// Asks a classifier; what its silence means, the configuration says.
///
/// # Errors
/// 503 where nothing passes without a verdict.
pub(super) async fn flags(
    hook: &Hook,
    classifier: &super::Classifier,
    text: &str,
    notes: Notes<'_>,
) -> ApiResult<bool> {
    match classifier.flags(text).await {
        Ok(flagged) => Ok(flagged),
        Err(reason) => {
            tracing::warn!(hook = &*hook.name, reason, "a classifier gives no verdict");
            match classifier.on_failure {
                OnFailure::Open => {
                    notes.decided(hook, "fail_open", None);
                    Ok(false)
                }
                OnFailure::Closed => {
                    notes.decided(hook, "fail_closed", None);
                    let message = format!(
                        "the safety hook {:?} of this model cannot be asked now",
                        hook.name
                    );
                    Err(ApiError::busy("safety_unavailable", message, 1))
                }
            }
        }
    }
}
