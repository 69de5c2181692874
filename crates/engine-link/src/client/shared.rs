//! What the sessions of one replica have in common.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::config::ReplicaConfig;
use super::kv_view::{KvSink, KvView};
use super::replica::ReplicaState;
use super::stream::LostCause;
use super::table::{InFlight, Table};
use crate::address::Address;
use crate::proto;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SlotState {
    Connecting,
    Attached,
    Reattaching,
    Down,
}

pub(super) struct Shared {
    pub(super) address: Address,
    pub(super) config: ReplicaConfig,
    pub(super) in_flight: Arc<InFlight>,
    /// One for each session, for the replica's whole life.
    pub(super) tables: Vec<Arc<Table>>,
    /// Of the engine whose prefix cache is to be followed.
    pub(super) kv: Option<Mutex<KvView>>,
    pub(super) changed: watch::Sender<u64>,
    seen: Mutex<Seen>,
}

struct Seen {
    slots: Vec<SlotState>,
    info: Option<Arc<proto::DescribeResponse>>,
    load: Arc<proto::Load>,
    hung: bool,
    /// Nobody will connect any more.
    ended: bool,
}

impl Shared {
    pub(super) fn new(
        address: Address,
        config: ReplicaConfig,
        sink: Option<Arc<dyn KvSink>>,
    ) -> Arc<Self> {
        let sessions = config.sessions.max(1);
        let in_flight = Arc::new(InFlight::default());
        let table = || Table::new(in_flight.clone(), config.max_in_flight, config.chunk_ids);
        Arc::new(Self {
            address,
            tables: (0..sessions).map(|_| table()).collect(),
            in_flight,
            kv: sink.map(|sink| Mutex::new(KvView::new(sink))),
            changed: watch::channel(0).0,
            seen: Mutex::new(Seen {
                slots: vec![SlotState::Connecting; sessions],
                info: None,
                load: Arc::default(),
                hung: false,
                ended: false,
            }),
            config,
        })
    }

    pub(super) fn state(&self) -> ReplicaState {
        let seen = self.seen.lock();
        if seen.slots.contains(&SlotState::Attached) {
            if seen.hung {
                ReplicaState::Hung
            } else if seen.load.draining {
                ReplicaState::Draining
            } else {
                ReplicaState::Ready
            }
        } else if seen.ended {
            ReplicaState::Lost
        } else if seen.info.is_none()
            || seen
                .slots
                .iter()
                .any(|s| matches!(s, SlotState::Connecting | SlotState::Reattaching))
        {
            ReplicaState::Connecting
        } else {
            ReplicaState::Lost
        }
    }

    pub(super) fn info(&self) -> Option<Arc<proto::DescribeResponse>> {
        self.seen.lock().info.clone()
    }

    pub(super) fn load(&self) -> Arc<proto::Load> {
        Arc::clone(&self.seen.lock().load)
    }

    fn tick(&self) {
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(super) fn set_slot(&self, slot: usize, state: SlotState) {
        {
            let mut seen = self.seen.lock();
            if seen.slots[slot] == state {
                return;
            }
            seen.slots[slot] = state;
            // A new connection is judged by its own frames.
            if !seen.slots.contains(&SlotState::Attached) {
                seen.hung = false;
            }
        }
        self.tick();
    }

    pub(super) fn set_info(&self, info: proto::DescribeResponse) {
        {
            let mut seen = self.seen.lock();
            if seen.info.as_deref() == Some(&info) {
                return;
            }
            seen.load = Arc::new(proto::Load {
                epoch: info.epoch,
                ..proto::Load::default()
            });
            seen.info = Some(Arc::new(info));
        }
        self.tick();
    }

    /// Judges the engine's loop by the age of its last step; a hung one's requests end here, at once.
    pub(super) fn on_load(&self, load: proto::Load) {
        let step_age_ms = load.step_age_ms;
        let hung = u128::from(step_age_ms) > self.config.hung_after.as_millis();
        let (was_hung, changed) = {
            let mut seen = self.seen.lock();
            // Sessions overtake each other: what another one has brought already may be newer.
            if seen.load.epoch == load.epoch && load.steps < seen.load.steps {
                return;
            }
            let changed = seen.hung != hung || seen.load.draining != load.draining;
            let was_hung = std::mem::replace(&mut seen.hung, hung);
            seen.load = Arc::new(load);
            (was_hung, changed)
        };
        if hung && !was_hung {
            tracing::warn!(engine = %self.address, step_age_ms, "the engine's loop hangs");
            let reason = format!("the engine's loop has not come round for {step_age_ms} ms");
            for table in &self.tables {
                table.abandon_all(LostCause::Hung, &reason);
            }
        }
        if changed {
            self.tick();
        }
    }

    pub(super) fn lose_all(&self, cause: LostCause, reason: &str) {
        for table in &self.tables {
            table.lose_all(cause, reason);
        }
        {
            let mut seen = self.seen.lock();
            seen.slots.fill(SlotState::Down);
            seen.ended = true;
        }
        self.tick();
    }
}
