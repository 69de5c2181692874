//! One gateway's session: which requests it has, and its numbered frames until they are acknowledged.

use std::collections::{HashMap, VecDeque};
use std::task::Waker;
use std::time::Instant;

use prost::Message;

use crate::proto::{self, FromEngine, RequestRef};

/// ```text
///   acknowledged | sent, kept for a reattachment | not sent yet
///   -------------+-------------------------------+--------------
///                 ^ first()                       ^ cursor       ^ next_sequence
/// ```
pub(super) struct Session {
    /// The stream that may read; a newer one takes over.
    pub(super) stream: Option<u64>,
    /// Since when there is no stream.
    pub(super) detached: Option<Instant>,
    /// Running requests by id: attempt and key.
    pub(super) requests: HashMap<u64, (u32, u64)>,
    /// Requests whose end is in a frame not yet acknowledged: a repeated Submit must not start them again.
    finished: HashMap<u64, u32>,
    frames: VecDeque<Frame>,
    retained_bytes: usize,
    next_sequence: u64,
    cursor: u64,
    pub(super) welcome: Option<proto::Welcome>,
    pub(super) load_due: bool,
    pub(super) kv_events: bool,
    pub(super) kv_snapshot_wanted: bool,
    pub(super) waker: Option<Waker>,
}

struct Frame {
    message: FromEngine,
    bytes: usize,
    ends: Vec<RequestRef>,
}

impl Session {
    pub(super) fn new(kv_events: bool) -> Self {
        Self {
            stream: None,
            detached: None,
            requests: HashMap::new(),
            finished: HashMap::new(),
            frames: VecDeque::new(),
            retained_bytes: 0,
            next_sequence: 1,
            cursor: 1,
            welcome: None,
            load_due: false,
            kv_events,
            kv_snapshot_wanted: false,
            waker: None,
        }
    }

    fn first(&self) -> u64 {
        self.next_sequence - self.frames.len() as u64
    }

    /// Numbers and keeps a frame. `ends` are the requests that it finishes.
    pub(super) fn push(&mut self, mut message: FromEngine, ends: Vec<RequestRef>) {
        message.sequence = self.next_sequence;
        self.next_sequence += 1;
        for end in &ends {
            self.finished.insert(end.id, end.attempt);
        }
        let bytes = message.encoded_len();
        self.retained_bytes += bytes;
        self.frames.push_back(Frame {
            message,
            bytes,
            ends,
        });
    }

    pub(super) fn retained_bytes(&self) -> usize {
        self.retained_bytes
    }

    /// Forgets frames up to `sequence`, as far as they were sent.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        let upto = sequence.min(self.cursor - 1);
        while self.first() <= upto {
            let Some(frame) = self.frames.pop_front() else {
                break;
            };
            self.retained_bytes -= frame.bytes;
            for end in frame.ends {
                if self.finished.get(&end.id) == Some(&end.attempt) {
                    self.finished.remove(&end.id);
                }
            }
        }
    }

    /// Goes back to the frame after `last_sequence`; false if that is not kept (any more).
    pub(super) fn rewind(&mut self, last_sequence: u64) -> bool {
        if last_sequence >= self.next_sequence || last_sequence + 1 < self.first() {
            return false;
        }
        self.cursor = self.cursor.max(last_sequence + 1);
        self.acknowledge(last_sequence);
        self.cursor = last_sequence + 1;
        true
    }

    /// The next frame to send; the frame itself stays until it is acknowledged.
    pub(super) fn next_frame(&mut self) -> Option<FromEngine> {
        let index = usize::try_from(self.cursor - self.first()).ok()?;
        let message = self.frames.get(index)?.message.clone();
        self.cursor += 1;
        Some(message)
    }

    /// Whether this attempt, or a later one, is running or has an end that the gateway may not know of.
    pub(super) fn knows(&self, request: RequestRef) -> bool {
        let runs = self
            .requests
            .get(&request.id)
            .is_some_and(|&(attempt, _)| attempt >= request.attempt);
        runs || self
            .finished
            .get(&request.id)
            .is_some_and(|&attempt| attempt >= request.attempt)
    }

    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(id: u64) -> RequestRef {
        RequestRef { id, attempt: 0 }
    }

    fn sequences(session: &mut Session) -> Vec<u64> {
        std::iter::from_fn(|| session.next_frame())
            .map(|frame| frame.sequence)
            .collect()
    }

    #[test]
    fn frames_are_numbered_from_one_and_kept_until_acknowledged() {
        let mut session = Session::new(false);
        for id in 1..=4 {
            session.push(FromEngine::default(), vec![reference(id)]);
        }
        assert_eq!(sequences(&mut session), [1, 2, 3, 4]);
        session.acknowledge(2);
        assert!(!session.knows(reference(2)) && session.knows(reference(3)));
        assert!(session.rewind(2));
        assert_eq!(sequences(&mut session), [3, 4]);
        assert!(session.rewind(4));
        assert_eq!(sequences(&mut session), Vec::<u64>::new());
        assert_eq!(session.retained_bytes(), 0);
        assert!(!session.rewind(3), "acknowledged by the reattachment at 4");
        assert!(!session.rewind(5), "never sent");
    }

    #[test]
    fn an_ack_of_frames_never_sent_forgets_none_of_them() {
        let mut session = Session::new(false);
        session.push(FromEngine::default(), vec![]);
        session.push(FromEngine::default(), vec![]);
        assert!(session.next_frame().is_some());
        session.acknowledge(u64::MAX);
        assert_eq!(sequences(&mut session), [2]);
    }
}
