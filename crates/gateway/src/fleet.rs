//! The served models: which there are, and what of them outlives a change of the configuration.

mod model;

use std::fmt::Display;
use std::sync::Arc;

use futures_util::future::join_all;
use scalellm_engine_link::{Replica, ReplicaState};

use crate::app::Live;
use crate::config::{Config, ModelConfig};
use crate::error::{ApiError, ApiResult, GatewayError};
use crate::faults::Faults;
use crate::foreign::ForeignModel;
use crate::metrics::Metrics;
use crate::safety::Safety;
use crate::served::Served;
use crate::text::TextModel;

pub use model::{Limits, Model, replica_name, state_name};

/// All served models, in the order of the configuration.
pub struct Fleet {
    pub served: Vec<Arc<Served>>,
    /// Those that have replicas of our own.
    pub models: Vec<Arc<Model>>,
    /// Those that have upstreams; a model may have both.
    pub foreign: Vec<Arc<ForeignModel>>,
}

impl Fleet {
    /// Loads every model's tokenizer and starts connecting to its replicas. What `before` has already, and is not to
    /// change, is taken over.
    ///
    /// # Errors
    /// `GatewayError::Model` with what is wrong with a folder or template, `Config` for an upstream.
    pub fn start(
        config: &Config,
        metrics: &Arc<Metrics>,
        before: Option<&Live>,
    ) -> Result<Fleet, GatewayError> {
        let link = config.replica();
        let mut fleet = Fleet {
            served: Vec::new(),
            models: Vec::new(),
            foreign: Vec::new(),
        };
        for (index, model) in config.models.iter().enumerate() {
            let before = before.and_then(|live| Before::of(live, config, model));
            let (hooks, path) = model.hooks(index)?;
            let checked = before
                .as_ref()
                .and_then(|before| before.served.safety.as_ref());
            let safety = Safety::start(hooks, &path, checked)?;
            let served = match &before {
                Some(before) => Served::next(before.served, model, safety),
                None => Served::new(model, safety, config, metrics),
            };
            fleet.served.push(Arc::clone(&served));
            if !model.replicas.is_empty() {
                let unchanged = before
                    .as_ref()
                    .and_then(|before| before.unchanged(&served, model));
                fleet.models.push(match unchanged {
                    Some(own) => own,
                    None => {
                        let loaded = before.as_ref().and_then(|before| before.text(model));
                        let text = loaded.map_or_else(
                            || load_text(model, config.text_cache_bytes).map(Arc::new),
                            Ok,
                        )?;
                        let faults = Faults::new(
                            &config.faults,
                            config.max_in_flight,
                            model.replicas.len(),
                            metrics,
                        );
                        Arc::new(Model::start(
                            Arc::clone(&served),
                            model,
                            index,
                            text,
                            &link,
                            faults,
                        )?)
                    }
                });
            }
            if !model.upstreams.is_empty() {
                let elsewhere = before
                    .as_ref()
                    .and_then(|before| before.live.fleet.elsewhere(before.served));
                let before = elsewhere.map(|old| &**old);
                let foreign = ForeignModel::start(served, model, index, &config.faults, before)?;
                fleet.foreign.push(Arc::new(foreign));
            }
        }
        Ok(fleet)
    }

    /// Whether every replica that was ready in `before` is ready here too.
    #[must_use]
    pub fn is_as_ready_as(&self, before: &Fleet) -> bool {
        let is_ready = |replica: &&Arc<Replica>| replica.state() == ReplicaState::Ready;
        self.replicas()
            .filter(|replica| !is_ready(replica))
            .all(|replica| {
                let mut others = before.replicas().filter(is_ready);
                !others.any(|other| other.address() == replica.address())
            })
    }

    #[must_use]
    pub fn has_foreign(&self) -> bool {
        !self.foreign.is_empty()
    }

