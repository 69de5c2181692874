//! `[[models]]`: what is served, and who computes it.

use std::path::PathBuf;
use std::str::FromStr;

use scalellm_engine_link::Address;
use scalellm_routing::Policy;
use serde::Deserialize;

use super::UpstreamConfig;
use super::safety::{self, HookConfig};
use super::upstream::MAX_WEIGHT;
use crate::error::GatewayError;

/// One served model and who computes it: replicas of our own, servers elsewhere, or both.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    pub name: String,
    pub aliases: Vec<String>,
    /// Folder with the tokenizer's files, for the replicas.
    pub path: PathBuf,
    /// `unix:/path` or `host:port`.
    pub replicas: Vec<String>,
    pub upstreams: Vec<UpstreamConfig>,
    /// What the replicas together weigh beside the upstreams; without it these answer only while no replica is ready.
    pub replicas_weight: Option<u32>,
    /// Of both, those that get no new requests; set through `/admin/v1` alone.
    #[serde(skip)]
    pub drained: Vec<String>,
    /// Lowers the engines' own limit.
    pub max_model_len: Option<u32>,
    /// File with a chat template that replaces the folder's.
    pub chat_template: Option<PathBuf>,
    /// How a replica or an upstream is chosen: `prefix`, `least-load`, `shape` or `session`.
    pub routing: String,
    /// Where a controller writes the shape of its replicas down, for `/admin/v1/blueprint`.
    pub blueprint_file: Option<PathBuf>,
    /// Checks of requests and answers, in their order.
    pub safety: Vec<HookConfig>,
    /// The same, in tables `[[safety]]` of a file of their own.
    pub safety_file: Option<PathBuf>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            name: String::new(),
            aliases: Vec::new(),
            path: PathBuf::new(),
            replicas: Vec::new(),
            upstreams: Vec::new(),
            replicas_weight: None,
            max_model_len: None,
            chat_template: None,
            drained: Vec::new(),
            routing: Policy::Prefix.name().to_owned(),
            blueprint_file: None,
            safety: Vec::new(),
            safety_file: None,
        }
    }
}

impl ModelConfig {
    /// How a replica is chosen.
    ///
    /// # Errors
    /// `GatewayError::Config` names what is allowed.
    pub fn policy(&self, index: usize) -> Result<Policy, GatewayError> {
        self.routing
            .parse()
            .map_err(|error| GatewayError::Config(format!("models[{index}].routing: {error}")))
    }

    /// Checks what the types do not; `index` is the model's in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn validate(&self, index: usize) -> Result<(), GatewayError> {
        let path = format!("models[{index}]");
        let bad = |message: String| Err(GatewayError::Config(format!("{path}.{message}")));
        if self.replicas.is_empty() && self.upstreams.is_empty() {
            return bad(format!(
                "replicas: model {:?} has none, and no upstreams",
                self.name
            ));
        }
        if !self.replicas.is_empty() && self.path.as_os_str().is_empty() {
            return bad(
                "path: missing, needed is the folder of the replicas' tokenizer".to_owned(),
            );
        }
        self.addresses(index)?;
        self.policy(index)?;
        for (number, upstream) in self.upstreams.iter().enumerate() {
            upstream.validate(&format!("{path}.upstreams[{number}]"))?;
        }
        if let Some(weight) = self.replicas_weight {
            if !(1..=MAX_WEIGHT).contains(&weight) {
                return bad(format!(
                    "replicas_weight: got {weight}, allowed is 1 to {MAX_WEIGHT}"
                ));
            }
            if self.replicas.is_empty() || self.upstreams.is_empty() {
                return bad(
                    "replicas_weight: allowed only beside both replicas and upstreams".to_owned(),
                );
            }
        }
        if !self.safety.is_empty() && self.safety_file.is_some() {
            return bad("safety_file: got both it and safety, allowed is one of them".to_owned());
        }
        if self.max_model_len == Some(0) {
            return bad("max_model_len: got 0, allowed is 1 or more".to_owned());
        }
        Ok(())
    }

    /// The hooks, and how errors are to call their place; `index` is the model's in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` with what is wrong with their file.
    pub fn hooks(&self, index: usize) -> Result<(Vec<HookConfig>, String), GatewayError> {
        match &self.safety_file {
            None => Ok((self.safety.clone(), format!("models[{index}].safety"))),
            Some(file) => {
                let hooks = safety::read(file, &format!("models[{index}].safety_file"))?;
                Ok((hooks, format!("{}: safety", file.display())))
            }
        }
    }

    /// The replicas' addresses, parsed; `index` is the model's in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` names the bad one.
    pub fn addresses(&self, index: usize) -> Result<Vec<Address>, GatewayError> {
        self.replicas
            .iter()
            .enumerate()
            .map(|(number, text)| {
                Address::from_str(text).map_err(|e| {
                    GatewayError::Config(format!(
                        "models[{index}].replicas[{number}]: got {text:?} ({e}), allowed is unix:/path, host:port or file:/path"
                    ))
                })
            })
            .collect()
    }
}
