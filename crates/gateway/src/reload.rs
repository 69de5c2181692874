//! A change of the configuration while requests run: read and checked whole, built beside what serves, swapped in at
//! once. Whatever is the same in both stays as it is, with its connections; requests that run keep what they began
//! with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinSet;

use crate::app::{App, Live};
use crate::config::Config;
use crate::error::GatewayError;
use crate::fleet::{Fleet, Model};
use crate::tls;

/// How often a model that goes is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A change waits this long for replicas that are there already to be reached anew.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// What changes need, and one at a time.
pub struct Changes {
    /// Where the configuration was read from.
    path: Option<PathBuf>,
    turn: tokio::sync::Mutex<JoinSet<()>>,
}

/// What a change did.
#[derive(Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Applied {
    /// Replicas' addresses and upstreams' URLs.
    pub added: Vec<String>,
    pub removed: Vec<String>,
    /// Keys whose new values are used at the next start.
    pub at_next_start: Vec<&'static str>,
}

impl Changes {
    #[must_use]
    pub fn new(path: Option<PathBuf>) -> Changes {
        Changes {
            path,
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// What is wrong with it; then nothing has changed.
    pub async fn reload(&self, app: &App) -> Result<Applied, GatewayError> {
        let path = self.path.as_ref().ok_or_else(|| {
            GatewayError::Config(
                "this gateway was not started from a file: there is nothing to reload".to_owned(),
            )
        })?;
        let told = |what: String| GatewayError::Config(format!("{}: {what}", path.display()));
        let text = tokio::fs::read_to_string(path)
            .await
            .map_err(|error| told(error.to_string()))?;
        let config = Config::read(&text).map_err(|error| told(error.to_string()))?;
        self.change(app, |_| Ok::<_, GatewayError>(config)).await
    }

    /// Puts what `edit` makes of the configuration in its place.
    ///
    /// # Errors
    /// `edit`'s, or what is wrong with the new one; then nothing has changed.
    pub async fn change<E: From<GatewayError>>(
        &self,
        app: &App,
        edit: impl FnOnce(&Config) -> Result<Config, E>,
    ) -> Result<Applied, E> {
        let mut retiring = self.turn.lock().await;
        while retiring.try_join_next().is_some() {}
        let old = app.live();
        let mut config = edit(&old.config)?;
        config.validate()?;
        let at_next_start = config.keep_fixed(&old.config);
        let acceptor = tls::acceptor(&config)?;
        let metrics = Arc::clone(&app.metrics);
        let before = Arc::clone(&old);
        // Tokenizers take a while to load, and templates to compile.
        let building = tokio::task::spawn_blocking(move || {
            let fleet = Fleet::start(&config, &metrics, Some(&before))?;
            Ok::<_, GatewayError>(Live {
                config,
                fleet,
                acceptor,
            })
        });
        let new = building
            .await
            .map_err(|error| GatewayError::Runtime(std::io::Error::other(error)))??;
        // Replicas of a model that has changed are connected to anew: nobody waits for that.
        let connected = async {
            while !new.fleet.is_as_ready_as(&old.fleet) {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let _ = tokio::time::timeout(CONNECT_WITHIN, connected).await;
        let applied = Applied {
            added: names(&new.fleet, &old.fleet),
            removed: names(&old.fleet, &new.fleet),
            at_next_start,
        };
        let wait = Duration::from_secs_f64(new.config.drain_timeout_s);
        let level = new.config.log_level;
        let kept: Vec<Arc<Model>> = new.fleet.models.clone();
        for served in &new.fleet.served {
            let Config {
                max_queued,
                batch_share,
                ..
            } = new.config;
            served.admission.set(max_queued, batch_share);
        }
        for upstream in new.fleet.foreign.iter().flat_map(|model| &model.upstreams) {
            upstream.health.set(new.config.faults.breaker());
        }
        app.swap(new);
        app.log.set(level);
        for model in &old.fleet.models {
            if !kept.iter().any(|other| Arc::ptr_eq(other, model)) {
                retiring.spawn(retire(Arc::clone(model), wait));
            }
        }
        tracing::info!(
            added = ?applied.added,
            removed = ?applied.removed,
            at_next_start = ?applied.at_next_start,
            "the configuration has changed"
        );
        Ok(applied)
    }

    /// Ends what waits for requests on replicas that go.
    pub async fn shutdown(&self) {
        self.turn.lock().await.shutdown().await;
    }
}

/// What is in `of` and not in `without`.
fn names(of: &Fleet, without: &Fleet) -> Vec<String> {
    let without: Vec<String> = without.engines().collect();
    of.engines()
        .filter(|name| !without.contains(name))
        .collect()
}

/// Lets a model's replicas go when no request has the model any more, at the latest after `limit`. One that still
/// waits for a place or for a replica to go on at has nothing in flight, and needs them none the less.
async fn retire(model: Arc<Model>, limit: Duration) {
    let ended = async {
        while Arc::strong_count(&model) > 1 {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let _ = tokio::time::timeout(limit, ended).await;
    join_all(model.replicas.iter().map(|replica| replica.shutdown())).await;
}
