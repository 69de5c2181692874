//! The outputs of one request, from the demultiplexer to its reader.

use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::table::Table;
use crate::proto;

/// Why a request ended without a finish reason.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StreamError {
    /// The engine's listener would not take the request; another engine would answer the same if the code is
    /// `INVALID`.
    #[error("refused: {}", .0.message)]
    Refused(proto::Refusal),
    /// The engine died, hung or could not be reattached to. What was received stays valid: the request may be
    /// replayed elsewhere with its ids in `resume_ids`.
    #[error("lost: {reason}")]
    Lost { cause: LostCause, reason: String },
}

/// What became of the engine that ran a lost request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LostCause {
    /// Its session broke and could not be taken up again: the process is gone, or has forgotten it.
    Gone,
    /// No frame came any more, or none that makes sense: stopped, or cut off.
    Silent,
    /// The listener answers, the loop behind it does not come round.
    Hung,
    /// It answered what no engine may answer.
    Nonsense,
    /// This side has let go of the engine.
    Closed,
}

impl LostCause {
    /// A label for metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Silent => "silent",
            Self::Hung => "hung",
            Self::Nonsense => "nonsense",
            Self::Closed => "closed",
        }
    }
}

/// Holds what the reader has not taken yet. Merging bounds it by the request's `max_tokens`.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    inbox: Mutex<Inbox>,
    reader: AtomicWaker,
}

#[derive(Debug, Default)]
struct Inbox {
    pending: Option<proto::Output>,
    end: Option<End>,
}

#[derive(Debug)]
enum End {
    /// The last output has a finish reason.
    Finished,
    Failed(StreamError),
}

impl Mailbox {
    pub(super) fn push(&self, output: proto::Output) {
        {
            let mut inbox = self.inbox.lock();
            if inbox.end.is_some() {
                return;
            }
            if output.finish_reason != proto::FinishReason::Unspecified as i32 {
                inbox.end = Some(End::Finished);
            }
            match &mut inbox.pending {
                Some(pending) => merge(pending, output),
                None => inbox.pending = Some(output),
            }
        }
        self.reader.wake();
    }

    /// Ends the stream after what is pending. Only the first end counts.
    pub(super) fn fail(&self, error: StreamError) {
        {
            let mut inbox = self.inbox.lock();
            if inbox.end.is_some() {
                return;
            }
            inbox.end = Some(End::Failed(error));
        }
        self.reader.wake();
    }

    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Result<proto::Output, StreamError>>> {
        if let Some(item) = self.take() {
            return Poll::Ready(item);
        }
        self.reader.register(cx.waker());
        self.take().map_or(Poll::Pending, Poll::Ready)
    }

    fn take(&self) -> Option<Option<Result<proto::Output, StreamError>>> {
        let mut inbox = self.inbox.lock();
        if let Some(output) = inbox.pending.take() {
            return Some(Some(Ok(output)));
        }
        match inbox.end.take()? {
            End::Finished => {
                inbox.end = Some(End::Finished);
                Some(None)
            }
            End::Failed(error) => {
                inbox.end = Some(End::Finished);
                Some(Some(Err(error)))
            }
        }
    }
}

/// Appends `next` to what the reader has not taken: as if the engine had done both steps in one.
fn merge(pending: &mut proto::Output, next: proto::Output) {
    pending.token_ids.extend(next.token_ids);
    pending.logprobs.extend(next.logprobs);
    pending.prompt_logprobs.extend(next.prompt_logprobs);
    pending.finish_reason = next.finish_reason;
    pending.cached_tokens = pending.cached_tokens.max(next.cached_tokens);
    if next.times.is_some() {
        pending.times = next.times;
    }
    pending.stop_token_id = next.stop_token_id;
    pending.error = next.error;
}

/// One request's outputs, in order. Dropping it cancels the request in the engine.
pub struct RequestStream {
    pub(super) table: Arc<Table>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) request: proto::RequestRef,
}

impl RequestStream {
    /// The next output; several steps' outputs come merged if the reader lagged. `None` after the output with a
    /// finish reason, or after an error.
    pub async fn next(&mut self) -> Option<Result<proto::Output, StreamError>> {
        std::future::poll_fn(|cx| self.mailbox.poll_next(cx)).await
    }

    /// The request's name on its session.
    pub fn request(&self) -> proto::RequestRef {
        self.request
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.table.cancel(self.request);
    }
}

impl futures_util::Stream for RequestStream {
    type Item = Result<proto::Output, StreamError>;

    fn poll_next(self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.mailbox.poll_next(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(ids: &[u32], reason: proto::FinishReason) -> proto::Output {
        proto::Output {
            token_ids: ids.to_vec(),
            finish_reason: reason as i32,
            ..Default::default()
        }
    }

    #[test]
    fn a_lagging_reader_gets_steps_merged_then_the_end() {
        let mailbox = Mailbox::default();
        mailbox.push(proto::Output {
            cached_tokens: 16,
            ..output(&[1], proto::FinishReason::Unspecified)
        });
        mailbox.push(output(&[2, 3], proto::FinishReason::Length));
        mailbox.push(output(&[4], proto::FinishReason::Unspecified));
        mailbox.fail(StreamError::Lost {
            cause: LostCause::Gone,
            reason: "late".into(),
        });
        let first = mailbox
            .take()
            .expect("ready")
            .expect("an output")
            .expect("no error");
        assert_eq!(first.token_ids, [1, 2, 3]);
        assert_eq!(first.cached_tokens, 16);
        assert_eq!(first.finish_reason(), proto::FinishReason::Length);
        assert!(mailbox.take().expect("ready").is_none());
        assert!(mailbox.take().expect("ready").is_none());
    }

    #[test]
    fn an_error_comes_after_what_was_received() {
        let mailbox = Mailbox::default();
        mailbox.push(output(&[1], proto::FinishReason::Unspecified));
        mailbox.fail(StreamError::Lost {
            cause: LostCause::Gone,
            reason: "gone".into(),
        });
        assert_eq!(
            mailbox
                .take()
                .expect("ready")
                .expect("output")
                .expect("ok")
                .token_ids,
            [1]
        );
        let error = mailbox
            .take()
            .expect("ready")
            .expect("item")
            .expect_err("an error");
        assert_eq!(error.to_string(), "lost: gone");
        assert!(mailbox.take().expect("ready").is_none());
    }
}
