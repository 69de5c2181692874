//! One request to an upstream, and its answer.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};

use super::head::Head;
use super::link::Link;
use super::upstream::Upstream;

/// Why there is no answer, or no more of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    Connect(String),
    /// The setting that says how long.
    Late(&'static str),
    Lost(String),
    TooLong(usize),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connect(reason) => write!(f, "it cannot be reached: {reason}"),
            Failure::Late(setting) => write!(f, "it did not answer within {setting}"),
            Failure::Lost(reason) => write!(f, "its answer broke off: {reason}"),
            Failure::TooLong(bytes) => write!(f, "its answer is longer than {bytes} bytes"),
        }
    }
}

/// An answer whose head is there. Dropping it before its end closes the connection, which ends the request there.
pub struct Exchange {
    /// `None` once the answer has ended.
    link: Option<Link>,
    upstream: Arc<Upstream>,
    _in_flight: InFlight,
}

/// One of a count of requests that are not answered, until it is dropped.
#[derive(Debug)]
pub struct InFlight(Arc<AtomicUsize>);

impl InFlight {
    #[must_use]
    pub fn one_of(count: &Arc<AtomicUsize>) -> InFlight {
        count.fetch_add(1, Relaxed);
        InFlight(Arc::clone(count))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Exchange {
    /// Sends a request and waits for the head of its answer. On a connection that was kept open the upstream may have
    /// hung up meanwhile: then it goes out once more, on a new one, if nothing of it was sent or `may_resend` agrees.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn start(
        upstream: &Arc<Upstream>,
        request: Vec<Bytes>,
        may_resend: impl FnOnce() -> bool,
    ) -> Result<(Head, Exchange), Failure> {
        let in_flight = InFlight::one_of(&upstream.counts.in_flight);
        let kept = upstream.take_idle();
        let mut link = match kept {
            Some(link) => link,
            None => upstream.connect().await?,
        };
        let mut answer = link.send(request.clone()).await;
        if let Err(unanswered) = &answer
            && link.used
            && (unanswered.unsent || may_resend())
        {
            link = upstream.connect().await?;
            answer = link.send(request).await;
        }
        let head = answer.map_err(|unanswered| Failure::Lost(unanswered.reason))?;
        let exchange = Exchange {
            link: Some(link),
            upstream: Arc::clone(upstream),
            _in_flight: in_flight,
        };
        Ok((head, exchange))
    }

    /// The next part of the answer; `None` at its end.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        let Some(link) = &mut self.link else {
            return Poll::Ready(None);
        };
        let data = ready!(link.poll_data(cx));
        match data {
            Some(Ok(data)) => Poll::Ready(Some(Ok(data))),
            Some(Err(reason)) => {
                self.link = None;
                Poll::Ready(Some(Err(Failure::Lost(reason))))
            }
            None => {
                if let Some(mut link) = self.link.take()
                    && link.is_ready()
                {
                    self.upstream.give_back(link);
                }
                Poll::Ready(None)
            }
        }
    }

    /// All that is left of the answer.
    ///
    /// # Errors
    /// It breaks off, or is longer than `limit_bytes`.
    pub async fn collect(&mut self, limit_bytes: usize) -> Result<Bytes, Failure> {
        let mut first = Bytes::new();
        let mut whole = BytesMut::new();
        loop {
            let data = match std::future::poll_fn(|cx| self.poll_data(cx)).await {
                None => break,
                Some(data) => data?,
            };
            if first.len() + whole.len() + data.len() > limit_bytes {
                return Err(Failure::TooLong(limit_bytes));
            }
            if first.is_empty() && whole.is_empty() {
                first = data;
                continue;
            }
            if whole.is_empty() {
                whole.extend_from_slice(&std::mem::take(&mut first));
            }
            whole.extend_from_slice(&data);
        }
        Ok(if whole.is_empty() {
            first
        } else {
            whole.freeze()
        })
    }
}
