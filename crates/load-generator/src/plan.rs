use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::LoadError;
use crate::url::Target;

/// Most requests one level may record; bounds the generator's memory (about 100 bytes each).
pub const MAX_REQUESTS_PER_LEVEL: usize = 5_000_000;
/// Most requests a closed or open level may have open at once.
pub const MAX_IN_FLIGHT: usize = 60_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    Chat,
    Completions,
}

/// A whole run: one target, one workload, levels driven one after the other.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// `http://HOST[:PORT][/PREFIX][/v1]`
    pub url: String,
    pub endpoint: Endpoint,
    pub model: String,
    #[serde(default)]
    pub api_key: Option<String>,
    #[serde(default = "yes")]
    pub stream: bool,
    /// Ask for `stream_options.include_usage`.
    #[serde(default = "yes")]
    pub include_usage: bool,
    /// Ask for `return_token_ids` (vLLM's field): then every chunk tells its tokens.
    #[serde(default)]
    pub return_token_ids: bool,
    pub max_tokens: u32,
    #[serde(default)]
    pub ignore_eos: bool,
    #[serde(default)]
    pub temperature: f64,
    /// More fields of the request's body; they win over the generator's own.
    #[serde(default)]
    pub extra_body: Map<String, Value>,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: f64,
    /// Of the arrival times.
    #[serde(default)]
    pub seed: u64,
    /// Requests take them in turn, across warm-ups and levels; used again when they run out.
    pub prompts: Vec<Prompt>,
    pub levels: Vec<Level>,
    /// Open requests an open level may hold; a send beyond it is recorded as failed, not queued.
    #[serde(default = "default_max_in_flight")]
    pub max_in_flight: usize,
    /// Keep every gap between chunks in the records (for timelines; costs 4 bytes a chunk).
    #[serde(default)]
    pub record_gaps: bool,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    #[serde(flatten)]
    pub content: PromptContent,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptContent {
    Text(String),
    /// Sent as the `prompt` array of `/v1/completions`.
    TokenIds(Vec<u32>),
}

/// One row of the results. Exactly one of `concurrency` (closed loop) and `rate` (open loop).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    #[serde(default)]
    pub concurrency: Option<usize>,
    /// Requests per second.
    #[serde(default)]
    pub rate: Option<f64>,
    #[serde(default)]
    pub arrivals: ArrivalProcess,
    /// No send begins after this many, or after `duration_s`, whichever comes first.
    #[serde(default)]
    pub requests: Option<usize>,
    #[serde(default)]
    pub duration_s: Option<f64>,
    /// Requests sent and forgotten before measuring begins.
    #[serde(default)]
    pub warmup: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArrivalProcess {
    /// Exponential gaps.
    #[default]
    Poisson,
    /// Equal gaps.
    Constant,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    Closed { concurrency: usize },
    Open { rate: f64 },
}

impl Level {
    pub(crate) fn mode(&self) -> Result<Mode, LoadError> {
        match (self.concurrency, self.rate) {
            (Some(concurrency), None) if (1..=MAX_IN_FLIGHT).contains(&concurrency) => {
                Ok(Mode::Closed { concurrency })
            }
            (Some(concurrency), None) => Err(LoadError::Plan(format!(
                "concurrency {concurrency}: must be 1 to {MAX_IN_FLIGHT}"
            ))),
            (None, Some(rate)) if rate.is_finite() && (1e-3..=1e6).contains(&rate) => {
                Ok(Mode::Open { rate })
            }
            (None, Some(rate)) => Err(LoadError::Plan(format!(
                "rate {rate}: must be 0.001 to 1000000 requests per second"
            ))),
            _ => Err(LoadError::Plan(
                "a level needs either concurrency or rate".into(),
            )),
        }
    }

    pub(crate) fn request_limit(&self) -> usize {
        self.requests.unwrap_or(MAX_REQUESTS_PER_LEVEL)
    }

    fn check(&self) -> Result<(), LoadError> {
        self.mode()?;
        let bad = |what: String| Err(LoadError::Plan(what));
        if self.requests.is_none() && self.duration_s.is_none() {
            return bad("a level needs requests or duration_s".into());
        }
        if self.requests == Some(0) || self.request_limit() > MAX_REQUESTS_PER_LEVEL {
            return bad(format!("requests: must be 1 to {MAX_REQUESTS_PER_LEVEL}"));
        }
        if self.warmup > MAX_REQUESTS_PER_LEVEL {
            return bad(format!("warmup: must be at most {MAX_REQUESTS_PER_LEVEL}"));
        }
        match self.duration_s {
            Some(s) if !(s.is_finite() && s > 0.0 && s <= 1e6) => bad(format!(
                "duration_s {s}: must be over 0 and at most 1000000"
            )),
            _ => Ok(()),
        }
    }
}

