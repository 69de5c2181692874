//! What all requests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};

use parking_lot::RwLock;
use scalellm_accounts::Accounts;
use tokio::sync::{Notify, watch};
use tokio_rustls::TlsAcceptor;

use crate::body::BodyMemory;
use crate::config::Config;
use crate::error::GatewayError;
use crate::fleet::Fleet;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::recent::RecentRequests;
use crate::reload::Changes;
use crate::stages::Clock;
use crate::text_pool::TextPool;
use crate::tls;
use crate::traces::Traces;

/// The gateway's own life: only forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// New requests get 503; running ones go on.
    Draining,
    /// Running requests end now, with an error.
    Stopping,
}

/// What a reload swaps, at once.
pub struct Live {
    pub config: Config,
    pub fleet: Fleet,
    /// `None` while clients speak without TLS.
    pub acceptor: Option<TlsAcceptor>,
}

pub struct App {
    live: RwLock<Arc<Live>>,
    pub changes: Changes,
    pub log: Log,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    pub text_pool: TextPool,
    /// Keys, quotas and usage, where there is a database.
    pub accounts: Option<Arc<Accounts>>,
    pub body_memory: BodyMemory,
    pub recent: RecentRequests,
    /// Where there is a collector.
    pub traces: Option<Traces>,
    phase: watch::Sender<Phase>,
    /// HTTP requests whose response has not ended.
    in_flight: AtomicUsize,
    /// Since somebody asked last.
    most_in_flight: AtomicUsize,
    /// Of [`Self::in_flight`], that it became zero.
    became_idle: Notify,
}

impl App {
    /// Loads what requests need; connects in the background, so a runtime must be there.
    ///
    /// # Errors
    /// As [`Fleet::start`] and [`tls::acceptor`]; `Runtime` if a thread cannot be started.
    pub fn start(config: Config, changes: Changes, log: Log) -> Result<Arc<App>, GatewayError> {
        let metrics = Arc::new(Metrics::new());
        let acceptor = tls::acceptor(&config)?;
        let fleet = Fleet::start(&config, &metrics, None)?;
        let accounts = config
            .accounts()
            .map(Accounts::start)
            .transpose()
            .map_err(|error| GatewayError::Config(error.to_string()))?
            .map(Arc::new);
        let traces = config
            .otlp_endpoint
            .as_deref()
            .map(|endpoint| Traces::start(endpoint, config.otlp_sample_ratio))
            .transpose()?;
        Ok(Arc::new(App {
            traces,
            clock: Clock::start(),
            text_pool: TextPool::start(config.text_threads(), config.text_queue)?,
            accounts,
            body_memory: BodyMemory::new(config.max_body_memory_bytes),
            recent: RecentRequests::new(),
            phase: watch::Sender::new(Phase::Serving),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
            became_idle: Notify::new(),
            metrics,
            changes,
            log,
            live: RwLock::new(Arc::new(Live {
                config,
                fleet,
                acceptor,
            })),
        }))
    }

    /// The configuration and what it names. A request that takes it keeps it, whatever is swapped in meanwhile.
    #[must_use]
    pub fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live.read())
    }

    pub fn swap(&self, new: Live) {
        *self.live.write() = Arc::new(new);
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
        let before = self.in_flight.fetch_add(1, SeqCst);
        self.most_in_flight.fetch_max(before + 1, Relaxed);
    }

    pub fn request_ended(&self) {
        if self.in_flight.fetch_sub(1, SeqCst) == 1 {
            self.became_idle.notify_waiters();
        }
    }

    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(SeqCst)
    }

    /// The most requests that were in flight at once since this was asked last.
    pub fn take_most_in_flight(&self) -> usize {
        self.most_in_flight.swap(self.in_flight(), Relaxed)
    }

    pub async fn idle(&self) {
        loop {
            // Hears from here on, so that what ends between the look and the wait is not missed.
            let became_idle = self.became_idle.notified();
            if self.in_flight() == 0 {
                return;
            }
            became_idle.await;
        }
    }

    /// Seconds after which a client may find another server in this one's place.
    #[must_use]
    pub fn drain_retry_after_s(&self) -> u32 {
        self.live().config.drain_timeout_s.clamp(1.0, 60.0).ceil() as u32
    }
}
