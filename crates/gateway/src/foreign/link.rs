//! One HTTP/1.1 connection to an upstream. Whoever uses it drives it: no task of its own stands between the upstream's
//! socket and the client's, so a chunk wakes one task and not two.
//!
//! ```text
//!  idle (pool.rs) --take--> send --head--> body's parts --end--> idle
//!                             '--dropped, or broken: closed
//! ```

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::vec::IntoIter;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, Builder, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use crate::socket::Socket;

const MAX_HEADERS: usize = 100;
/// Of a response's head, and what is read ahead of the client.
const MAX_BUFFER_BYTES: usize = 64 << 10;

/// A request's body: parts that are written one after the other.
#[derive(Debug)]
pub struct Parts(IntoIter<Bytes>);

impl Parts {
    #[must_use]
    pub fn new(parts: Vec<Bytes>) -> Parts {
        Parts(parts.into_iter())
    }
}

impl Body for Parts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.next().map(|part| Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.len() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.as_slice().iter().map(|part| part.len() as u64).sum())
    }
}

/// An open connection; dropping it closes it.
pub struct Link {
    sender: SendRequest<Parts>,
    connection: Pin<Box<http1::Connection<TokioIo<Socket>, Parts>>>,
    closed: bool,
    /// It has answered a request before this one.
    pub used: bool,
}

impl Link {
    /// # Errors
    /// hyper's, which has none here.
    pub async fn new(socket: Socket) -> hyper::Result<Link> {
        let (sender, connection) = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_BUFFER_BYTES)
            .handshake(TokioIo::new(socket))
            .await?;
        Ok(Link {
            sender,
            connection: Box::pin(connection),
            closed: false,
            used: false,
        })
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        if !self.closed {
            // What went wrong is told by the request or the body that it happened to.
            self.closed = self.connection.as_mut().poll(cx).is_ready();
        }
    }

    /// Whether it can take a request now; an upstream that has closed it is noticed here.
    pub fn is_ready(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx);
        !self.closed && self.sender.is_ready()
    }

    /// The same, where no task waits.
    pub fn is_ready_now(&mut self) -> bool {
        self.is_ready(&mut Context::from_waker(Waker::noop()))
    }

    /// # Errors
    /// The connection broke, or what came is no HTTP.
    pub async fn send(&mut self, request: Request<Parts>) -> hyper::Result<Response<Incoming>> {
        let mut response = std::pin::pin!(self.sender.send_request(request));
        std::future::poll_fn(|cx| {
            if let Poll::Ready(response) = response.as_mut().poll(cx) {
                return Poll::Ready(response);
            }
            if !self.closed {
                self.closed = self.connection.as_mut().poll(cx).is_ready();
            }
            response.as_mut().poll(cx)
        })
        .await
    }

    /// The next part of the answer's body.
    pub fn poll_data(
        &mut self,
        body: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Bytes>>> {
        loop {
            // The first poll tells the connection that more is wanted, and the second takes what it then read.
            let mut frame = Pin::new(&mut *body).poll_frame(cx);
            if frame.is_pending() {
                self.drive(cx);
                frame = Pin::new(&mut *body).poll_frame(cx);
            }
            return match frame {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => Poll::Ready(Some(Ok(data))),
                    // Trailers.
                    Err(_) => continue,
                },
                Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            };
        }
    }
}
