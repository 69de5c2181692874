//! `[[models.safety]]`: checks of a model's requests and responses, in their order. What the hooks themselves cannot
//! do is refused where they are made, in `crate::safety`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::UpstreamConfig;
use crate::error::GatewayError;

/// One hook; `hook` in the configuration says which.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "hook", rename_all = "snake_case")]
pub enum HookConfig {
    Words(WordsConfig),
    PersonalData(PersonalDataConfig),
    Limits(LimitsConfig),
    Classifier(ClassifierConfig),
}

/// What a hook looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum On {
    Request,
    Response,
    #[default]
    Both,
}

impl On {
    #[must_use]
    pub fn requests(self) -> bool {
        self != On::Response
    }

    #[must_use]
    pub fn responses(self) -> bool {
        self != On::Request
    }
}

/// What a hook does with what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The request gets an error, also when its answer has begun.
    Refuse,
    /// The answer ends before it; of a request the same as `refuse`.
    Stop,
    /// Something else stands in its place.
    Mask,
}

impl Action {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Action::Refuse => "refuse",
            Action::Stop => "stop",
            Action::Mask => "mask",
        }
    }
}

/// Words and patterns that must not be said.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WordsConfig {
    /// By which metrics, usage and errors call it.
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub on: On,
    #[serde(default = "refuse")]
    pub action: Action,
    /// Whole words or phrases, in any case.
    #[serde(default)]
    pub words: Vec<String>,
    /// Regular expressions of the `regex` crate whose matches have a longest length.
    #[serde(default)]
    pub patterns: Vec<String>,
    /// What stands in the place of what is masked.
    #[serde(default = "removed")]
    pub mask: String,
    /// The log may repeat what was found.
    #[serde(default)]
    pub log_content: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PersonalKind {
    Email,
    Iban,
    Card,
    Phone,
}

impl PersonalKind {
    /// In the order in which they are looked for: what is an IBAN's or a card's digits is no phone number.
    pub const ALL: [PersonalKind; 4] = [
        PersonalKind::Email,
        PersonalKind::Iban,
        PersonalKind::Card,
        PersonalKind::Phone,
    ];
}

/// Data that belong to persons.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PersonalDataConfig {
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub on: On,
    #[serde(default = "mask")]
    pub action: Action,
    #[serde(default = "all_kinds")]
    pub kinds: Vec<PersonalKind>,
    #[serde(default)]
    pub log_content: bool,
}

/// Sizes, and answers that go round in circles.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsConfig {
    #[serde(default)]
    pub name: Option<String>,
    /// Of all texts of a request together.
    #[serde(default)]
    pub max_request_chars: Option<usize>,
    /// Of each text of an answer.
    #[serde(default)]
    pub max_response_chars: Option<usize>,
    /// An answer that has said the same so many times in a row is ended.
    #[serde(default)]
    pub max_repeats: Option<usize>,
    /// What is repeated is that long at least, all of it together.
    #[serde(default = "min_repeated_bytes")]
    pub min_repeated_bytes: usize,
}

/// What happens while a classifier does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// Everything passes.
    Open,
    /// Nothing does.
    #[default]
    Closed,
}

/// A server that judges texts: OpenAI's `/moderations`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierConfig {
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub on: On,
    #[serde(default = "refuse")]
    pub action: Action,
    /// Up to and with `/v1`; `/moderations` is asked below it.
    pub url: String,
    /// The `model` that is asked for.
    #[serde(default)]
    pub model: Option<String>,
    #[serde(default)]
    pub api_key_env: Option<String>,
    #[serde(default)]
    pub api_key_file: Option<PathBuf>,
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    #[serde(default = "classifier_timeout_s")]
    pub timeout_s: f64,
    #[serde(default)]
    pub on_failure: OnFailure,
    /// An answer is held back until so many characters have come, and are judged; 0 judges it whole.
    #[serde(default = "every_chars")]
    pub every_chars: usize,
    /// Of what was let through before, so much is shown again with each part.
    #[serde(default = "context_chars")]
    pub context_chars: usize,
}

fn refuse() -> Action {
    Action::Refuse
}

fn mask() -> Action {
    Action::Mask
}

fn removed() -> String {
    "[REMOVED]".to_owned()
}

fn all_kinds() -> Vec<PersonalKind> {
    PersonalKind::ALL.to_vec()
}

fn min_repeated_bytes() -> usize {
    512
}

fn classifier_timeout_s() -> f64 {
    2.0
}

fn every_chars() -> usize {
    500
}

fn context_chars() -> usize {
    2000
}

impl HookConfig {
    /// What it is called: by its `name`, or by what it is.
    #[must_use]
    pub fn name(&self) -> &str {
        let (name, kind) = match self {
            HookConfig::Words(hook) => (&hook.name, "words"),
            HookConfig::PersonalData(hook) => (&hook.name, "personal_data"),
            HookConfig::Limits(hook) => (&hook.name, "limits"),
            HookConfig::Classifier(hook) => (&hook.name, "classifier"),
        };
        name.as_deref().unwrap_or(kind)
    }

    /// Whether files beside the configuration say what it does.
    #[must_use]
    pub fn reads_files(&self) -> bool {
        match self {
            HookConfig::Classifier(hook) => hook.api_key_file.is_some() || hook.ca_file.is_some(),
            _ => false,
        }
    }
}

impl ClassifierConfig {
    /// The server as one that requests can be sent to; nobody asks for its health.
    #[must_use]
    pub fn upstream(&self) -> UpstreamConfig {
        UpstreamConfig {
            api_key_env: self.api_key_env.clone(),
            api_key_file: self.api_key_file.clone(),
            ca_file: self.ca_file.clone(),
            connect_timeout_s: self.timeout_s,
            first_byte_timeout_s: self.timeout_s,
            idle_timeout_s: self.timeout_s,
            health_path: String::new(),
            max_idle_connections: 64,
            ..UpstreamConfig::at(self.url.clone())
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    safety: Vec<HookConfig>,
}

/// The hooks of a file of its own, in tables `[[safety]]`; `key` names the setting that points to it.
///
/// # Errors
/// `GatewayError::Config` with the file and what is wrong with it.
pub fn read(file: &Path, key: &str) -> Result<Vec<HookConfig>, GatewayError> {
    let bad = |what: &dyn std::fmt::Display| {
        let what = what.to_string();
        GatewayError::Config(format!("{key}: {}: {}", file.display(), what.trim_end()))
    };
    let text = std::fs::read_to_string(file).map_err(|error| bad(&error))?;
    let file: File = toml::from_str(&text).map_err(|error| bad(&error))?;
    Ok(file.safety)
}
