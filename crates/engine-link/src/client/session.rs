//! The task behind one session: connects, says hello, distributes frames, reattaches, starts again.
//!
//! ```text
//!  connect + Hello --Welcome--> serve --reset/EOF--> reattach --Welcome(reattached)--> serve
//!       ^                         |                      |
//!       |  backoff                | silence, bad frame   | refused, forgotten, or 2 s gone
//!       +---- requests end with Lost --------------------+
//! ```

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::Streaming;

use super::connect::{Backoff, ConnectError, full_message, open};
use super::kv_view::KvView;
use super::replica::Replica;
use super::shared::{Shared, SlotState};
use super::socket::Link;
use super::stream::LostCause;
use super::table::Table;
use crate::proto::engine_client::EngineClient;
use crate::proto::{self, FromEngine};

pub(super) struct SessionTask {
    slot: usize,
    shared: Arc<Shared>,
    table: Arc<Table>,
    session_id: String,
    epoch: u64,
    last_sequence: u64,
}

/// Why a stream ended.
enum End {
    /// Reset or end of file: the engine may still hold the session.
    Broken(String),
    /// The engine does not speak or does not make sense: nothing to come back to.
    Lost(String),
    Stopped,
}

/// One stream, and the connection that carries nothing else.
struct Inbound {
    frames: Streaming<FromEngine>,
    _link: Link,
}

/// Between attempts to reattach, so that a listener which is just closing is not hammered.
const REATTACH_PAUSE: Duration = Duration::from_millis(10);

/// The replica's end counts as well.
async fn stop_asked(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stop| *stop).await;
}

impl SessionTask {
    pub(super) fn new(slot: usize, shared: Arc<Shared>) -> Self {
        let table = shared.tables[slot].clone();
        Self {
            slot,
            shared,
            table,
            session_id: String::new(),
            epoch: 0,
            last_sequence: 0,
        }
    }

