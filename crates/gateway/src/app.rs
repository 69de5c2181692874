//! What all requests share.

use std::sync::Arc;

use scalellm_accounts::Accounts;
use tokio::sync::watch;

use crate::body::BodyMemory;
use crate::config::Config;
use crate::error::GatewayError;
use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::recent::RecentRequests;
use crate::stages::Clock;
use crate::text_pool::TextPool;

/// The gateway's own life: only forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// New requests get 503; running ones go on.
    Draining,
    /// Running requests end now, with an error.
    Stopping,
}

pub struct App {
    pub config: Config,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    pub fleet: Fleet,
    pub text_pool: TextPool,
    /// Keys, quotas and usage, where there is a database.
    pub accounts: Option<Arc<Accounts>>,
    pub body_memory: BodyMemory,
    pub recent: RecentRequests,
    phase: watch::Sender<Phase>,
    /// HTTP requests whose response has not ended.
    in_flight: watch::Sender<usize>,
}

impl App {
    /// Loads what requests need; connects in the background, so a runtime must be there.
    ///
    /// # Errors
    /// As [`Fleet::start`]; `Runtime` if a thread cannot be started.
    pub fn start(config: Config) -> Result<Arc<App>, GatewayError> {
        let metrics = Arc::new(Metrics::new(
            config.models.iter().map(|model| model.name.as_str()),
        ));
        let fleet = Fleet::start(&config, &metrics)?;
        let accounts = config
            .accounts()
            .map(Accounts::start)
            .transpose()
            .map_err(|error| GatewayError::Config(error.to_string()))?
            .map(Arc::new);
        Ok(Arc::new(App {
            clock: Clock::start(),
            text_pool: TextPool::start(config.text_threads(), config.text_queue)?,
            accounts,
            body_memory: BodyMemory::new(config.max_body_memory_bytes),
            recent: RecentRequests::new(),
            phase: watch::Sender::new(Phase::Serving),
            in_flight: watch::Sender::new(0),
            metrics,
            fleet,
            config,
        }))
    }

    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves on to `phase`; going back is ignored.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            if later {
                *now = phase;
            }
            later
        });
    }

    #[must_use]
    pub fn watch_phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    pub async fn wait_for(&self, phase: Phase) {
        // The sender lives in self: the channel cannot close while this waits.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }

    pub fn request_started(&self) {
        self.in_flight.send_modify(|count| *count += 1);
    }

    pub fn request_ended(&self) {
        self.in_flight.send_modify(|count| *count -= 1);
    }

    #[must_use]
    pub fn in_flight(&self) -> usize {
        *self.in_flight.borrow()
    }

    pub async fn idle(&self) {
        let _ = self
            .in_flight
            .subscribe()
            .wait_for(|count| *count == 0)
            .await;
    }

    /// Seconds after which a client may find another server in this one's place.
    #[must_use]
    pub fn drain_retry_after_s(&self) -> u32 {
        self.config.drain_timeout_s.clamp(1.0, 60.0).ceil() as u32
    }
}
