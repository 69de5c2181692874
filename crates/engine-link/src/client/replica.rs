//! One engine as the gateway sees it: the owner of its sessions.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::config::ReplicaConfig;
use super::connect::{full_message, open};
use super::kv_view::KvSink;
use super::session::SessionTask;
use super::shared::Shared;
use super::stream::{LostCause, RequestStream};
use super::table::SubmitError;
use crate::address::Address;
use crate::proto;
use crate::proto::engine_client::EngineClient;

/// ```text
///              Welcome                        step age > hung_after
/// Connecting ----------> Ready <------------------------------------> Hung
///                        |   ^ load.draining                           |
///                        |   +-----------------> Draining              |
///                        v no session left                             v
///                      Lost <------------------------------------------+   (and back, by reconnecting)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicaState {
    /// No engine has been reached yet, or every session is reattaching.
    Connecting,
    Ready,
    /// The listener answers, the loop behind it does not come round.
    Hung,
    /// Finishes what it has and takes nothing new.
    Draining,
    /// The engine that was there does not answer; reconnecting goes on.
    Lost,
}

/// One engine's pool of sessions. Dropping it ends the sessions and their requests.
pub struct Replica {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

/// How long `shutdown` waits for the engine to take the goodbye.
const GOODBYE: Duration = Duration::from_millis(500);

impl Replica {
    /// Returns at once and connects in the background, for ever. Must be called inside a tokio runtime.
    pub fn start(address: Address, config: ReplicaConfig) -> Arc<Replica> {
        Replica::connect(address, config, None)
    }

    /// The same, and tells `sink` what the engine's prefix cache holds.
    pub fn start_following(
        address: Address,
        config: ReplicaConfig,
        sink: Arc<dyn KvSink>,
    ) -> Arc<Replica> {
        Replica::connect(address, config, Some(sink))
    }

    fn connect(
        address: Address,
        config: ReplicaConfig,
        sink: Option<Arc<dyn KvSink>>,
    ) -> Arc<Replica> {
        let (stop, stopped) = watch::channel(false);
        let shared = Shared::new(address, config, sink);
        let tasks = (0..shared.tables.len())
            .map(|slot| tokio::spawn(SessionTask::new(slot, shared.clone()).run(stopped.clone())))
            .collect();
        Arc::new(Replica {
            shared,
            stop,
            tasks: Mutex::new(tasks),
        })
    }

    pub fn address(&self) -> &Address {
        &self.shared.address
    }

    pub fn state(&self) -> ReplicaState {
        self.shared.state()
    }

    /// The engine's answer to Describe at the last connection.
    pub fn info(&self) -> Option<Arc<proto::DescribeResponse>> {
        self.shared.info()
    }

    /// The last load that a frame carried; zeros before the first.
    pub fn load(&self) -> Arc<proto::Load> {
        self.shared.load()
    }

    /// Requests submitted here that have not ended and were not dropped.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.requests.load(Ordering::Relaxed)
    }

    /// Prompt and resumed tokens submitted here whose first output has not come.
    pub fn in_flight_tokens(&self) -> usize {
        self.shared.in_flight.prompt_tokens.load(Ordering::Relaxed)
    }

    /// Sends a request on the session with the fewest in flight. Gives `request.id` and `prompt_tokens`; the
    /// caller's `request.attempt` stays. Never waits.
    pub fn submit(&self, submit: proto::Submit) -> Result<RequestStream, SubmitError> {
        if self.state() != ReplicaState::Ready {
            return Err(SubmitError::NotReady);
        }
        let table = self
            .shared
            .tables
            .iter()
            .filter(|table| table.is_attached())
            .min_by_key(|table| table.len())
            .ok_or(SubmitError::NotReady)?;
        let stream = table.submit(submit)?;
        // A replica found to hang ends the requests that are in its tables, once: this one may have come after that.
        if self.state() == ReplicaState::Hung {
            return Err(SubmitError::NotReady);
        }
        Ok(stream)
    }

    /// Where the time of the engine's last steps went, of those that began after a Unix time. On a connection of its
    /// own: it never waits behind, or holds up, a request.
    ///
    /// # Errors
    /// Why the engine could not be asked, in words.
    pub async fn steps(&self, after_us: u64) -> Result<Vec<proto::StepTimes>, String> {
        let config = &self.shared.config;
        let (channel, _link) = open(&self.shared.address, config)
            .await
            .map_err(|error| error.reason().to_owned())?;
        let mut client =
            EngineClient::new(channel).max_decoding_message_size(config.max_frame_bytes);
        let asked = client.steps(proto::StepsRequest { after_us });
        match tokio::time::timeout(config.connect_timeout, asked).await {
            Ok(Ok(answer)) => Ok(answer.into_inner().steps),
            Ok(Err(status)) => Err(full_message(&status)),
            Err(_) => Err(format!("no answer within {:?}", config.connect_timeout)),
        }
    }

    /// Ticks whenever [`Replica::state`] or [`Replica::info`] may have changed.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Ends every request with `Lost`, says goodbye to the engine and joins the sessions' tasks.
    pub async fn shutdown(&self) {
        self.stop.send_replace(true);
        let tasks = std::mem::take(&mut *self.tasks.lock());
        let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        let joined = futures_util::future::join_all(tasks);
        if tokio::time::timeout(GOODBYE + Duration::from_millis(500), joined)
            .await
            .is_err()
        {
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
        self.shared
            .lose_all(LostCause::Closed, "the gateway has shut down");
    }

    pub(super) const GOODBYE: Duration = GOODBYE;
}

impl Drop for Replica {
    fn drop(&mut self) {
        for task in self.tasks.lock().drain(..) {
            task.abort();
        }
        self.shared
            .lose_all(LostCause::Closed, "the replica was removed");
    }
}
