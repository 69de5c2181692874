//! What one stream sends, message by message.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use super::{State, Table};
use crate::proto::{self, to_engine};

/// What one stream sends. A message is made only when the connection has room for it, so that a Cancel overtakes
/// every prompt that is not yet on the wire.
pub(in crate::client) struct Outgoing {
    pub(super) table: Arc<Table>,
    pub(super) generation: u64,
    /// The last message was a part of a long prompt.
    pub(super) gave_chunk: bool,
}

impl futures_util::Stream for Outgoing {
    type Item = proto::ToEngine;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<proto::ToEngine>> {
        let this = self.get_mut();
        if std::mem::take(&mut this.gave_chunk) {
            // The thread's other tasks go on between two chunks: several long prompts take milliseconds.
            let _ = pin!(tokio::task::yield_now()).poll(cx);
            return Poll::Pending;
        }
        let mut state = this.table.state.lock();
        if state.generation != this.generation {
            // Never `None`: the engine would take it as goodbye while the session reattaches. And no waker: it would
            // displace that of the stream which now is the session's.
            return Poll::Pending;
        }
        this.table.writer.register(cx.waker());
        match this.table.next_message(&mut state) {
            Some(message) => {
                this.gave_chunk = matches!(message, to_engine::Message::PromptChunk(_));
                Poll::Ready(Some(proto::ToEngine {
                    message: Some(message),
                }))
            }
            None if state.closed => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

impl Table {
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
