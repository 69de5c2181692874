//! Checks of requests and responses: a model's hooks, one after the other in the order of the configuration.
//!
//! ```text
//! request     the texts of a request, before its template and its tokens
//! answer      what an engine of our own says, before it is serialised
//! relayed     what a server elsewhere says, event by event
//! chain       one text on its way through the hooks, as it comes
//! look_back   matches in a text that comes in pieces;  beginnings   what may become one
//! words, personal_data, limits, classifier   the hooks
//! ```

use std::sync::Arc;

use crate::config::safety::{Action, HookConfig, On};
use crate::error::{ApiError, GatewayError};
use crate::record::RequestRecord;
use crate::served::Served;
use classifier::Classifier;
use limits::Limits;
use look_back::Rule;

pub mod answer;
mod beginnings;
mod chain;
mod classifier;
mod limits;
mod look_back;
mod personal_data;
pub mod relayed;
pub mod request;
mod words;

const MAX_HOOKS: usize = 32;
const MAX_NAME_BYTES: usize = 64;

/// The hooks of one model.
pub struct Safety {
    hooks: Vec<Hook>,
    /// What they were made of.
    config: Vec<HookConfig>,
}

struct Hook {
    name: Arc<str>,
    on: On,
    action: Action,
    log_content: bool,
    check: Check,
}

enum Check {
    /// Looked for one after the other: what one masks the next one does not see.
    Text(Vec<Rule>),
    Limits(Limits),
    Classifier(Classifier),
}

impl Safety {
    /// `None` without hooks; `before` goes on if nothing has changed. `path` is their place in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn start(
        config: Vec<HookConfig>,
        path: &str,
        before: Option<&Arc<Safety>>,
    ) -> Result<Option<Arc<Safety>>, GatewayError> {
        if config.is_empty() {
            return Ok(None);
        }
        // Files may have changed where the configuration has not.
        let reads_files = config.iter().any(HookConfig::reads_files);
        if let Some(same) = before.filter(|before| before.config == config && !reads_files) {
            return Ok(Some(Arc::clone(same)));
        }
        let bad = |what: String| Err(GatewayError::Config(format!("{path}{what}")));
        if config.len() > MAX_HOOKS {
            return bad(format!(
                ": got {} hooks, allowed are at most {MAX_HOOKS}",
                config.len()
            ));
        }
        let mut hooks: Vec<Hook> = Vec::with_capacity(config.len());
        for (index, hook) in config.iter().enumerate() {
            let name = hook.name();
            let fits = name.bytes().all(|byte| byte.is_ascii_graphic());
            if name.is_empty() || name.len() > MAX_NAME_BYTES || !fits {
                return bad(format!(
                    "[{index}].name: got {name:?}, allowed are 1 to {MAX_NAME_BYTES} visible ASCII characters"
                ));
            }
            if hooks.iter().any(|other| *other.name == *name) {
                return bad(format!(
                    "[{index}].name: {name:?} is used twice, each hook needs a name of its own"
                ));
            }
            hooks.push(Hook::start(hook, &format!("{path}[{index}]"))?);
        }
        Ok(Some(Arc::new(Safety { hooks, config })))
    }

    #[must_use]
    pub fn checks_requests(&self) -> bool {
        self.hooks.iter().any(Hook::checks_requests)
    }

    #[must_use]
    pub fn checks_responses(&self) -> bool {
        self.hooks.iter().any(Hook::checks_responses)
    }

    /// Whether what an answer says may not come through: then nothing beside its text may tell it.
    #[must_use]
    pub fn reads_responses(&self) -> bool {
        let reads = |hook: &Hook| !matches!(hook.check, Check::Limits(_));
        self.hooks
            .iter()
            .any(|hook| hook.checks_responses() && reads(hook))
    }
}

impl Hook {
    fn start(config: &HookConfig, path: &str) -> Result<Hook, GatewayError> {
        let name = Arc::from(config.name());
        let made = |on, action, log_content, check| Hook {
            name,
            on,
            action,
            log_content,
            check,
        };
        Ok(match config {
            HookConfig::Words(config) => {
                let check = Check::Text(vec![words::rule(config, path)?]);
                made(config.on, config.action, config.log_content, check)
            }
            HookConfig::PersonalData(config) => {
                let bad = |what: String| GatewayError::Config(format!("{path}.kinds: {what}"));
                if config.kinds.is_empty() {
                    return Err(bad(
                        "got none, allowed are email, iban, card, phone".to_owned()
                    ));
                }
                let kinds = crate::config::safety::PersonalKind::ALL;
                let chosen = kinds.into_iter().filter(|kind| config.kinds.contains(kind));
                let rules = chosen.map(|kind| personal_data::rule(kind).map_err(bad));
                let check = Check::Text(rules.collect::<Result<_, _>>()?);
                made(config.on, config.action, config.log_content, check)
            }
            HookConfig::Limits(config) => {
                let check = Check::Limits(Limits::new(config, path)?);
                made(On::Both, Action::Stop, false, check)
            }
            HookConfig::Classifier(config) => {
                let check = Check::Classifier(Classifier::start(config, path)?);
                made(config.on, config.action, false, check)
            }
        })
    }

    fn checks_requests(&self) -> bool {
        match &self.check {
            Check::Limits(limits) => limits.max_request_chars.is_some(),
            _ => self.on.requests(),
        }
    }

    fn checks_responses(&self) -> bool {
        match &self.check {
            Check::Limits(limits) => limits.on_responses(),
            _ => self.on.responses(),
        }
    }
}

/// Whose texts are checked, and where decisions are noted.
#[derive(Clone, Copy)]
struct Notes<'a> {
    record: &'a RequestRecord,
    served: &'a Served,
}

impl Notes<'_> {
    /// Notes that a hook did something; `content` is what it found, where it may be logged.
    fn decided(&self, hook: &Hook, action: &'static str, content: Option<&str>) {
        self.served.metrics.safety.count(&hook.name, action);
        self.record
            .update(|progress| progress.safety.note(&hook.name, action));
        tracing::info!(
            request_id = &*self.record.id,
            model = &*self.served.name,
            hook = &*hook.name,
            action,
            content = content.filter(|_| hook.log_content),
            "a safety hook has acted"
        );
    }
}

fn refused(hook: &Hook, what: &str) -> Box<ApiError> {
    ApiError::content_filter(format!(
        "{what} was refused by the safety hook {:?} of this model",
        hook.name
    ))
}

/// What hooks did to one request: the gravest is kept.
#[derive(Debug, Default)]
pub struct Outcome(Option<(u8, String)>);

impl Outcome {
    fn note(&mut self, hook: &str, action: &'static str) {
        let gravity = match action {
            "refuse" | "fail_closed" => 3,
            "stop" => 2,
            "mask" => 1,
            _ => 0,
        };
        if self.0.as_ref().is_none_or(|(known, _)| *known < gravity) {
            self.0 = Some((gravity, format!("{action}:{hook}")));
        }
    }

    /// `ACTION:HOOK`, or "" where nothing was done.
    #[must_use]
    pub fn text(&self) -> &str {
        self.0.as_ref().map_or("", |(_, text)| text)
    }
}
