//! A model that replicas of our own compute, and which of these can take a request.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use scalellm_engine_link::{Replica, ReplicaConfig, ReplicaState, proto};
use scalellm_routing::Candidate;

use crate::config::{Config, ModelConfig};
use crate::engine_name::engine_name;
use crate::error::{ApiError, ApiResult, GatewayError};
use crate::faults::Faults;
use crate::routing::{Placement, RouteWish, Routing};
use crate::served::Served;
use crate::text::TextModel;
use crate::text_pool::Pace;

/// A served model that replicas of our own compute.
pub struct Model {
    pub served: Arc<Served>,
    pub text: Arc<TextModel>,
    pub paces: TextPaces,
    pub replicas: Vec<Arc<Replica>>,
    /// Of them, those that get no new requests.
    drained: Vec<Arc<Replica>>,
    /// Of each replica, as the log tells it.
    addresses: Vec<Arc<str>>,
    pub faults: Faults,
    max_model_len: Option<u32>,
    pub routing: Routing,
}

impl Deref for Model {
    type Target = Served;

    fn deref(&self) -> &Served {
        &self.served
    }
}

/// How quick each kind of a model's short text work was.
#[derive(Default)]
pub struct TextPaces {
    pub chat: Pace,
    pub prompts: Pace,
    pub back: Pace,
}

/// What an engine said it can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Prompt and output tokens of one request.
    pub max_model_len: u32,
    pub vocab_size: u32,
}

impl Model {
    pub(super) fn start(
        served: Arc<Served>,
        config: &ModelConfig,
        index: usize,
        text: Arc<TextModel>,
        link: &ReplicaConfig,
        faults: Faults,
    ) -> Result<Model, GatewayError> {
        let addresses = config.addresses(index)?;
        let names: Vec<Arc<str>> = addresses.iter().map(|a| a.to_string().into()).collect();
        let routing = Routing::new(config.policy(index)?, &names);
        let replicas: Vec<Arc<Replica>> = addresses
            .into_iter()
            .enumerate()
            .map(|(index, address)| match routing.mirror(index) {
                Some(sink) => Replica::start_following(address, link.clone(), sink),
                None => Replica::start(address, link.clone()),
            })
            .collect();
        let is_drained =
            |replica: &&Arc<Replica>| config.drained.contains(&replica.address().to_string());
        let drained = replicas.iter().filter(is_drained).cloned().collect();
        Ok(Model {
            served,
            text,
            paces: TextPaces::default(),
            replicas,
            drained,
            addresses: names,
            routing,
            faults,
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

    /// The address of a replica.
    #[must_use]
    pub fn address(&self, replica: usize) -> Option<Arc<str>> {
        self.addresses.get(replica).map(Arc::clone)
    }

    #[must_use]
    pub fn no_replica(&self) -> Box<ApiError> {
        let states: Vec<String> = self
            .replicas
            .iter()
            .map(|replica| {
                let name = replica_name(replica);
                match self.shares_tokenizer(replica) {
                    true => format!("{name} is {}", state_name(replica.state())),
                    false => format!("{name} has another tokenizer"),
                }
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

    /// An operator wants it to get no new requests.
    #[must_use]
    pub fn is_drained(&self, replica: &Replica) -> bool {
        self.drained
            .iter()
            .any(|drained| std::ptr::eq(&**drained, replica))
    }

    #[must_use]
    pub fn is_usable(&self, replica: &Replica) -> bool {
        !self.is_drained(replica)
            && replica.state() == ReplicaState::Ready
            && self.shares_tokenizer(replica)
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
        let candidates = self
            .faults
            .allowed(&self.replicas, self.candidates(avoid), now_ms);
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

    /// Whether there is a replica to send to, other than those in `avoid`.
    #[must_use]
    pub fn has_usable(&self, avoid: &[usize]) -> bool {
        self.usable(avoid).next().is_some()
    }

    fn usable(&self, avoid: &[usize]) -> impl Iterator<Item = (usize, &Arc<Replica>)> {
        let all = self.replicas.iter().enumerate();
        all.filter(|(index, replica)| !avoid.contains(index) && self.is_usable(replica))
    }

    fn candidates(&self, avoid: &[usize]) -> Vec<Candidate> {
        self.usable(avoid)
            .map(|(index, replica)| self.routing.candidate(index, replica))
            .collect()
    }
}

/// What clients are told of a replica.
#[must_use]
pub fn replica_name(replica: &Replica) -> String {
    engine_name("replica", &replica.address().to_string())
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
