//! The served models, their replicas, and the choice between them.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use scalellm_engine_link::{Replica, ReplicaConfig, ReplicaState, proto};
use scalellm_routing::Candidate;

use crate::admission::Admission;
use crate::config::{Config, ModelConfig};
use crate::error::{ApiError, ApiResult, GatewayError};
use crate::metrics::{Metrics, ModelMetrics};
use crate::routing::{Placement, RouteWish, Routing};
use crate::text::TextModel;

/// One served model.
pub struct Model {
    pub name: Arc<str>,
    pub aliases: Vec<String>,
    pub created_unix_s: u64,
    pub text: Arc<TextModel>,
    pub replicas: Vec<Arc<Replica>>,
    pub metrics: Arc<ModelMetrics>,
    pub admission: Arc<Admission>,
    max_model_len: Option<u32>,
    pub routing: Routing,
}

/// What an engine said it can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Prompt and output tokens of one request.
    pub max_model_len: u32,
    pub vocab_size: u32,
}

impl Model {
    fn start(
        config: &ModelConfig,
        text: TextModel,
        metrics: Arc<ModelMetrics>,
        link: &ReplicaConfig,
        admission: Arc<Admission>,
    ) -> Result<Model, GatewayError> {
        let addresses = config.addresses()?;
        let routing = Routing::new(config.policy()?, addresses.len());
        let created_unix_s = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        Ok(Model {
            name: Arc::from(config.name.as_str()),
            aliases: config.aliases.clone(),
            created_unix_s,
            text: Arc::new(text),
            replicas: addresses
                .into_iter()
                .enumerate()
                .map(|(index, address)| match routing.mirror(index) {
                    Some(sink) => Replica::start_following(address, link.clone(), sink),
                    None => Replica::start(address, link.clone()),
                })
                .collect(),
            routing,
            metrics,
            admission,
            max_model_len: config.max_model_len,
        })
    }

    /// The strictest limits of the replicas that share the tokenizer; `None` until one has described itself.
    #[must_use]
    pub fn limits(&self) -> Option<Limits> {
        let of = |info: &proto::DescribeResponse| Limits {
            max_model_len: self
                .max_model_len
                .unwrap_or(u32::MAX)
                .min(info.max_model_len),
            vocab_size: info.vocab_size,
        };
        self.replicas
            .iter()
            .filter(|replica| self.shares_tokenizer(replica))
            .filter_map(|replica| replica.info())
            .map(|info| of(&info))
            .reduce(|a, b| Limits {
                max_model_len: a.max_model_len.min(b.max_model_len),
                vocab_size: a.vocab_size.min(b.vocab_size),
            })
    }

    /// The limits, or 503 while no replica has been reached.
    ///
    /// # Errors
    /// `ApiError::busy` with a time to come back.
    pub fn require_limits(&self) -> ApiResult<Limits> {
        self.limits().ok_or_else(|| self.no_replica())
    }

    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        &*self.name == name || self.aliases.iter().any(|alias| alias == name)
    }

    /// Choices that may be generated at the same time: what the replicas that are there can do.
    #[must_use]
    pub fn places(&self, config: &Config) -> usize {
        let slots: u64 = self
            .replicas
            .iter()
            .filter(|replica| self.is_usable(replica))
            .filter_map(|replica| replica.info())
            .map(|info| u64::from(info.max_num_seqs))
            .sum();
        match (slots as f64 * config.places_per_slot) as usize {
            // Nothing is known: whoever waits for an engine gets its answer.
            0 => config.max_in_flight,
            places => places.min(config.max_in_flight),
        }
    }

    #[must_use]
    pub fn no_replica(&self) -> Box<ApiError> {
        let states: Vec<String> = self
            .replicas
            .iter()
            .map(|replica| match self.shares_tokenizer(replica) {
                true => format!("{} is {}", replica.address(), state_name(replica.state())),
                false => format!("{} has another tokenizer", replica.address()),
            })
            .collect();
        let message = format!(
            "no replica of {:?} can take a request now: {}",
            self.name,
            states.join(", ")
        );
        ApiError::busy("no_replica", message, 1)
    }

    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.replicas.iter().any(|replica| self.is_usable(replica))
    }

    fn is_usable(&self, replica: &Replica) -> bool {
        replica.state() == ReplicaState::Ready && self.shares_tokenizer(replica)
    }

    /// Ids of another tokenizer would be nonsense to the engine. One that does not tell its digest is believed.
    fn shares_tokenizer(&self, replica: &Replica) -> bool {
        replica.info().is_none_or(|info| {
            info.tokenizer_digest.is_empty() || info.tokenizer_digest == self.text.digest()
        })
    }

    /// The replica for a prompt that is sent now; `avoid` are those that failed it. `None` if no other is ready.
    #[must_use]
    pub fn place(
        &self,
        submit: &proto::Submit,
        wish: RouteWish,
        avoid: &[usize],
        now_ms: f64,
    ) -> Option<Placement> {
        let candidates = self.candidates(avoid);
        self.routing.place(&candidates, submit, wish, now_ms)
    }

    /// When the first token of a prompt is to be expected, from now; `None` while nothing was measured.
    #[must_use]
    pub fn predict_first_token(&self, prompt_tokens: usize, now_ms: f64) -> Option<Duration> {
        let candidates = self.candidates(&[]);
        let predicted_ms =
            self.routing
                .predict_first_token_ms(&candidates, prompt_tokens, now_ms)?;
        Duration::try_from_secs_f64(predicted_ms / 1e3).ok()
    }

    fn candidates(&self, avoid: &[usize]) -> Vec<Candidate> {
        self.replicas
            .iter()
            .enumerate()
            .filter(|(index, replica)| !avoid.contains(index) && self.is_usable(replica))
            .map(|(index, replica)| self.routing.candidate(index, replica))
            .collect()
    }

    pub fn count_tokens(&self, prompt: u64, cached: u64, output: u64) {
        self.metrics.prompt_tokens.fetch_add(prompt, Relaxed);
        self.metrics.cached_tokens.fetch_add(cached, Relaxed);
        self.metrics.output_tokens.fetch_add(output, Relaxed);
    }
}

