//! From a frame to the requests' readers.

use super::{State, Table};
use crate::client::stream::{LostCause, StreamError};
use crate::proto;

impl Table {
    /// Distributes a frame's outputs and refusals. Late ones, of attempts given up, fall away here.
    pub(in crate::client) fn deliver(
        &self,
        outputs: Vec<proto::Output>,
        refusals: Vec<proto::Refusal>,
    ) {
        let mut wake_writer = false;
        {
            let mut state = self.state.lock();
            for output in outputs {
                wake_writer |= self.deliver_output(&mut state, output);
            }
            for refusal in refusals {
                self.deliver_refusal(&mut state, refusal);
            }
        }
        if wake_writer {
            self.writer.wake();
        }
    }

    /// Returns whether something is to be sent.
    fn deliver_output(&self, state: &mut State, output: proto::Output) -> bool {
        let Some(request) = output.request else {
            return false;
        };
        let Some(entry) = state.requests.get_mut(&request.id) else {
            return false;
        };
        if entry.attempt != request.attempt {
            return false;
        }
        let finished = output.finish_reason != proto::FinishReason::Unspecified as i32;
        if entry.cancelled {
            if finished {
                state.requests.remove(&request.id);
            }
            return false;
        }
        self.answered(entry);
        entry.submit = None;
        let Some(room) = entry.room.checked_sub(output.token_ids.len()) else {
            entry.mailbox.fail(StreamError::Lost {
                cause: LostCause::Nonsense,
                reason: "the engine sent more ids than max_tokens".to_owned(),
            });
            if finished {
                self.release(entry);
                state.requests.remove(&request.id);
                return false;
            }
            self.abandon(state, request.id);
            return true;
        };
        entry.room = room;
        entry.mailbox.push(output);
        if finished {
            self.release(entry);
            state.requests.remove(&request.id);
        }
        false
    }

    fn deliver_refusal(&self, state: &mut State, refusal: proto::Refusal) {
        let Some(request) = refusal.request else {
            return;
        };
        let Some(entry) = state.requests.get_mut(&request.id) else {
            return;
        };
        if entry.attempt != request.attempt {
            return;
        }
        // The engine had it all along: the first sending arrived before the stream broke.
        if entry.resent && refusal.code() == proto::RefusalCode::Duplicate {
            entry.submit = None;
            return;
        }
        self.release(entry);
        if !entry.cancelled {
            entry.mailbox.fail(StreamError::Refused(refusal));
        }
        state.requests.remove(&request.id);
        state.starts.remove(&request.id);
    }
}
