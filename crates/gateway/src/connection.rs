//! One client's socket: notes when a request's first byte came, sees a client leave, drops one that does not read, and
//! closes gently when a request was answered before its body was read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::metrics::Metrics;
use crate::socket::Socket;

/// Before closing, this much of what the client still sends is read and thrown away: closing with unread bytes
/// would reset the connection under an answer that came before the body's end.
///
/// Many clients send all of a body before they look for an answer, so this is far more than the largest body that
/// is usually taken; throwing bytes away costs little.
const LINGER_BYTES: usize = 128 << 20;
const LINGER: Duration = Duration::from_secs(5);

/// What a client of HTTP/2 begins with, if it did not ask for it in HTTP/1 (RFC 9113, section 3.4).
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Shared by a connection's socket and its requests.
#[derive(Debug)]
pub struct ConnectionState {
    opened: Instant,
    /// The client is on this machine.
    local: bool,
    pub requests: AtomicU64,
    ended: AtomicU64,
    /// Bytes that the socket took.
    wrote_bytes: AtomicU64,
    /// Microseconds from `opened` to the first byte read since the last request ended, plus 1; 0 is none.
    first_byte_us: AtomicU64,
    /// Microseconds from `opened` to the last write that the socket took.
    wrote_us: AtomicU64,
    /// A request has come whole, and its response has not ended.
    answering: AtomicBool,
}

impl ConnectionState {
    #[must_use]
    pub fn new(local: bool) -> Arc<ConnectionState> {
        Arc::new(ConnectionState {
            opened: Instant::now(),
            local,
            requests: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            wrote_bytes: AtomicU64::new(0),
            first_byte_us: AtomicU64::new(0),
            wrote_us: AtomicU64::new(0),
            answering: AtomicBool::new(false),
        })
    }

    #[must_use]
    pub fn is_local(&self) -> bool {
        self.local
    }

    fn saw_bytes(&self) {
        if self.first_byte_us.load(Relaxed) == 0 {
            let us = crate::stages::micros(self.opened.elapsed()) + 1;
            self.first_byte_us.store(us, Relaxed);
        }
    }

    /// When the first byte of the request that starts now was read.
    pub fn request_started(&self) -> Option<Instant> {
        self.requests.fetch_add(1, Relaxed);
        let us = self.first_byte_us.load(Relaxed);
        (us > 0).then(|| self.opened + Duration::from_micros(us - 1))
    }

    pub fn wrote(&self) {
        self.wrote_us
            .store(crate::stages::micros(self.opened.elapsed()), Relaxed);
    }

    /// When the socket last took bytes.
    pub fn last_write(&self) -> Instant {
        self.opened + Duration::from_micros(self.wrote_us.load(Relaxed))
    }

    /// How many bytes the socket has taken.
    pub fn wrote_bytes(&self) -> u64 {
        self.wrote_bytes.load(Relaxed)
    }

    /// How many requests there were, if none of them goes on.
    pub fn idle_after(&self) -> Option<u64> {
        let ended = self.ended.load(Relaxed);
        (ended == self.requests.load(Relaxed)).then_some(ended)
    }

    pub fn request_ended(&self) {
        self.ended.fetch_add(1, Relaxed);
        self.first_byte_us.store(0, Relaxed);
        self.answering.store(false, Relaxed);
    }
}

/// A request's body, which tells its connection when it has come whole.
pub struct ArrivingBody {
    body: Incoming,
    state: Arc<ConnectionState>,
}

impl ArrivingBody {
    #[must_use]
    pub fn new(body: Incoming, state: Arc<ConnectionState>) -> Self {
        state.answering.store(body.is_end_stream(), Relaxed);
        ArrivingBody { body, state }
    }
}

