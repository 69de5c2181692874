//! One HTTP/1.1 connection, plain or within TLS, with the moments its socket was written and read.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::tls::Tls;

/// The run's clock: nanoseconds since its epoch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    epoch: Instant,
}

impl Clock {
    pub fn start() -> Clock {
        Clock {
            epoch: Instant::now(),
        }
    }

    pub fn now_ns(self) -> u64 {
        self.at_ns(Instant::now())
    }

    pub fn at_ns(self, instant: Instant) -> u64 {
        let elapsed = instant.saturating_duration_since(self.epoch);
        u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
    }

    pub fn instant(self, ns: u64) -> Instant {
        self.epoch + Duration::from_nanos(ns)
    }
}

/// When the socket was used. Relaxed order: one thread writes and reads them.
#[derive(Debug)]
struct Stamps {
    clock: Clock,
    /// First write since `expect_send`; `UNSENT` until then.
    sent_ns: AtomicU64,
    read_ns: AtomicU64,
}

const UNSENT: u64 = u64::MAX;

/// An open connection; dropping it closes the socket.
pub(crate) struct Connection {
    pub sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
    stamps: Arc<Stamps>,
}

impl Connection {
    /// Connects, and makes TLS of it where `tls` says how.
    pub async fn open(
        addresses: &[SocketAddr],
        tls: Option<&Tls>,
        clock: Clock,
    ) -> Result<Connection, io::Error> {
        let stream = TcpStream::connect(addresses).await?;
        stream.set_nodelay(true)?;
        let stamps = Arc::new(Stamps {
            clock,
            sent_ns: AtomicU64::new(UNSENT),
            read_ns: AtomicU64::new(0),
        });
        let stream = StampedStream {
            stream,
            stamps: Arc::clone(&stamps),
        };
        // The stamps are the socket's, below TLS.
        match tls {
            None => Connection::over(stream, stamps).await,
            Some(tls) => {
                let secured = tls.connector.connect(tls.name.clone(), stream).await?;
                Connection::over(secured, stamps).await
            }
        }
    }

    async fn over<S>(stream: S, stamps: Arc<Stamps>) -> Result<Connection, io::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = Builder::new()
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // What goes wrong on the connection reaches the request in flight, which records it.
        let driver = tokio::spawn(async move { connection.await.unwrap_or_default() });
        Ok(Connection {
            sender,
            driver,
            stamps,
        })
    }

    /// The next write is the first of a request.
    pub fn expect_send(&self) {
        self.stamps.sent_ns.store(UNSENT, Ordering::Relaxed);
    }

    pub fn sent_ns(&self) -> Option<u64> {
        Some(self.stamps.sent_ns.load(Ordering::Relaxed)).filter(|&ns| ns != UNSENT)
    }

    /// When bytes last came from the socket.
    pub fn read_ns(&self) -> u64 {
        self.stamps.read_ns.load(Ordering::Relaxed)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

struct StampedStream {
    stream: TcpStream,
    stamps: Arc<Stamps>,
}

impl StampedStream {
    fn stamp_write(&self, before_ns: u64, written: &Poll<io::Result<usize>>) {
        let stamps = &self.stamps;
        if matches!(written, Poll::Ready(Ok(1..)))
            && stamps.sent_ns.load(Ordering::Relaxed) == UNSENT
        {
            stamps.sent_ns.store(before_ns, Ordering::Relaxed);
        }
    }
}

impl AsyncRead for StampedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.stamps
                .read_ns
                .store(self.stamps.clock.now_ns(), Ordering::Relaxed);
        }
        outcome
    }
}

impl AsyncWrite for StampedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let before_ns = self.stamps.clock.now_ns();
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.stamp_write(before_ns, &written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let before_ns = self.stamps.clock.now_ns();
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.stamp_write(before_ns, &written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