    /// The model of that name or alias.
    ///
    /// # Errors
    /// 404 with the names that are served.
    pub fn find(&self, name: &str) -> ApiResult<&Arc<Served>> {
        self.served
            .iter()
            .find(|served| served.is_called(name))
            .ok_or_else(|| ApiError::unknown_model(name, &self.names()))
    }

    /// The model of a request that need not name one.
    ///
    /// # Errors
    /// 404 for an unknown name, 400 if there is a choice and no name.
    fn served_or_only(&self, name: Option<&str>) -> ApiResult<&Arc<Served>> {
        match (name, self.served.as_slice()) {
            (Some(name), _) => self.find(name),
            (None, [only]) => Ok(only),
            (None, _) => {
                let message = format!("model: missing, allowed is one of {:?}", self.names());
                Err(ApiError::field("model", message))
            }
        }
    }

    /// The same, where replicas of our own are needed.
    ///
    /// # Errors
    /// As `served_or_only`; 400 if only servers elsewhere have the model.
    pub fn find_or_only(&self, name: Option<&str>) -> ApiResult<&Arc<Model>> {
        let served = self.served_or_only(name)?;
        self.own(served).ok_or_else(|| {
            let message = format!(
                "model: {:?} is computed elsewhere, where this cannot be asked",
                served.name
            );
            ApiError::unsupported("model", message)
        })
    }

    /// The model, if its upstreams may be to answer, and whether a replica of our own is ready: then only those answer
    /// that share requests with the replicas. Where it has both and nobody is there, whoever comes is waited for here.
    ///
    /// # Errors
    /// As `served_or_only`.
    pub fn foreign(&self, name: Option<&str>) -> ApiResult<Option<(&Arc<ForeignModel>, bool)>> {
        let served = self.served_or_only(name)?;
        let own = self.own(served);
        let own_is_ready = own.is_some_and(|model| model.is_ready());
        let elsewhere = self
            .elsewhere(served)
            .filter(|model| !own_is_ready || model.shares())
            .filter(|model| own.is_none() || model.is_ready());
        Ok(elsewhere.map(|model| (model, own_is_ready)))
    }

    /// Choices of a model that may be generated at the same time. Where upstreams share its requests what these can do
    /// is not known; where they do not, or no longer, what they still answer holds no place of the replicas'.
    #[must_use]
    pub fn places(&self, model: &Model, config: &Config) -> usize {
        match self.elsewhere(&model.served) {
            None => model.places(config),
            Some(other) if other.takes_its_share() => config.max_in_flight,
            Some(other) => (model.places(config) + other.in_flight()).min(config.max_in_flight),
        }
    }

    /// What has taken the place of `model`, if something has whose limits are known.
    #[must_use]
    pub fn newer(&self, model: &Arc<Model>) -> Option<(Arc<Model>, Limits)> {
        let newer = self.models.iter().find(|newer| newer.name == model.name)?;
        // Nearly always it is the same: then nothing is asked of its replicas.
        let changed = (!Arc::ptr_eq(newer, model)).then_some(newer)?;
        Some((Arc::clone(changed), changed.limits()?))
    }

    /// The replicas of our own that compute a model.
    #[must_use]
    pub fn own(&self, served: &Arc<Served>) -> Option<&Arc<Model>> {
        self.models
            .iter()
            .find(|model| Arc::ptr_eq(&model.served, served))
    }

    /// The upstreams that do.
    #[must_use]
    pub fn elsewhere(&self, served: &Arc<Served>) -> Option<&Arc<ForeignModel>> {
        self.foreign
            .iter()
            .find(|model| Arc::ptr_eq(&model.served, served))
    }

    /// Why a request would be refused now, if nobody can compute one of the models.
    #[must_use]
    pub fn waiting(&self) -> Option<Box<ApiError>> {
        let served = self.served.iter().find(|served| !self.is_ready(served))?;
        let own = self.own(served).map(|model| model.no_replica());
        own.or_else(|| self.elsewhere(served).map(|model| model.no_upstream()))
    }

