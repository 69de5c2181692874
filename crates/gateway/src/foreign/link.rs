//! One HTTP/1.1 connection to an upstream. Whoever uses it drives it: no task of its own stands between the upstream's
//! socket and the client's, so a chunk wakes one task and not two; and while nothing comes it holds no buffer.
//!
//! ```text
//!  idle (upstream.rs) --take--> send --head--> body's parts --end--> idle
//!                                  '--dropped, or broken: closed
//! ```

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use axum::http::StatusCode;
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::framing::{BadChunk, Framing};
use super::head::Head;
use crate::socket::Socket;

/// Of a response's head.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// What is read at once, and so the most that is read ahead of the client.
const READ_BYTES: usize = 16 << 10;
/// Parts of a request that are written at once.
const WRITE_PARTS: usize = 8;

/// An open connection; dropping it closes it.
pub struct Link {
    socket: Socket,
    /// Of the answer that is being read.
    framing: Framing,
    keep_alive: bool,
    /// Of the body, what came with its head.
    came: Bytes,
    /// Why there is no more of the answer than what was given.
    broke: Option<String>,
    /// It has answered a request before this one.
    pub used: bool,
}

/// There is no answer to a request.
#[derive(Debug)]
pub struct Unanswered {
    pub reason: String,
    /// Nothing of the request has left.
    pub unsent: bool,
}

impl Link {
    #[must_use]
    pub fn new(socket: Socket) -> Link {
        Link {
            socket,
            framing: Framing::End,
            keep_alive: true,
            came: Bytes::new(),
            broke: None,
            used: false,
        }
    }

    /// Whether it can take a request: the last answer was read to its end, and the upstream has not closed it since.
    pub fn is_ready(&mut self) -> bool {
        let is_idle = self.framing == Framing::End && self.keep_alive && self.came.is_empty();
        let mut byte = [0];
        let read = Pin::new(&mut self.socket).poll_read(
            &mut Context::from_waker(Waker::noop()),
            &mut ReadBuf::new(&mut byte),
        );
        // What comes unasked is an end, or nothing that could be understood.
        is_idle && read.is_pending()
    }

    /// Sends a request, which is the concatenation of `parts`, and waits for the head of its answer.
    ///
    /// # Errors
    /// The connection broke, or what came is no HTTP.
    pub async fn send(&mut self, parts: Vec<Bytes>) -> Result<Head, Unanswered> {
        let mut sending = Sending {
            parts,
            sent: 0,
            unsent: true,
            broke: None,
        };
        let mut head = BytesMut::new();
        std::future::poll_fn(|cx| self.poll_send(&mut sending, &mut head, cx))
            .await
            .map_err(|reason| Unanswered {
                // An upstream that hangs up while a request is written has often said why.
                reason: sending.broke.take().unwrap_or(reason),
                unsent: sending.unsent,
            })
    }

    fn poll_send(
        &mut self,
        sending: &mut Sending,
        head: &mut BytesMut,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Head, String>> {
        let is_sent = match sending.poll(&mut self.socket, cx) {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(error)) => {
                sending.broke = Some(error.to_string());
                false
            }
            Poll::Pending => false,
        };
        loop {
            let mut memory = [MaybeUninit::uninit(); READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut memory);
            ready!(read(&mut self.socket, cx, &mut buffer))?;
            let bytes = buffer.filled();
            if bytes.is_empty() {
                return Poll::Ready(Err("it hung up".to_owned()));
            }
            head.extend_from_slice(bytes);
            while let Some((found, length)) = Head::parse(head)? {
                head.advance(length);
                if found.status == StatusCode::SWITCHING_PROTOCOLS {
                    return Poll::Ready(Err("it switches protocols".to_owned()));
                }
                if !found.status.is_informational() {
                    // The rest of a request that was answered early is never sent.
                    self.keep_alive = found.keep_alive && is_sent;
                    self.framing = found.framing;
                    self.came = head.split().freeze();
                    return Poll::Ready(Ok(found));
                }
            }
            if head.len() > MAX_HEAD_BYTES {
                let reason = format!("its head is longer than {MAX_HEAD_BYTES} bytes");
                return Poll::Ready(Err(reason));
            }
        }
    }

    /// The next part of the answer's body; `None` at its end.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, String>>> {
        let mut data = BytesMut::new();
        let came = std::mem::take(&mut self.came);
        self.take(&came, &mut data);
        loop {
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data.freeze())));
            }
            if let Some(reason) = self.broke.take() {
                return Poll::Ready(Some(Err(reason)));
            }
            if self.framing == Framing::End {
                return Poll::Ready(None);
            }
            let mut memory = [MaybeUninit::uninit(); READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut memory);
            ready!(read(&mut self.socket, cx, &mut buffer))?;
            let bytes = buffer.filled();
            if bytes.is_empty() {
                let whole = self.framing == Framing::UntilClose;
                self.framing = Framing::End;
                self.keep_alive = false;
                return Poll::Ready((!whole).then(|| Err("it hung up".to_owned())));
            }
            self.take(bytes, &mut data);
        }
    }

    /// Adds to `data` what of the body's next bytes is data.
    fn take(&mut self, bytes: &[u8], data: &mut BytesMut) {
        match self.framing.take(bytes, data) {
            // What comes behind a body's end nobody asked for.
            Ok(taken) => self.keep_alive &= taken == bytes.len(),
            Err(BadChunk) => self.broke = Some("what came is no chunk".to_owned()),
        }
    }
}

/// Reads what is there, none at the end.
fn read(
    socket: &mut Socket,
    cx: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<Result<(), String>> {
    Pin::new(socket)
        .poll_read(cx, buffer)
        .map_err(|error| error.to_string())
}

/// A request on its way out.
struct Sending {
    parts: Vec<Bytes>,
    /// Of the parts, those that have left whole.
    sent: usize,
    unsent: bool,
    /// Why the rest cannot be sent.
    broke: Option<String>,
}

impl Sending {
    fn poll(&mut self, socket: &mut Socket, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.broke.is_some() {
            return Poll::Pending;
        }
        while self.sent < self.parts.len() {
            let left = &self.parts[self.sent..];
            let mut slices = [IoSlice::new(&[]); WRITE_PARTS];
            for (slice, part) in slices.iter_mut().zip(left) {
                *slice = IoSlice::new(part);
            }
            let slices = &slices[..left.len().min(WRITE_PARTS)];
            let mut wrote = ready!(Pin::new(&mut *socket).poll_write_vectored(cx, slices))?;
            if wrote == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent = false;
            while let Some(part) = self.parts.get(self.sent)
                && wrote >= part.len()
            {
                wrote -= part.len();
                self.sent += 1;
            }
            if wrote > 0 {
                self.parts[self.sent].advance(wrote);
            }
        }
        Pin::new(socket).poll_flush(cx)
    }
}
