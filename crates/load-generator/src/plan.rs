use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::LoadError;
use crate::url::Target;

/// Most requests one level may record; bounds the generator's memory (about 100 bytes each).
pub const MAX_REQUESTS_PER_LEVEL: usize = 5_000_000;
/// Most requests a closed or open level may have open at once.
pub const MAX_IN_FLIGHT: usize = 60_000;
/// Most turns a conversation may have after its first.
const MAX_TURNS: usize = 1_000;
const MAX_WAIT_S: f64 = 1e6;
const TRACE_PREFIX_DIGITS: usize = 16;

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
    /// `http[s]://HOST[:PORT][/PREFIX][/v1]`
    pub url: String,
    pub endpoint: Endpoint,
    pub model: String,
    #[serde(default)]
    pub api_key: Option<String>,
    /// How an https target proves who it is.
    #[serde(default)]
    pub tls: Trust,
    /// 16 hexadecimal digits. Request n of the run is then sent with the id `{trace_prefix}{n:016x}`,
    /// from 1, as `x-request-id` and as the trace of a W3C `traceparent`; the records bear it.
    #[serde(default)]
    pub trace_prefix: Option<String>,
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
    /// Taken in turn, across warm-ups and levels; used again when they run out.
    pub prompts: Vec<Prompt>,
    pub levels: Vec<Level>,
    /// Open requests an open level may hold; a send beyond it is recorded as failed, not queued.
    #[serde(default = "default_max_in_flight")]
    pub max_in_flight: usize,
    /// Keep every gap between chunks in the records (for timelines; costs 4 bytes a chunk).
    #[serde(default)]
    pub record_gaps: bool,
}

/// Whom to believe beside the public authorities.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// Certificates of authorities, PEM.
    #[serde(default)]
    pub ca_pem: Option<String>,
    /// Take any certificate.
    #[serde(default)]
    pub insecure: bool,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    #[serde(flatten)]
    pub content: PromptContent,
    /// Instead of the plan's.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// What the user says after each answer: then the prompt is the beginning of a conversation,
    /// and every further request carries all that was said before, answers included.
    #[serde(default)]
    pub turns: Vec<Turn>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turn {
    pub text: String,
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// How long the user thinks after the answer.
    #[serde(default)]
    pub after_s: f64,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptContent {
    Text(String),
    /// Sent as the `prompt` array of `/v1/completions`.
    TokenIds(Vec<u32>),
    /// Sent as the `messages` of `/v1/chat/completions`.
    Messages(Vec<Value>),
}

/// One row of the results. Exactly one of `concurrency` (closed loop) and `send_at_s` (open loop).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    #[serde(default)]
    pub concurrency: Option<usize>,
    /// When the open loop's sends (or conversations) are due, after the level's start; ascending.
    #[serde(default)]
    pub send_at_s: Option<Vec<f64>>,
    /// What the row is to be called: requests per second.
    #[serde(default)]
    pub rate: Option<f64>,
    /// No send begins after this many, or after `duration_s`, whichever comes first.
    #[serde(default)]
    pub requests: Option<usize>,
    #[serde(default)]
    pub duration_s: Option<f64>,
    /// Requests sent and forgotten before measuring begins.
    #[serde(default)]
    pub warmup: usize,
    /// A closed level's clients begin evenly over this time, not all at once.
    #[serde(default)]
    pub ramp_s: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    Closed { concurrency: usize },
    Open,
}

impl Level {
    pub(crate) fn mode(&self) -> Result<Mode, LoadError> {
        match (self.concurrency, &self.send_at_s) {
            (Some(concurrency), None) if (1..=MAX_IN_FLIGHT).contains(&concurrency) => {
                Ok(Mode::Closed { concurrency })
            }
            (Some(concurrency), None) => Err(LoadError::Plan(format!(
                "concurrency {concurrency}: must be 1 to {MAX_IN_FLIGHT}"
            ))),
            (None, Some(send_at_s)) => check_times(send_at_s).map(|()| Mode::Open),
            _ => Err(LoadError::Plan(
                "a level needs either concurrency or send_at_s".into(),
            )),
        }
    }

    pub(crate) fn request_limit(&self) -> usize {
        let scheduled = self.send_at_s.as_ref().map(Vec::len);
        let asked = self.requests.unwrap_or(MAX_REQUESTS_PER_LEVEL);
        scheduled.map_or(asked, |sends| sends.min(asked))
    }

    fn check(&self) -> Result<(), LoadError> {
        self.mode()?;
        let bad = |what: String| Err(LoadError::Plan(what));
        if self.concurrency.is_some() && self.requests.is_none() && self.duration_s.is_none() {
            return bad("a closed level needs requests or duration_s".into());
        }
        if self.requests == Some(0) || self.request_limit() > MAX_REQUESTS_PER_LEVEL {
            return bad(format!("requests: must be 1 to {MAX_REQUESTS_PER_LEVEL}"));
        }
        if self.warmup > MAX_REQUESTS_PER_LEVEL {
            return bad(format!("warmup: must be at most {MAX_REQUESTS_PER_LEVEL}"));
        }
        if !(self.ramp_s.is_finite() && (0.0..=MAX_WAIT_S).contains(&self.ramp_s)) {
            return bad(format!("ramp_s {}: must be 0 to {MAX_WAIT_S}", self.ramp_s));
        }
        match self.duration_s {
            Some(s) if !(s.is_finite() && s > 0.0 && s <= MAX_WAIT_S) => bad(format!(
                "duration_s {s}: must be over 0 and at most 1000000"
            )),
            _ => Ok(()),
        }
    }
}

