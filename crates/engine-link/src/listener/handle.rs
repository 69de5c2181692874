use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::{Command, StepOutput};
use crate::proto;

/// The loop's end of the listener. Cheap to clone; no call but `poll` ever waits.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) core: Arc<Core>,
}

impl EngineHandle {
    /// Waits for commands and returns all there are; none after `timeout`, or once the listener closes.
    pub fn poll(&self, timeout: Duration) -> Vec<Command> {
        self.core.poll(timeout)
    }

    /// Hands over what one step did. `load.step_age_ms`, `epoch` and `draining` are the listener's to fill. Call it
    /// (or `poll`) at least every 200 ms: that is the loop's sign of life.
    pub fn emit(&self, outputs: Vec<StepOutput>, load: proto::Load) {
        self.core.emit(outputs, load);
    }

    /// Where a step's time went, kept for whoever asks for the last steps.
    pub fn note_step(&self, step: proto::StepTimes) {
        self.core.note_step(step);
    }

    /// Changes of the prefix cache; with `snapshot`, all that it holds.
    pub fn emit_kv(&self, stored: Vec<proto::KvStored>, removed: Vec<Vec<u8>>, snapshot: bool) {
        self.core.emit_kv(stored, removed, snapshot);
    }

    pub fn answer_calibrate(&self, ticket: u64, step_ms: Vec<f32>) {
        self.core.answer_calibrate(ticket, step_ms);
    }

    /// Refuses new requests from now on; the next `poll` says so.
    pub fn drain(&self) {
        self.core.drain();
    }
}