impl Body for ArrivingBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // In chunks, only what comes after the last one tells.
        if frame.is_none() || self.body.is_end_stream() {
            self.state.answering.store(true, Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The socket as hyper sees it.
pub struct ClientSocket {
    socket: Socket,
    beginning: Beginning,
    /// Sees for itself when the client leaves while it is answered.
    sees_end: bool,
    state: Arc<ConnectionState>,
    metrics: Arc<Metrics>,
    write_timeout: Duration,
    /// Armed while a write waits for the client to read.
    stalled: Option<Pin<Box<Sleep>>>,
    lingering: Option<Pin<Box<Sleep>>>,
    lingered_bytes: usize,
}

impl ClientSocket {
    #[must_use]
    pub fn new(
        socket: Socket,
        state: Arc<ConnectionState>,
        metrics: Arc<Metrics>,
        write_timeout: Duration,
    ) -> Self {
        ClientSocket {
            socket,
            beginning: Beginning::default(),
            sees_end: false,
            state,
            metrics,
            write_timeout,
            stalled: None,
            lingering: None,
            lingered_bytes: 0,
        }
    }

    /// Reads as much as tells which protocol the client speaks; reading gives that once more.
    ///
    /// # Errors
    /// The socket's.
    pub async fn speaks_http2(&mut self) -> io::Result<bool> {
        let Beginning { bytes, read, .. } = &mut self.beginning;
        loop {
            let more = self.socket.read(&mut bytes[*read..]).await?;
            if more > 0 {
                self.state.saw_bytes();
            }
            *read += more;
            if more == 0 || bytes[..*read] != PREFACE[..*read] {
                return Ok(false);
            }
            if *read == PREFACE.len() {
                return Ok(true);
            }
        }
    }

    /// Has the socket fail once the client has left while it is answered, if it can tell; says whether it can.
    ///
    /// To see that, hyper would read what else the client sends, into a buffer of 8 KB for each stream.
    pub fn see_end(&mut self) -> bool {
        self.sees_end = matches!(self.socket, Socket::Tcp(_));
        self.sees_end
    }

    fn has_left(&self, cx: &mut Context<'_>) -> bool {
        let Socket::Tcp(tcp) = &self.socket else {
            return false;
        };
        let mut byte = [0];
        let looked = tcp.poll_peek(cx, &mut ReadBuf::new(&mut byte));
        matches!(looked, Poll::Ready(Ok(0) | Err(_)))
    }

    /// Turns a write that waits longer than the timeout into an error.
    fn bound_wait(
        &mut self,
        cx: &mut Context<'_>,
        wrote: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(taken) = &wrote {
            let bytes = *taken.as_ref().unwrap_or(&0) as u64;
            self.state.wrote_bytes.fetch_add(bytes, Relaxed);
            self.state.wrote();
            self.stalled = None;
            return wrote;
        }
        if self.sees_end && self.has_left(cx) {
            return Poll::Ready(Err(left()));
        }
        let timeout = self.write_timeout;
        let timer = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(timer.as_mut().poll(cx));
        self.metrics.clients_stalled.fetch_add(1, Relaxed);
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client does not read",
        )))
    }
}

fn left() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the client has left")
}

/// The first bytes of a connection, read before hyper reads.
#[derive(Default)]
struct Beginning {
    bytes: [u8; PREFACE.len()],
    read: usize,
    given: usize,
}

impl Beginning {
    fn give(&mut self, buf: &mut ReadBuf<'_>) {
        let rest = &self.bytes[self.given..self.read];
        let rest = &rest[..rest.len().min(buf.remaining())];
        buf.put_slice(rest);
        self.given += rest.len();
    }
}

impl AsyncRead for ClientSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        self.beginning.give(buf);
        // Together with what follows, so that hyper's first buffer is enough for both.
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        if buf.filled().len() == before {
            return read;
        }
        self.state.saw_bytes();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.bound_wait(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.bound_wait(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
        // hyper flushes, with something to write or without, whenever it is woken.
        if self.sees_end && self.state.answering.load(Relaxed) && self.has_left(cx) {
            return Poll::Ready(Err(left()));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingering.is_none() {
            ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
        }
        let this = &mut *self;
        let timer = this
            .lingering
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        if timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut scrap = [0_u8; 16 << 10];
        while this.lingered_bytes < LINGER_BYTES {
            let mut buf = ReadBuf::new(&mut scrap);
            match ready!(Pin::new(&mut this.socket).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => this.lingered_bytes += buf.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