fn check_times(send_at_s: &[f64]) -> Result<(), LoadError> {
    let first = send_at_s.first().copied().unwrap_or(f64::NAN);
    let last = send_at_s.last().copied().unwrap_or(f64::NAN);
    if send_at_s.len() <= MAX_REQUESTS_PER_LEVEL
        && send_at_s.is_sorted()
        && first >= 0.0
        && last <= MAX_WAIT_S
    {
        return Ok(());
    }
    Err(LoadError::Plan(format!(
        "send_at_s: must be 1 to {MAX_REQUESTS_PER_LEVEL} ascending times from 0 to {MAX_WAIT_S} s"
    )))
}

impl Prompt {
    fn check(&self, endpoint: Endpoint) -> Result<(), LoadError> {
        let bad = |what: String| Err(LoadError::Plan(what));
        match (endpoint, &self.content) {
            (Endpoint::Chat, PromptContent::TokenIds(_)) => {
                return bad("prompts: token_ids need the completions endpoint".into());
            }
            (Endpoint::Completions, PromptContent::Messages(_)) => {
                return bad("prompts: messages need the chat endpoint".into());
            }
            (_, PromptContent::TokenIds(_)) if !self.turns.is_empty() => {
                return bad("prompts: a conversation with turns begins with text".into());
            }
            _ => {}
        }
        if self.turns.len() > MAX_TURNS {
            return bad(format!("turns: must be at most {MAX_TURNS}"));
        }
        let mut lengths = self.turns.iter().map(|turn| turn.max_tokens);
        if self.max_tokens == Some(0) || lengths.any(|length| length == Some(0)) {
            return bad("max_tokens: must be at least 1".into());
        }
        match self
            .turns
            .iter()
            .map(|turn| turn.after_s)
            .find(|s| !(0.0..=MAX_WAIT_S).contains(s))
        {
            Some(s) => bad(format!("after_s {s}: must be 0 to {MAX_WAIT_S}")),
            None => Ok(()),
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
        if self.target()?.tls_name.is_some() {
            self.tls.client_config()?;
        }
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
        if self.trace_prefix.as_ref().is_some_and(|prefix| {
            prefix.len() != TRACE_PREFIX_DIGITS || u64::from_str_radix(prefix, 16).is_err()
        }) {
            return bad("trace_prefix: must be 16 hexadecimal digits");
        }
        self.prompts
            .iter()
            .try_for_each(|prompt| prompt.check(self.endpoint))?;
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
        let cases: [(&str, Change); 18] = [
            ("levels", |v| v["levels"] = json!([])),
            ("either concurrency or send_at_s", |v| {
                v["levels"] = json!([{"requests": 1}])
            }),
            (
                "either concurrency or send_at_s",
                |v| v["levels"] = json!([{"concurrency": 1, "send_at_s": [0.0], "requests": 1}]),
            ),
            ("requests or duration_s", |v| {
                v["levels"] = json!([{"concurrency": 1}])
            }),
            ("concurrency 0", |v| {
                v["levels"] = json!([{"concurrency": 0, "requests": 1}])
            }),
            ("ascending", |v| {
                v["levels"] = json!([{"send_at_s": [1.0, 0.5]}])
            }),
            ("1 to", |v| v["levels"] = json!([{"send_at_s": []}])),
            ("duration_s", |v| {
                v["levels"] = json!([{"send_at_s": [1.0], "duration_s": 0.0}])
            }),
            ("messages need the chat", |v| {
                v["endpoint"] = json!("completions");
                v["prompts"] = json!([{"messages": []}]);
            }),
            (
                "after_s -1",
                |v| {
                    v["prompts"] = json!([{"text": "a", "turns": [{"text": "b", "after_s": -1.0}]}])
                },
            ),
            ("begins with text", |v| {
                v["endpoint"] = json!("completions");
                v["prompts"] = json!([{"token_ids": [1], "turns": [{"text": "b"}]}]);
            }),
            ("prompts", |v| v["prompts"] = json!([])),
            ("token_ids", |v| v["prompts"] = json!([{"token_ids": [1]}])),
            ("max_tokens", |v| v["max_tokens"] = json!(0)),
            ("timeout_s", |v| v["timeout_s"] = json!(0)),
            ("trace_prefix", |v| {
                v["trace_prefix"] = json!("12g4567812345678")
            }),
            ("ca_pem", |v| {
                v["url"] = json!("https://h");
                v["tls"] = json!({"ca_pem": "no certificate"});
            }),
            ("unknown field `colour`", |v| v["colour"] = json!(1)),
        ];
        for (named, change) in cases {
            let message = plan(change).err().expect(named).to_string();
            assert!(message.contains(named), "{named}: {message}");
        }
    }
}
