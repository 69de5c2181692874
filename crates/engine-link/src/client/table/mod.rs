//! One session's requests and what is to be sent for them.
//!
//! ```text
//!  submit() --> starts ---+--> Submit with the first ids --> chunks --+--> PromptChunk ... (round robin)
//!  drop     --> cancels --+   (taken by turns)                        |
//!  frames   --> ack ------+-------------- Outgoing::poll_next <-------+
//! ```
//!
//! Nothing here waits. Every queue is bounded by `max_in_flight`: a request has at most one place in each, and
//! stays in the table until the engine has confirmed its end, cancelled or not.

mod delivery;
mod outgoing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::stream::{LostCause, Mailbox, RequestStream, StreamError};
use crate::proto::{self, RequestRef};
pub(super) use outgoing::Outgoing;

/// Requests and unanswered prompt tokens over all sessions of one replica.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    pub(super) requests: AtomicUsize,
    pub(super) prompt_tokens: AtomicUsize,
}

pub(super) struct Table {
    state: Mutex<State>,
    writer: AtomicWaker,
    in_flight: Arc<InFlight>,
    max_requests: usize,
    chunk_ids: usize,
}

#[derive(Default)]
struct State {
    next_id: u64,
    requests: HashMap<u64, Entry>,
    attached: bool,
    closed: bool,
    /// Counts the gRPC streams of the session; an older stream gets nothing more.
    generation: u64,
    hello: Option<proto::Hello>,
    cancels: VecDeque<RequestRef>,
    ack: Option<u64>,
    kv_snapshot: bool,
    /// Ids rise, so the order is that of submission.
    starts: BTreeSet<u64>,
    /// Request and how many of its prompt's ids are sent.
    chunks: VecDeque<(u64, usize)>,
    chunk_has_turn: bool,
}

struct Entry {
    attempt: u32,
    mailbox: Arc<Mailbox>,
    /// Kept until the engine is known to have it, for sending it again after a reattachment.
    submit: Option<Arc<proto::Submit>>,
    /// At least a part was sent on the session.
    started: bool,
    /// Sent again: the engine may answer that it has it already.
    resent: bool,
    /// Nobody reads it any more; it stays until the engine confirms.
    cancelled: bool,
    /// Counted in `InFlight` until the first output.
    unanswered_tokens: usize,
    /// Ids that may still come.
    room: usize,
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("the replica is not ready")]
    NotReady,
    #[error("the replica's sessions have all the requests in flight that they may have")]
    Full,
}