    pub(super) async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        let mut backoff = Backoff::new(&self.shared.config, &self.shared.address);
        loop {
            let opened = tokio::select! {
                biased;
                () = stop_asked(&mut stopped) => return,
                opened = self.open_new() => opened,
            };
            match opened {
                Ok(inbound) => {
                    backoff.reset();
                    if self.serve_until_lost(inbound, &mut stopped).await.is_none() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::debug!(engine = %self.shared.address, slot = self.slot, reason = error.reason(), "no session");
                }
            }
            self.shared.set_slot(self.slot, SlotState::Down);
            tokio::select! {
                biased;
                () = stop_asked(&mut stopped) => return,
                () = tokio::time::sleep(backoff.wait()) => {}
            }
        }
    }

    /// Serves a session over all its streams. `None` if the replica stops.
    async fn serve_until_lost(
        &mut self,
        mut inbound: Inbound,
        stopped: &mut watch::Receiver<bool>,
    ) -> Option<()> {
        loop {
            self.shared.set_slot(self.slot, SlotState::Attached);
            let end = self.serve(&mut inbound, stopped).await;
            drop(inbound);
            let (cause, reason) = match end {
                End::Stopped => return None,
                End::Lost(reason) => (LostCause::Silent, reason),
                End::Broken(reason) => {
                    self.table.detach();
                    self.shared.set_slot(self.slot, SlotState::Reattaching);
                    let reattached = tokio::select! {
                        biased;
                        () = stop_asked(stopped) => return None,
                        reattached = self.reattach() => reattached,
                    };
                    match reattached {
                        Ok(next) => {
                            tracing::info!(engine = %self.shared.address, slot = self.slot, reason, "reattached");
                            inbound = next;
                            continue;
                        }
                        Err(error) => {
                            let reason = format!(
                                "the session broke ({reason}) and did not come back: {}",
                                error.reason()
                            );
                            (LostCause::Gone, reason)
                        }
                    }
                }
            };
            tracing::warn!(engine = %self.shared.address, slot = self.slot, reason, "session lost");
            self.table.lose_all(cause, &reason);
            return Some(());
        }
    }

    async fn open_new(&mut self) -> Result<Inbound, ConnectError> {
        self.session_id = format!("{:032x}", rand::random::<u128>());
        self.last_sequence = 0;
        self.open(None).await
    }

    async fn reattach(&mut self) -> Result<Inbound, ConnectError> {
        let deadline = Instant::now() + self.shared.config.reattach_within;
        loop {
            let attempt =
                tokio::time::timeout_at(deadline, self.open(Some(self.last_sequence))).await;
            match attempt {
                Ok(Err(ConnectError::Failed(reason))) => {
                    if Instant::now() + REATTACH_PAUSE >= deadline {
                        return Err(ConnectError::Failed(reason));
                    }
                    tokio::time::sleep(REATTACH_PAUSE).await;
                }
                Ok(done) => return done,
                Err(_) => {
                    let within = self.shared.config.reattach_within;
                    return Err(ConnectError::Failed(format!("no answer within {within:?}")));
                }
            }
        }
    }

    /// Opens a stream up to its Welcome. With `last_sequence` the engine must still know the session.
    async fn open(&mut self, last_sequence: Option<u64>) -> Result<Inbound, ConnectError> {
        let config = &self.shared.config;
        let (channel, link) = open(&self.shared.address, config).await?;
        let mut client =
            EngineClient::new(channel).max_decoding_message_size(config.max_frame_bytes);
        let hello = proto::Hello {
            session_id: self.session_id.clone(),
            last_sequence,
            kv_events: self.followed().is_some(),
        };
        let outgoing = self.table.attach(hello);
        let greeting = async {
            let info = client
                .describe(proto::DescribeRequest {})
                .await?
                .into_inner();
            let mut frames = client.session(outgoing).await?.into_inner();
            let first = frames.message().await?;
            Ok::<_, tonic::Status>((info, frames, first))
        };
        let (info, frames, first) =
            match tokio::time::timeout(config.connect_timeout, greeting).await {
                Ok(Ok(answers)) => answers,
                Ok(Err(status)) => return Err(ConnectError::Failed(full_message(&status))),
                Err(_) => {
                    return Err(ConnectError::Failed(format!(
                        "no Welcome within {:?}",
                        config.connect_timeout
                    )));
                }
            };
        let Some(first) = first else {
            return Err(ConnectError::Failed(
                "the engine closed the stream before its Welcome".to_owned(),
            ));
        };
        let Some(welcome) = first.welcome else {
            return Err(ConnectError::Failed(
                "the engine's first frame is not a Welcome".to_owned(),
            ));
        };
        if last_sequence.is_some() && (!welcome.reattached || welcome.epoch != self.epoch) {
            return Err(ConnectError::Dead(
                "the engine has restarted or forgotten the session".to_owned(),
            ));
        }
        if info.epoch != welcome.epoch {
            return Err(ConnectError::Failed(
                "the engine restarted while connecting".to_owned(),
            ));
        }
        self.epoch = welcome.epoch;
        self.shared.set_info(info);
        if let Some(load) = first.load {
            self.shared.on_load(load);
        }
        self.table.welcomed();
        if last_sequence.is_none()
            && let Some(kv) = self.followed()
        {
            kv.lock().reset();
            self.table.request_kv_snapshot();
        }
        Ok(Inbound {
            frames,
            _link: link,
        })
    }

    /// The mirror of the engine's prefix cache that is fed from here: only the first slot has one.
    fn followed(&self) -> Option<&Mutex<KvView>> {
        self.shared.kv.as_ref().filter(|_| self.slot == 0)
    }

    /// Distributes frames. Never waits for a request.
    async fn serve(&mut self, inbound: &mut Inbound, stopped: &mut watch::Receiver<bool>) -> End {
        let config = &self.shared.config;
        let (peer_silence, ack_frames) = (config.peer_silence, config.ack_frames.max(1));
        let period = config
            .ack_interval
            .min(peer_silence / 8)
            .max(Duration::from_millis(1));
        let mut ticker = tokio::time::interval(period);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_frame = Instant::now();
        let mut silent_ticks = 0;
        let mut acked = self.last_sequence;
        loop {
            tokio::select! {
                biased;
                () = stop_asked(stopped) => {
                    self.say_goodbye(inbound).await;
                    return End::Stopped;
                }
                frame = inbound.frames.message() => match frame {
                    Ok(Some(frame)) => {
                        last_frame = Instant::now();
                        silent_ticks = 0;
                        if let Err(reason) = self.take_frame(frame) {
                            return End::Lost(reason);
                        }
                        if self.last_sequence >= acked + ack_frames {
                            acked = self.last_sequence;
                            self.table.ack(acked);
                        }
                    }
                    Ok(None) => return End::Broken("the engine ended the stream".to_owned()),
                    Err(status) => return End::Broken(full_message(&status)),
                },
                _ = ticker.tick() => {
                    if self.last_sequence > acked {
                        acked = self.last_sequence;
                        self.table.ack(acked);
                    }
                    // Two ticks, so that a gateway which was itself held up reads what waits for it first.
                    if last_frame.elapsed() > peer_silence {
                        silent_ticks += 1;
                        if silent_ticks > 1 {
                            return End::Lost(format!("no sign of life for {peer_silence:?}"));
                        }
                    }
                }
            }
        }
    }

    pub(super) fn take_frame(&mut self, frame: FromEngine) -> Result<(), String> {
        if let Some(load) = frame.load {
            if load.epoch != self.epoch {
                return Err(format!(
                    "the engine's epoch changed from {} to {}",
                    self.epoch, load.epoch
                ));
            }
            self.shared.on_load(load);
        }
        if frame.sequence == 0 {
            return Ok(());
        }
        if frame.sequence <= self.last_sequence {
            return Ok(());
        }
        if frame.sequence != self.last_sequence + 1 {
            return Err(format!(
                "frame {} came after {}",
                frame.sequence, self.last_sequence
            ));
        }
        self.last_sequence = frame.sequence;
        self.table.deliver(frame.outputs, frame.refusals);
        if let Some(events) = frame.kv_events
            && let Some(kv) = self.followed()
            && !kv.lock().apply(&events)
        {
            self.table.request_kv_snapshot();
        }
        Ok(())
    }

    /// Cancels what is left and waits a moment for the engine to close its side.
    async fn say_goodbye(&self, inbound: &mut Inbound) {
        self.table.close("the gateway has shut down");
        let ended = async { while let Ok(Some(_)) = inbound.frames.message().await {} };
        if tokio::time::timeout(Replica::GOODBYE, ended).await.is_err() {
            tracing::debug!(engine = %self.shared.address, slot = self.slot, "the engine did not answer the goodbye");
        }
    }
}
