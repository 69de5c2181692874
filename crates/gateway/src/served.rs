//! What every served model has, whoever computes it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::admission::Admission;
use crate::config::{Config, ModelConfig};
use crate::metrics::{Metrics, ModelMetrics};
use crate::safety::Safety;

pub struct Served {
    pub name: Arc<str>,
    pub aliases: Vec<String>,
    pub created_unix_s: u64,
    pub metrics: Arc<ModelMetrics>,
    pub admission: Arc<Admission>,
    /// Checks of its requests and answers; `None` where there are none.
    pub safety: Option<Arc<Safety>>,
}

impl Served {
    #[must_use]
    pub fn new(
        model: &ModelConfig,
        safety: Option<Arc<Safety>>,
        config: &Config,
        metrics: &Metrics,
    ) -> Arc<Served> {
        let created_unix_s = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        Arc::new(Served {
            name: Arc::from(model.name.as_str()),
            aliases: model.aliases.clone(),
            created_unix_s,
            metrics: metrics.model(&model.name),
            admission: Admission::new(config.max_queued, config.batch_share),
            safety,
        })
    }

    /// As `new`, but what requests already share goes on: counts and places.
    #[must_use]
    pub fn next(
        old: &Arc<Served>,
        model: &ModelConfig,
        safety: Option<Arc<Safety>>,
    ) -> Arc<Served> {
        let same_safety = old.safety.as_ref().map(Arc::as_ptr) == safety.as_ref().map(Arc::as_ptr);
        if same_safety && old.aliases == model.aliases {
            return Arc::clone(old);
        }
        Arc::new(Served {
            name: Arc::clone(&old.name),
            aliases: model.aliases.clone(),
            created_unix_s: old.created_unix_s,
            metrics: Arc::clone(&old.metrics),
            admission: Arc::clone(&old.admission),
            safety,
        })
    }

    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        &*self.name == name || self.aliases.iter().any(|alias| alias == name)
    }

    pub fn count_tokens(&self, prompt: u64, cached: u64, output: u64) {
        self.metrics.prompt_tokens.fetch_add(prompt, Relaxed);
        self.metrics.cached_tokens.fetch_add(cached, Relaxed);
        self.metrics.output_tokens.fetch_add(output, Relaxed);
    }
}