#[must_use]
pub fn state_name(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::Connecting => "connecting",
        ReplicaState::Ready => "ready",
        ReplicaState::Hung => "hung",
        ReplicaState::Draining => "draining",
        ReplicaState::Lost => "lost",
    }
}

/// All served models, in the order of the configuration.
pub struct Fleet {
    pub models: Vec<Arc<Model>>,
}

impl Fleet {
    /// Loads every model's tokenizer and starts connecting to its replicas.
    ///
    /// # Errors
    /// `GatewayError::Model` with what is wrong with a folder or template.
    pub fn start(config: &Config, metrics: &Metrics) -> Result<Fleet, GatewayError> {
        let mut loaded = Vec::new();
        for model in &config.models {
            let bad = |reason: String| GatewayError::Model {
                name: model.name.clone(),
                reason,
            };
            let mut text = TextModel::load(&model.path).map_err(|e| bad(e.to_string()))?;
            match &model.chat_template {
                None => text
                    .check_templates()
                    .map_err(|e| bad(format!("{}: {e}", model.path.display())))?,
                Some(path) => {
                    let in_file = |what: &dyn Display| {
                        bad(format!("chat_template {}: {what}", path.display()))
                    };
                    let source = std::fs::read_to_string(path).map_err(|e| in_file(&e))?;
                    text.replace_templates(source).map_err(|e| in_file(&e))?;
                }
            }
            loaded.push((model, text));
        }
        let link = config.replica();
        let models: Result<_, GatewayError> = loaded
            .into_iter()
            .map(|(model, text)| {
                let counts = metrics.model(&model.name);
                let admission = Admission::new(config.max_queued, config.batch_share);
                Ok(Arc::new(Model::start(
                    model, text, counts, &link, admission,
                )?))
            })
            .collect();
        Ok(Fleet { models: models? })
    }

    /// The model of that name or alias.
    ///
    /// # Errors
    /// 404 with the names that are served.
    pub fn find(&self, name: &str) -> ApiResult<&Arc<Model>> {
        self.models
            .iter()
            .find(|model| model.is_called(name))
            .ok_or_else(|| ApiError::unknown_model(name, &self.names()))
    }

    /// The model of a request that need not name one.
    ///
    /// # Errors
    /// 404 for an unknown name, 400 if there is a choice and no name.
    pub fn find_or_only(&self, name: Option<&str>) -> ApiResult<&Arc<Model>> {
        match (name, self.models.as_slice()) {
            (Some(name), _) => self.find(name),
            (None, [only]) => Ok(only),
            (None, _) => {
                let message = format!("model: missing, allowed is one of {:?}", self.names());
                Err(ApiError::field("model", message))
            }
        }
    }

    fn names(&self) -> Vec<&str> {
        self.models.iter().map(|model| &*model.name).collect()
    }

    /// Lets go of all replicas at the same time: one that does not answer must not hold up the others.
    pub async fn shutdown(&self) {
        let replicas = self.models.iter().flat_map(|model| &model.replicas);
        join_all(replicas.map(|replica| replica.shutdown())).await;
    }
}