    #[must_use]
    pub fn is_any_ready(&self) -> bool {
        self.served.iter().any(|served| self.is_ready(served))
    }

    /// Somebody can compute it.
    fn is_ready(&self, served: &Arc<Served>) -> bool {
        self.own(served).is_some_and(|model| model.is_ready())
            || self.elsewhere(served).is_some_and(|model| model.is_ready())
    }

    /// All replicas of our own.
    pub fn replicas(&self) -> impl Iterator<Item = &Arc<Replica>> {
        self.models.iter().flat_map(|model| &model.replicas)
    }

    /// All engines, by model and address or URL.
    pub fn engines(&self) -> impl Iterator<Item = String> {
        let own = self.models.iter().flat_map(|model| {
            model
                .replicas
                .iter()
                .map(|replica| format!("{}: {}", model.name, replica.address()))
        });
        let elsewhere = self.foreign.iter().flat_map(|model| {
            model
                .upstreams
                .iter()
                .map(|upstream| format!("{}: {}", model.served.name, upstream.name))
        });
        own.chain(elsewhere)
    }

    fn names(&self) -> Vec<&str> {
        self.served.iter().map(|served| &*served.name).collect()
    }

    /// Lets go of all replicas at the same time: one that does not answer must not hold up the others.
    pub async fn shutdown(&self) {
        let replicas = self.models.iter().flat_map(|model| &model.replicas);
        join_all(replicas.map(|replica| replica.shutdown())).await;
    }
}

/// What served a model until now, where another configuration takes its place.
struct Before<'a> {
    live: &'a Live,
    served: &'a Arc<Served>,
    config: &'a ModelConfig,
    /// Replicas are spoken to as before, and their failures met as before.
    same_link: bool,
}

impl<'a> Before<'a> {
    fn of(live: &'a Live, config: &Config, model: &ModelConfig) -> Option<Before<'a>> {
        Some(Before {
            live,
            served: live
                .fleet
                .served
                .iter()
                .find(|served| *served.name == *model.name)?,
            config: live
                .config
                .models
                .iter()
                .find(|old| old.name == model.name)?,
            same_link: (
                live.config.replica_hung_after_s,
                live.config.replica_silence_s,
            ) == (config.replica_hung_after_s, config.replica_silence_s)
                && live.config.faults == config.faults,
        })
    }

    /// The model as it is, if nothing that it was made of has changed.
    fn unchanged(&self, served: &Arc<Served>, model: &ModelConfig) -> Option<Arc<Model>> {
        let same = self.same_link
            && Arc::ptr_eq(self.served, served)
            && self.config == model
            && model.chat_template.is_none();
        self.live.fleet.own(self.served).filter(|_| same).cloned()
    }

    /// The loaded tokenizer; a template in a file of its own may have been edited there.
    fn text(&self, model: &ModelConfig) -> Option<Arc<TextModel>> {
        let same = self.config.path == model.path
            && self.config.chat_template.is_none()
            && model.chat_template.is_none();
        let own = self.live.fleet.own(self.served)?;
        same.then(|| Arc::clone(&own.text))
    }
}

/// The tokenizer and templates of a model.
fn load_text(model: &ModelConfig, cache_bytes: usize) -> Result<TextModel, GatewayError> {
    let bad = |reason: String| GatewayError::Model {
        name: model.name.clone(),
        reason,
    };
    let mut text = TextModel::load(&model.path).map_err(|e| bad(e.to_string()))?;
    text.limit_cache(cache_bytes);
    match &model.chat_template {
        None => text
            .check_templates()
            .map_err(|e| bad(format!("{}: {e}", model.path.display())))?,
        Some(path) => {
            let in_file =
                |what: &dyn Display| bad(format!("chat_template {}: {what}", path.display()));
            let source = std::fs::read_to_string(path).map_err(|e| in_file(&e))?;
            text.replace_templates(source).map_err(|e| in_file(&e))?;
        }
    }
    Ok(text)
}
