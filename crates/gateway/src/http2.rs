//! The streams of HTTP/2 connections: each is a task, and ends when its client takes nothing of it for too long.
//!
//! A client may read its socket and still give one stream no window (RFC 9113, section 5.2). Then nothing is written that
//! could be waited for: the response's body is just not asked for more.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::metrics::Metrics;

tokio::task_local! {
    static TAKING: Arc<Taking>;
}

/// Whether a stream's client takes what its response gives.
#[derive(Debug, Default)]
pub struct Taking {
    /// When the response gave what the client has not made room for.
    since: Mutex<Option<Instant>>,
}

impl Taking {
    /// Of the stream whose task this is.
    #[must_use]
    pub fn here() -> Option<Arc<Taking>> {
        TAKING.try_with(Arc::clone).ok()
    }

    pub fn gave(&self) {
        *self.since.lock() = Some(Instant::now());
    }

    pub fn asked(&self) {
        *self.since.lock() = None;
    }

    /// Ends when the client has taken nothing for `limit`.
    async fn stalls(&self, limit: Duration) {
        loop {
            let now = Instant::now();
            let until = self.since.lock().unwrap_or(now) + limit;
            if until <= now {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

/// Spawns a connection's streams.
#[derive(Clone)]
pub struct Streams {
    pub metrics: Arc<Metrics>,
    pub write_timeout: Duration,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let Streams {
            metrics,
            write_timeout,
        } = self.clone();
        let taking = Arc::<Taking>::default();
        tokio::spawn(async move {
            tokio::select! {
                () = TAKING.scope(Arc::clone(&taking), stream) => {}
                // Without its task the stream is reset.
                () = taking.stalls(write_timeout) => {
                    metrics.clients_stalled.fetch_add(1, Relaxed);
                }
            }
        });
    }
}