impl Table {
    pub(super) fn new(
        in_flight: Arc<InFlight>,
        max_requests: usize,
        chunk_ids: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                next_id: 1,
                ..State::default()
            }),
            writer: AtomicWaker::new(),
            in_flight,
            max_requests,
            chunk_ids: chunk_ids.max(1),
        })
    }

    /// Requests of the session, those waiting for the confirmation of a cancel included.
    pub(super) fn len(&self) -> usize {
        self.state.lock().requests.len()
    }

    pub(super) fn is_attached(&self) -> bool {
        self.state.lock().attached
    }

    /// Takes a request; its `request.attempt` stays, its `request.id` is given here.
    pub(super) fn submit(
        self: &Arc<Self>,
        mut submit: proto::Submit,
    ) -> Result<RequestStream, SubmitError> {
        let mailbox = Arc::new(Mailbox::default());
        let request = {
            let mut state = self.state.lock();
            if !state.attached || state.closed {
                return Err(SubmitError::NotReady);
            }
            if state.requests.len() >= self.max_requests {
                return Err(SubmitError::Full);
            }
            let id = state.next_id;
            state.next_id += 1;
            let request = RequestRef {
                id,
                attempt: submit.request.map_or(0, |r| r.attempt),
            };
            submit.request = Some(request);
            submit.prompt_tokens = u32::try_from(submit.prompt_ids.len()).unwrap_or(u32::MAX);
            let unanswered_tokens = submit.prompt_ids.len() + submit.resume_ids.len();
            let entry = Entry {
                attempt: request.attempt,
                mailbox: mailbox.clone(),
                room: (submit.max_tokens as usize).saturating_sub(submit.resume_ids.len()),
                submit: Some(Arc::new(submit)),
                started: false,
                resent: false,
                cancelled: false,
                unanswered_tokens,
            };
            self.in_flight.requests.fetch_add(1, Ordering::Relaxed);
            self.in_flight
                .prompt_tokens
                .fetch_add(unanswered_tokens, Ordering::Relaxed);
            state.requests.insert(id, entry);
            state.starts.insert(id);
            request
        };
        self.writer.wake();
        Ok(RequestStream {
            table: self.clone(),
            mailbox,
            request,
        })
    }

    /// The reader is gone. Does nothing if the request has ended or is another attempt.
    pub(super) fn cancel(&self, request: RequestRef) {
        {
            let mut state = self.state.lock();
            let Some(entry) = state.requests.get_mut(&request.id) else {
                return;
            };
            if entry.attempt != request.attempt || entry.cancelled {
                return;
            }
            self.abandon(&mut state, request.id);
        }
        self.writer.wake();
    }

    /// Stops counting a request and tells the engine, if the engine may know of it.
    fn abandon(&self, state: &mut State, id: u64) {
        let Some(entry) = state.requests.get_mut(&id) else {
            return;
        };
        self.release(entry);
        entry.cancelled = true;
        entry.submit = None;
        let request = RequestRef {
            id,
            attempt: entry.attempt,
        };
        let engine_may_know = entry.started || entry.resent;
        state.starts.remove(&id);
        if engine_may_know {
            state.cancels.push_back(request);
        } else {
            state.requests.remove(&id);
        }
    }

    /// Takes an entry that nobody has given up yet out of the counts.
    fn release(&self, entry: &mut Entry) {
        self.answered(entry);
        if !entry.cancelled {
            self.in_flight.requests.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn answered(&self, entry: &mut Entry) {
        let tokens = std::mem::take(&mut entry.unanswered_tokens);
        self.in_flight
            .prompt_tokens
            .fetch_sub(tokens, Ordering::Relaxed);
    }

    /// Opens a stream: the returned messages begin with `hello`. On a reattachment everything that the engine may
    /// have missed is sent again after it.
    pub(super) fn attach(self: &Arc<Self>, hello: proto::Hello) -> Outgoing {
        let mut state = self.state.lock();
        state.generation += 1;
        state.hello = Some(hello);
        state.ack = None;
        let generation = state.generation;
        drop(state);
        Outgoing {
            table: self.clone(),
            generation,
            gave_chunk: false,
        }
    }

    /// The engine has said Welcome: submits are taken, and what it may have missed goes out again.
    pub(super) fn welcomed(&self) {
        let mut state = self.state.lock();
        let State {
            requests,
            starts,
            cancels,
            chunks,
            ..
        } = &mut *state;
        chunks.clear();
        cancels.clear();
        for (&id, entry) in requests.iter_mut() {
            if entry.cancelled {
                cancels.push_back(RequestRef {
                    id,
                    attempt: entry.attempt,
                });
            } else if entry.submit.is_some() && entry.started {
                entry.started = false;
                entry.resent = true;
                starts.insert(id);
            }
        }
        state.attached = true;
        drop(state);
        self.writer.wake();
    }

    /// The stream broke; requests wait for a reattachment, new ones are not taken.
    pub(super) fn detach(&self) {
        let mut state = self.state.lock();
        state.attached = false;
        state.generation += 1;
    }

    /// Ends every request; the engine is told on the running stream (a hung engine: the session lives).
    pub(super) fn abandon_all(&self, cause: LostCause, reason: &str) {
        {
            let mut state = self.state.lock();
            let live: Vec<u64> = state
                .requests
                .iter()
                .filter(|(_, e)| !e.cancelled)
                .map(|(&id, _)| id)
                .collect();
            for id in live {
                if let Some(entry) = state.requests.get(&id) {
                    entry.mailbox.fail(StreamError::Lost {
                        cause,
                        reason: reason.to_owned(),
                    });
                }
                self.abandon(&mut state, id);
            }
        }
        self.writer.wake();
    }

    /// Ends every request and forgets the session: the engine will cancel by itself.
    pub(super) fn lose_all(&self, cause: LostCause, reason: &str) {
        let mut state = self.state.lock();
        state.attached = false;
        state.generation += 1;
        for (_, mut entry) in std::mem::take(&mut state.requests) {
            self.release(&mut entry);
            if !entry.cancelled {
                entry.mailbox.fail(StreamError::Lost {
                    cause,
                    reason: reason.to_owned(),
                });
            }
        }
        state.starts.clear();
        state.chunks.clear();
        state.cancels.clear();
        state.ack = None;
        state.kv_snapshot = false;
    }

    pub(super) fn ack(&self, sequence: u64) {
        self.state.lock().ack = Some(sequence);
        self.writer.wake();
    }

    pub(super) fn request_kv_snapshot(&self) {
        self.state.lock().kv_snapshot = true;
        self.writer.wake();
    }

    /// Ends the outgoing messages after a last ack: the engine takes it as goodbye.
    pub(super) fn close(&self, reason: &str) {
        {
            let mut state = self.state.lock();
            state.closed = true;
            state.attached = false;
        }
        self.abandon_all(LostCause::Closed, reason);
    }
}
