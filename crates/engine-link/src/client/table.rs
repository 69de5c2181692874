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

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::stream::{Mailbox, RequestStream, StreamError};
use crate::proto::{self, RequestRef, to_engine};

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
    /// Counts the streams of this session; an older stream gets nothing more.
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
    /// At least a part was sent on this session.
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

    /// Requests of this session, those waiting for the confirmation of a cancel included.
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

    /// Distributes a frame's outputs and refusals. Late ones, of attempts given up, fall away here.
    pub(super) fn deliver(&self, outputs: Vec<proto::Output>, refusals: Vec<proto::Refusal>) {
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
    pub(super) fn abandon_all(&self, reason: &str) {
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
                        reason: reason.to_owned(),
                    });
                }
                self.abandon(&mut state, id);
            }
        }
        self.writer.wake();
    }

    /// Ends every request and forgets the session: the engine will cancel by itself.
    pub(super) fn lose_all(&self, reason: &str) {
        let mut state = self.state.lock();
        state.attached = false;
        state.generation += 1;
        for (_, mut entry) in std::mem::take(&mut state.requests) {
            self.release(&mut entry);
            if !entry.cancelled {
                entry.mailbox.fail(StreamError::Lost {
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
        self.abandon_all(reason);
    }

    fn next_message(&self, state: &mut State) -> Option<to_engine::Message> {
        if let Some(hello) = state.hello.take() {
            return Some(to_engine::Message::Hello(hello));
        }
        if let Some(request) = state.cancels.pop_front() {
            return Some(to_engine::Message::Cancel(proto::Cancel {
                request: Some(request),
            }));
        }
        if let Some(sequence) = state.ack.take() {
            return Some(to_engine::Message::Ack(proto::Ack { sequence }));
        }
        if std::mem::take(&mut state.kv_snapshot) {
            return Some(to_engine::Message::KvSnapshot(proto::KvSnapshotRequest {}));
        }
        // By turns, so that neither many small requests nor one large one holds up the other.
        state.chunk_has_turn = !state.chunk_has_turn;
        if state.chunk_has_turn {
            self.next_chunk(state).or_else(|| self.next_start(state))
        } else {
            self.next_start(state).or_else(|| self.next_chunk(state))
        }
    }

    fn next_start(&self, state: &mut State) -> Option<to_engine::Message> {
        while let Some(id) = state.starts.pop_first() {
            let Some(entry) = state.requests.get_mut(&id) else {
                continue;
            };
            let Some(whole) = entry.submit.clone() else {
                continue;
            };
            entry.started = true;
            if whole.prompt_ids.len() > self.chunk_ids {
                state.chunks.push_back((id, self.chunk_ids));
            }
            return Some(to_engine::Message::Submit(Box::new(first_part(
                &whole,
                self.chunk_ids,
            ))));
        }
        None
    }

    fn next_chunk(&self, state: &mut State) -> Option<to_engine::Message> {
        while let Some((id, sent)) = state.chunks.pop_front() {
            let Some(entry) = state.requests.get(&id) else {
                continue;
            };
            let Some(whole) = &entry.submit else { continue };
            let end = whole.prompt_ids.len().min(sent + self.chunk_ids);
            let Some(part) = whole.prompt_ids.get(sent..end) else {
                continue;
            };
            let chunk = proto::PromptChunk {
                request: whole.request,
                prompt_ids: part.to_vec(),
            };
            if end < whole.prompt_ids.len() {
                state.chunks.push_back((id, end));
            }
            return Some(to_engine::Message::PromptChunk(chunk));
        }
        None
    }
}

/// The Submit with at most `chunk_ids` of its prompt.
fn first_part(whole: &proto::Submit, chunk_ids: usize) -> proto::Submit {
    if whole.prompt_ids.len() <= chunk_ids {
        return whole.clone();
    }
    proto::Submit {
        prompt_ids: whole.prompt_ids[..chunk_ids].to_vec(),
        request: whole.request,
        trace_id: whole.trace_id.clone(),
        prompt_tokens: whole.prompt_tokens,
        resume_ids: whole.resume_ids.clone(),
        sampling: whole.sampling.clone(),
        max_tokens: whole.max_tokens,
        min_tokens: whole.min_tokens,
        stop_token_ids: whole.stop_token_ids.clone(),
        ignore_eos: whole.ignore_eos,
        priority: whole.priority,
        deadline_ms: whole.deadline_ms,
        arrival_us: whole.arrival_us,
        choice: whole.choice,
        cache_salt: whole.cache_salt.clone(),
        prompt_logprobs: whole.prompt_logprobs,
    }
}

/// What one stream sends. A message is made only when the connection has room for it, so that a Cancel overtakes
/// every prompt that is not yet on the wire.
pub(super) struct Outgoing {
    table: Arc<Table>,
    generation: u64,
}

impl futures_util::Stream for Outgoing {
    type Item = proto::ToEngine;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<proto::ToEngine>> {
        let mut state = self.table.state.lock();
        if state.generation != self.generation {
            // Never `None`: the engine would take it as goodbye while the session reattaches. And no waker: it would
            // displace that of the stream which now is the session's.
            return Poll::Pending;
        }
        self.table.writer.register(cx.waker());
        match self.table.next_message(&mut state) {
            Some(message) => Poll::Ready(Some(proto::ToEngine {
                message: Some(message),
            })),
            None if state.closed => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use futures_util::Stream;
    use proptest::prelude::*;
    use to_engine::Message;

    use super::*;
    use crate::proto::FinishReason;

    fn table(chunk_ids: usize) -> (Arc<Table>, Outgoing) {
        let table = Table::new(Arc::default(), 100, chunk_ids);
        let mut outgoing = table.attach(proto::Hello::default());
        assert!(matches!(next(&mut outgoing), Some(Message::Hello(_))));
        table.welcomed();
        (table, outgoing)
    }

    fn next(outgoing: &mut Outgoing) -> Option<Message> {
        match Pin::new(outgoing).poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(message) => message.and_then(|m| m.message),
            Poll::Pending => None,
        }
    }

    fn prompt(length: u32) -> proto::Submit {
        proto::Submit {
            prompt_ids: (0..length).collect(),
            max_tokens: 4,
            ..Default::default()
        }
    }

    fn output(request: RequestRef, ids: &[u32], reason: FinishReason) -> proto::Output {
        proto::Output {
            request: Some(request),
            token_ids: ids.to_vec(),
            finish_reason: reason as i32,
            ..Default::default()
        }
    }

    #[test]
    fn a_cancel_overtakes_the_rest_of_its_prompt() {
        let (table, mut outgoing) = table(10);
        let stream = table.submit(prompt(1_000)).expect("taken");
        assert!(matches!(next(&mut outgoing), Some(Message::Submit(_))));
        assert!(matches!(next(&mut outgoing), Some(Message::PromptChunk(_))));
        let request = stream.request();
        drop(stream);
        assert_eq!(
            next(&mut outgoing),
            Some(Message::Cancel(proto::Cancel {
                request: Some(request)
            }))
        );
        assert_eq!(next(&mut outgoing), None);
        assert_eq!(table.len(), 1, "until the engine confirms");
        table.deliver(vec![output(request, &[], FinishReason::Cancelled)], vec![]);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_request_cancelled_before_it_was_sent_is_never_sent() {
        let (table, mut outgoing) = table(10);
        drop(table.submit(prompt(5)).expect("taken"));
        assert_eq!(table.len(), 0);
        assert_eq!(next(&mut outgoing), None);
    }

    #[test]
    fn small_requests_pass_between_the_chunks_of_large_ones() {
        let (table, mut outgoing) = table(10);
        let _large: Vec<_> = (0..2)
            .map(|_| table.submit(prompt(100)).expect("taken"))
            .collect();
        let small = table.submit(prompt(3)).expect("taken");
        let mut before = 0;
        while let Some(message) = next(&mut outgoing) {
            if matches!(&message, Message::Submit(submit) if submit.request == Some(small.request()))
            {
                break;
            }
            before += 1;
        }
        assert!(before <= 6, "{before} messages came first");
    }

    #[test]
    fn late_outputs_of_another_attempt_fall_away() {
        let (table, _outgoing) = table(10);
        let mut submit = prompt(3);
        submit.request = Some(RequestRef { id: 0, attempt: 2 });
        let stream = table.submit(submit).expect("taken");
        let request = stream.request();
        assert_eq!(request.attempt, 2);
        let late = RequestRef {
            attempt: 1,
            ..request
        };
        table.deliver(vec![output(late, &[9], FinishReason::Length)], vec![]);
        assert_eq!(table.len(), 1);
        assert_eq!(table.in_flight.prompt_tokens.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn an_engine_that_sends_more_than_max_tokens_is_cut_off() {
        let (table, mut outgoing) = table(10);
        let stream = table.submit(prompt(3)).expect("taken");
        assert!(next(&mut outgoing).is_some());
        table.deliver(
            vec![output(
                stream.request(),
                &[1, 2, 3, 4, 5],
                FinishReason::Unspecified,
            )],
            vec![],
        );
        assert!(matches!(next(&mut outgoing), Some(Message::Cancel(_))));
        assert_eq!(table.in_flight.requests.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn after_a_reattachment_unanswered_requests_and_cancels_go_out_again() {
        let (table, mut outgoing) = table(10);
        let answered = table.submit(prompt(3)).expect("taken");
        let unanswered = table.submit(prompt(25)).expect("taken");
        let dropped = table.submit(prompt(3)).expect("taken");
        while next(&mut outgoing).is_some() {}
        table.deliver(
            vec![output(answered.request(), &[1], FinishReason::Unspecified)],
            vec![],
        );
        let cancelled = dropped.request();
        drop(dropped);
        assert!(next(&mut outgoing).is_some());
        table.detach();
        assert_eq!(
            table.submit(prompt(1)).map(|_| ()),
            Err(SubmitError::NotReady)
        );
        assert_eq!(next(&mut outgoing), None, "the old stream gets nothing");
        let mut again = table.attach(proto::Hello::default());
        table.welcomed();
        let sent: Vec<_> = std::iter::from_fn(|| next(&mut again)).collect();
        assert!(matches!(&sent[0], Message::Hello(_)));
        assert_eq!(
            sent[1],
            Message::Cancel(proto::Cancel {
                request: Some(cancelled)
            })
        );
        assert!(matches!(&sent[2], Message::Submit(s) if s.request == Some(unanswered.request())));
        assert_eq!(sent.len(), 5, "with the two chunks that follow");
        let duplicate = proto::Refusal {
            request: Some(unanswered.request()),
            code: proto::RefusalCode::Duplicate as i32,
            ..Default::default()
        };
        table.deliver(vec![], vec![duplicate]);
        assert_eq!(table.len(), 3, "the engine had it: it runs on");
    }

    #[test]
    fn beyond_its_bound_a_session_is_full() {
        let table = Table::new(Arc::default(), 1, 10);
        let _outgoing = table.attach(proto::Hello::default());
        table.welcomed();
        let first = table.submit(prompt(1)).expect("taken");
        assert_eq!(table.submit(prompt(1)).map(|_| ()), Err(SubmitError::Full));
        drop(first);
        assert!(table.submit(prompt(1)).is_ok());
    }

    proptest! {
        #[test]
        fn chunks_put_together_are_the_prompts(
            lengths in prop::collection::vec(1u32..200, 1..8),
            chunk_ids in 1usize..50,
        ) {
            let (table, mut outgoing) = table(chunk_ids);
            let streams: Vec<_> = lengths.iter().map(|&n| table.submit(prompt(n)).expect("taken")).collect();
            let mut received: HashMap<RequestRef, (u32, Vec<u32>)> = HashMap::new();
            while let Some(message) = next(&mut outgoing) {
                match message {
                    Message::Submit(s) => {
                        prop_assert!(s.prompt_ids.len() <= chunk_ids);
                        received.insert(s.request.expect("named"), (s.prompt_tokens, s.prompt_ids));
                    }
                    Message::PromptChunk(c) => {
                        prop_assert!(!c.prompt_ids.is_empty() && c.prompt_ids.len() <= chunk_ids);
                        received.get_mut(&c.request.expect("named")).expect("begun").1.extend(c.prompt_ids);
                    }
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            for (stream, length) in streams.iter().zip(lengths) {
                let (announced, ids) = &received[&stream.request()];
                prop_assert_eq!(*announced, length);
                prop_assert_eq!(ids, &(0..length).collect::<Vec<_>>());
            }
        }
    }
}
