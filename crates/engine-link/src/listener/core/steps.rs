//! The loop's calls: what there is to do, and what a step did.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Core, unix_us};
use crate::listener::{Command, StepOutput};
use crate::proto::{self, FinishReason, FromEngine, RequestRef};

impl Core {
    pub(in crate::listener) fn poll(&self, timeout: Duration) -> Vec<Command> {
        let deadline = Instant::now().checked_add(timeout);
        self.loop_waits.store(true, Ordering::Relaxed);
        let todo = {
            let mut state = self.state.lock();
            while state.todo.is_empty() && !state.closing {
                let timed_out = match deadline {
                    Some(deadline) => self.work.wait_until(&mut state, deadline).timed_out(),
                    None => {
                        self.work.wait(&mut state);
                        false
                    }
                };
                if timed_out {
                    break;
                }
            }
            std::mem::take(&mut state.todo)
        };
        self.came_round();
        self.loop_waits.store(false, Ordering::Relaxed);
        todo.into_commands()
    }

    fn came_round(&self) {
        let now = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.last_step_us.store(now, Ordering::Relaxed);
    }

    /// The loop has come round, and not too long ago.
    pub(in crate::listener) fn is_looping(&self) -> bool {
        let has_begun = self.loop_waits.load(Ordering::Relaxed)
            || self.last_step_us.load(Ordering::Relaxed) > 0;
        has_begun && Duration::from_millis(u64::from(self.step_age_ms())) <= self.config.hung_after
    }

    pub(super) fn step_age_ms(&self) -> u32 {
        if self.loop_waits.load(Ordering::Relaxed) {
            return 0;
        }
        let last = Duration::from_micros(self.last_step_us.load(Ordering::Relaxed));
        u32::try_from(self.start.elapsed().saturating_sub(last).as_millis()).unwrap_or(u32::MAX)
    }

    pub(in crate::listener) fn emit(&self, outputs: Vec<StepOutput>, load: proto::Load) {
        self.came_round();
        let emitted_us = unix_us();
        let mut state = self.state.lock();
        state.load = load;
        // Few sessions: a list is found through faster than a map is built.
        let mut frames: Vec<(String, FromEngine, Vec<RequestRef>)> = Vec::new();
        for StepOutput { key, mut output } in outputs {
            // Cancelled requests fall away here.
            let Some(owner) = state.requests.get(&key) else {
                continue;
            };
            output.request = Some(owner.request);
            if let Some(times) = &mut output.times {
                times.received_us = owner.received_us;
                times.emitted_us = emitted_us;
            }
            let index = match frames.iter().position(|(id, _, _)| *id == owner.session_id) {
                Some(index) => index,
                None => {
                    frames.push((owner.session_id.clone(), FromEngine::default(), Vec::new()));
                    frames.len() - 1
                }
            };
            let (session_id, frame, ends) = &mut frames[index];
            if output.finish_reason != FinishReason::Unspecified as i32 {
                ends.push(owner.request);
                let request = owner.request;
                state.requests.remove(&key);
                if let Some(session) = state.sessions.get_mut(session_id.as_str()) {
                    session.requests.remove(&request.id);
                }
            }
            frame.outputs.push(output);
        }
        for (session_id, frame, ends) in frames {
            self.push_frame(&mut state, &session_id, frame, ends);
        }
    }

    pub(in crate::listener) fn note_step(&self, step: proto::StepTimes) {
        let mut steps = self.steps.lock();
        if steps.len() >= self.config.kept_steps {
            steps.pop_front();
        }
        if self.config.kept_steps > 0 {
            steps.push_back(step);
        }
    }

    pub(in crate::listener) fn steps_after(&self, after_us: u64) -> Vec<proto::StepTimes> {
        let steps = self.steps.lock();
        let first = steps.partition_point(|step| step.started_us <= after_us);
        steps.range(first..).cloned().collect()
    }

    pub(in crate::listener) fn emit_kv(
        &self,
        stored: Vec<proto::KvStored>,
        removed: Vec<Vec<u8>>,
        snapshot: bool,
    ) {
        let mut state = self.state.lock();
        // A snapshot is the state after the last event: it has that event's number.
        if !snapshot {
            state.kv_sequence += 1;
        }
        let events = proto::KvEvents {
            epoch: self.info.epoch,
            sequence: state.kv_sequence,
            snapshot,
            stored,
            removed,
        };
        let asked = state
            .sessions
            .values()
            .any(|session| session.kv_snapshot_wanted);
        let receivers: Vec<String> = state
            .sessions
            .iter()
            .filter(|(_, session)| {
                session.kv_events && (!snapshot || !asked || session.kv_snapshot_wanted)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for session_id in receivers {
            if snapshot && let Some(session) = state.sessions.get_mut(&session_id) {
                session.kv_snapshot_wanted = false;
            }
            let frame = FromEngine {
                kv_events: Some(events.clone()),
                ..FromEngine::default()
            };
            self.push_frame(&mut state, &session_id, frame, Vec::new());
        }
    }

    pub(in crate::listener) fn answer_calibrate(&self, ticket: u64, step_ms: Vec<f32>) {
        let mut state = self.state.lock();
        if let Some((_, answer)) = state.calibration.take_if(|(waiting, _)| *waiting == ticket) {
            // The caller may have left; then nobody wants the answer.
            let _ = answer.send(step_ms);
        }
    }
}
