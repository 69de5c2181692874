//! Drain, stop, calibrate, close.

use tokio::sync::oneshot;

use super::Core;
use crate::listener::EngineInfo;
use crate::proto;

impl Core {
    pub(in crate::listener) fn drain(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.draining, true) {
            state.todo.drain = true;
        }
        for session in state.sessions.values_mut() {
            session.load_due = true;
            session.wake();
        }
        self.work.notify_one();
    }

    pub(in crate::listener) fn is_draining(&self) -> bool {
        self.state.lock().draining
    }

    pub(in crate::listener) fn stop(&self) {
        self.drain();
        self.state.lock().todo.stop = true;
        self.work.notify_one();
    }

    /// Hands the shapes to the loop. `Err` says why not.
    pub(in crate::listener) fn calibrate(
        &self,
        shapes: Vec<proto::CalibrationShape>,
    ) -> Result<oneshot::Receiver<Vec<f32>>, String> {
        check_shapes(&shapes, &self.info)?;
        let mut state = self.state.lock();
        if !state.requests.is_empty() || state.assembling > 0 {
            return Err(format!(
                "the engine has {} requests; it must be idle",
                state.requests.len()
            ));
        }
        // One whose caller has left makes room for the next.
        if state
            .calibration
            .as_ref()
            .is_some_and(|(_, answer)| !answer.is_closed())
        {
            return Err("another calibration is running".to_owned());
        }
        let (answer, answered) = oneshot::channel();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.calibration = Some((ticket, answer));
        state.todo.calibrate = Some((ticket, shapes));
        self.work.notify_one();
        Ok(answered)
    }

    /// Streams end once they have sent everything; polls return at once.
    pub(in crate::listener) fn close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        state.calibration = None;
        for session in state.sessions.values_mut() {
            session.wake();
        }
        self.work.notify_all();
    }
}

const MAX_CALIBRATION_SHAPES: usize = 64;

fn check_shapes(shapes: &[proto::CalibrationShape], info: &EngineInfo) -> Result<(), String> {
    if shapes.is_empty() || shapes.len() > MAX_CALIBRATION_SHAPES {
        return Err(format!(
            "{} shapes; allowed are 1 to {MAX_CALIBRATION_SHAPES}",
            shapes.len()
        ));
    }
    for (at, shape) in shapes.iter().enumerate() {
        let limits = [
            ("decode_seqs", shape.decode_seqs, info.max_num_seqs),
            ("context_tokens", shape.context_tokens, info.max_model_len),
            ("prefill_tokens", shape.prefill_tokens, info.max_model_len),
        ];
        for (field, got, limit) in limits {
            if got > limit {
                return Err(format!(
                    "shapes[{at}].{field} is {got}; allowed is 0 to {limit}"
                ));
            }
        }
    }
    Ok(())
}