impl Plan {
    /// Reads and checks a plan; the message names the field that is wrong.
    pub fn from_json(json: &str) -> Result<Plan, LoadError> {
        let plan: Plan =
            serde_json::from_str(json).map_err(|error| LoadError::Plan(error.to_string()))?;
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), LoadError> {
        self.target()?;
        let bad = |what: &str| Err(LoadError::Plan(what.into()));
        if self.levels.is_empty() {
            return bad("levels: none given");
        }
        if self.prompts.is_empty() {
            return bad("prompts: none given");
        }
        if self.max_tokens == 0 {
            return bad("max_tokens: must be at least 1");
        }
        if !(self.timeout_s.is_finite() && self.timeout_s > 0.0 && self.timeout_s <= 86_400.0) {
            return bad("timeout_s: must be over 0 and at most 86400");
        }
        if !(1..=MAX_IN_FLIGHT).contains(&self.max_in_flight) {
            return bad("max_in_flight: must be 1 to 60000");
        }
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return bad("temperature: must be a finite number, at least 0");
        }
        if self
            .api_key
            .as_ref()
            .is_some_and(|key| !key.bytes().all(|b| b.is_ascii_graphic()))
        {
            return bad("api_key: only visible ASCII characters can be sent in a header");
        }
        let ids = |prompt: &Prompt| matches!(prompt.content, PromptContent::TokenIds(_));
        if self.endpoint == Endpoint::Chat && self.prompts.iter().any(ids) {
            return bad("prompts: token_ids need the completions endpoint");
        }
        self.levels.iter().try_for_each(Level::check)
    }

    pub(crate) fn target(&self) -> Result<Target, LoadError> {
        Target::parse(&self.url, self.endpoint)
    }
}

fn yes() -> bool {
    true
}

fn default_timeout_s() -> f64 {
    60.0
}

fn default_max_in_flight() -> usize {
    20_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(change: impl Fn(&mut Value)) -> Result<Plan, LoadError> {
        let mut value = json!({
            "url": "http://127.0.0.1:8000", "endpoint": "chat", "model": "m", "max_tokens": 4,
            "prompts": [{"text": "hello"}], "levels": [{"concurrency": 1, "requests": 1}],
        });
        change(&mut value);
        Plan::from_json(&value.to_string())
    }

    #[test]
    fn the_least_plan_streams_with_usage_and_a_timeout_of_a_minute() {
        let plan = plan(|_| {}).expect("valid");
        assert!(plan.stream && plan.include_usage && !plan.return_token_ids);
        assert_eq!(plan.timeout_s, 60.0);
        assert_eq!(
            plan.levels[0].mode().expect("mode"),
            Mode::Closed { concurrency: 1 }
        );
    }

    #[test]
    fn each_bad_field_is_named() {
        type Change = fn(&mut Value);
        let cases: [(&str, Change); 12] = [
            ("levels", |v| v["levels"] = json!([])),
            ("either concurrency or rate", |v| {
                v["levels"] = json!([{"requests": 1}])
            }),
            ("either concurrency or rate", |v| {
                v["levels"] = json!([{"concurrency": 1, "rate": 1.0, "requests": 1}])
            }),
            ("requests or duration_s", |v| {
                v["levels"] = json!([{"concurrency": 1}])
            }),
            ("concurrency 0", |v| {
                v["levels"] = json!([{"concurrency": 0, "requests": 1}])
            }),
            ("rate -1", |v| {
                v["levels"] = json!([{"rate": -1.0, "requests": 1}])
            }),
            ("duration_s", |v| {
                v["levels"] = json!([{"rate": 1.0, "duration_s": 0.0}])
            }),
            ("prompts", |v| v["prompts"] = json!([])),
            ("token_ids", |v| v["prompts"] = json!([{"token_ids": [1]}])),
            ("max_tokens", |v| v["max_tokens"] = json!(0)),
            ("timeout_s", |v| v["timeout_s"] = json!(0)),
            ("unknown field `colour`", |v| v["colour"] = json!(1)),
        ];
        for (named, change) in cases {
            let message = plan(change).err().expect(named).to_string();
            assert!(message.contains(named), "{named}: {message}");
        }
    }
}
