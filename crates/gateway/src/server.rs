//! Accepts connections, speaks HTTP/1.1 and HTTP/2 on them (by prior knowledge, or ALPN), and ends them in order.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use crate::app::{App, Phase};
use crate::config::Config;
use crate::connection::{ArrivingBody, ClientSocket, ConnectionState};
use crate::error::GatewayError;
use crate::http2::Streams;
use crate::memory;
use crate::socket::Socket;

const MAX_HEAD_BYTES: usize = 64 << 10;
const MAX_STREAMS_PER_CONNECTION: u32 = 256;
/// What pings write between two looks at an idle connection is less.
const LITTLE_BYTES: u64 = 1024;
const HTTP2_PING: Duration = Duration::from_secs(20);
/// After the last request has ended, connections may take this long to close.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);
/// After running requests were told to stop, they may take this long to say so to their clients.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// Where clients come in.
pub struct Listeners {
    tcp: TcpListener,
    unix: Option<BoundSocket>,
}

/// A Unix socket's listener, whose file goes with it.
struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

enum Arrived {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listeners {
    /// Binds what is configured, and tells the TCP address.
    ///
    /// # Errors
    /// `GatewayError::Bind` with the address.
    pub async fn bind(config: &Config) -> Result<(Listeners, SocketAddr), GatewayError> {
        let (host, port) = (&config.host, config.port);
        let address = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        let bound = async {
            let listener = TcpListener::bind(&address).await?;
            let local = listener.local_addr()?;
            Ok((listener, local))
        };
        let (tcp, local) = bound
            .await
            .map_err(|source| GatewayError::Bind { address, source })?;
        let unix = match &config.unix_socket {
            None => None,
            Some(path) => Some(bind_unix(path).await.map_err(|source| GatewayError::Bind {
                address: format!("unix_socket {}", path.display()),
                source,
            })?),
        };
        Ok((Listeners { tcp, unix }, local))
    }

    /// The next client, once there is a place for it.
    async fn accept(&self, places: &Arc<Semaphore>) -> io::Result<(Arrived, OwnedSemaphorePermit)> {
        let place = Arc::clone(places).acquire_owned().await;
        let place = place.map_err(io::Error::other)?;
        let unix = async {
            match &self.unix {
                Some(bound) => bound.listener.accept().await,
                None => std::future::pending().await,
            }
        };
        let arrived = tokio::select! {
            accepted = self.tcp.accept() => accepted.map(|(tcp, peer)| Arrived::Tcp(tcp, peer)),
            accepted = unix => accepted.map(|(unix, _)| Arrived::Unix(unix)),
        };
        Ok((arrived?, place))
    }
}

/// Binds a Unix socket, in the place of one that a dead process has left.
async fn bind_unix(path: &Path) -> io::Result<BoundSocket> {
    let is_left_over = match UnixStream::connect(path).await {
        Ok(_) => false,
        // A file that is no socket refuses too, and stays.
        Err(error) => {
            error.kind() == io::ErrorKind::ConnectionRefused
                && std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
        }
    };
    if is_left_over {
        std::fs::remove_file(path)?;
    }
    Ok(BoundSocket {
        listener: UnixListener::bind(path)?,
        path: path.to_owned(),
    })
}

/// Serves until the app has drained; then every connection is closed and every replica let go.
pub async fn run(app: Arc<App>, listeners: Listeners, router: Router) {
    let (close, closing) = watch::channel(false);
    let mut connections = JoinSet::new();
    {
        let drained = drained(&app);
        tokio::pin!(drained);
        let give_back = memory::give_back(&app);
        tokio::pin!(give_back);
        let places = Arc::new(Semaphore::new(
            app.live()
                .config
                .max_connections
                .min(Semaphore::MAX_PERMITS),
        ));
        loop {
            tokio::select! {
                () = &mut drained => break,
                () = &mut give_back => {}
                Some(_) = connections.join_next() => {}
                accepted = listeners.accept(&places) => match accepted {
                    Ok((arrived, place)) => {
                        connections.spawn(serve_connection(
                            Arc::clone(&app),
                            arrived,
                            router.clone(),
                            closing.clone(),
                            place,
                        ));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        // Out of file descriptors, most likely: wait for some to close.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
            }
        }
    }
    drop(listeners);
    close.send_replace(true);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    // What has not closed by then is aborted when the set is dropped.
    let _ = tokio::time::timeout(CLOSE_WITHIN, all_closed).await;
    connections.shutdown().await;
    app.changes.shutdown().await;
    app.live().fleet.shutdown().await;
    if let Some(accounts) = &app.accounts {
        accounts.shutdown().await;
    }
    if let Some(traces) = &app.traces {
        traces.shutdown().await;
    }
}

/// Waits until a drain was asked for and is over.
async fn drained(app: &App) {
    app.wait_for(Phase::Draining).await;
    let requests = app.in_flight();
    let timeout_s = app.live().config.drain_timeout_s;
    tracing::info!(requests, timeout_s, "draining: new requests are refused");
    tokio::select! {
        () = app.idle() => {}
        () = app.wait_for(Phase::Stopping) => {}
        () = tokio::time::sleep(Duration::from_secs_f64(timeout_s)) => {
            tracing::warn!(requests = app.in_flight(), "drain timeout: running requests end now");
        }
    }
    app.enter(Phase::Stopping);
    let _ = tokio::time::timeout(STOP_WITHIN, app.idle()).await;
}

/// Serves one client until it leaves; its place is free then.
async fn serve_connection(
    app: Arc<App>,
    arrived: Arrived,
    router: Router,
    mut closing: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    app.metrics.connections.fetch_add(1, Relaxed);
    app.metrics.connections_open.fetch_add(1, Relaxed);
    let _open = OpenConnection(Arc::clone(&app));
    let live = app.live();
    let write_timeout = Duration::from_secs_f64(live.config.write_timeout_s);
    let header_timeout = Duration::from_secs_f64(live.config.header_timeout_s);
    let acceptor = live.acceptor.clone();
    drop(live);
    let (socket, is_local) = match arrived {
        Arrived::Unix(unix) => (Socket::Unix(unix), true),
        Arrived::Tcp(tcp, peer) => {
            // Frames are written when they are whole; waiting for more to send would only delay tokens.
            let _ = tcp.set_nodelay(true);
            let Some(socket) = greet(tcp, acceptor, header_timeout).await else {
                return;
            };
            (socket, peer.ip().to_canonical().is_loopback())
        }
    };
    let state = ConnectionState::new(is_local);
    let mut socket = ClientSocket::new(
        socket,
        Arc::clone(&state),
        Arc::clone(&app.metrics),
        write_timeout,
    );
    let first_request_by = Instant::now() + header_timeout;
    let is_http2 = tokio::select! {
        spoken = socket.speaks_http2() => match spoken {
            Ok(is_http2) => is_http2,
            Err(error) => return tracing::debug!(%error, "connection ended early"),
        },
        () = tokio::time::sleep_until(first_request_by) => return said_nothing(),
        _ = closing.wait_for(|now| *now) => return,
    };
    let for_requests = Arc::clone(&state);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Arc::clone(&for_requests));
        let state = Arc::clone(&for_requests);
        router
            .clone()
            .oneshot(request.map(|body| Body::new(ArrivingBody::new(body, state))))
    });
    let sees_end = !is_http2 && socket.see_end();
    let socket = TokioIo::new(socket);
    if is_http2 {
        let streams = Streams {
            metrics: Arc::clone(&app.metrics),
            write_timeout,
        };
        // In a box, since every connection of HTTP/1 would have room for it otherwise.
        let mut connection = Box::pin(http2(streams).serve_connection(socket, service));
        let idle_limit = Some(header_timeout);
        drive(
            connection.as_mut(),
            &state,
            first_request_by,
            idle_limit,
            closing,
        )
        .await;
    } else {
        let mut builder = http1(header_timeout);
        let builder = builder.half_close(sees_end);
        let connection = pin!(builder.serve_connection(socket, service));
        drive(connection, &state, first_request_by, None, closing).await;
    }
}

fn said_nothing() {
    tracing::debug!("connection closed: no request came within header_timeout_s");
}

/// Runs a connection to its end, which comes soon once `closing` says so, or when it had no request for `idle_limit`
/// (in HTTP/1 hyper looks for that itself).
async fn drive<C>(
    mut connection: Pin<&mut C>,
    state: &ConnectionState,
    first_request_by: Instant,
    idle_limit: Option<Duration>,
    mut closing: watch::Receiver<bool>,
) where
    C: GracefulConnection<Error = hyper::Error>,
{
    let mut look_at = Some(first_request_by);
    let mut idle_after = None;
    let mut wrote_bytes = 0;
    let mut told_as_idle = false;
    let mut told_to_close = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended early");
                }
                return;
            }
            () = tokio::time::sleep_until(look_at.unwrap_or(first_request_by)), if look_at.is_some() => {
                if state.requests.load(Relaxed) == 0 {
                    return said_nothing();
                }
                let idle_before = std::mem::replace(&mut idle_after, state.idle_after());
                if idle_after.is_some() && idle_after == idle_before {
                    // What is left of an answer may still be on its way, but pings alone are no way.
                    if told_as_idle && state.wrote_bytes() < wrote_bytes + LITTLE_BYTES {
                        return;
                    }
                    told_as_idle = true;
                    connection.as_mut().graceful_shutdown();
                }
                wrote_bytes = state.wrote_bytes();
                look_at = idle_limit.map(|limit| Instant::now() + limit);
            }
            _ = closing.wait_for(|now| *now), if !told_to_close => {
                told_to_close = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Begins TLS, where clients are to speak it; `None` if it does not come about in time.
async fn greet(tcp: TcpStream, acceptor: Option<TlsAcceptor>, limit: Duration) -> Option<Socket> {
    let Some(acceptor) = acceptor else {
        return Some(Socket::Tcp(tcp));
    };
    // In a box, since connections without TLS would have room for it otherwise.
    let greeting = Box::pin(acceptor.accept(tcp));
    match tokio::time::timeout(limit, greeting).await {
        Ok(Ok(stream)) => Some(Socket::Tls(Box::new(stream.into()))),
        Ok(Err(error)) => {
            tracing::debug!(%error, "no TLS");
            None
        }
        Err(_) => {
            tracing::debug!("connection closed: no TLS within header_timeout_s");
            None
        }
    }
}

struct OpenConnection(Arc<App>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.metrics.connections_open.fetch_sub(1, Relaxed);
    }
}

fn http1(header_timeout: Duration) -> http1::Builder {
    let mut builder = http1::Builder::new();
    // Its own limit of 100 headers is as good as any, and set here it would fill as many for each request.
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(MAX_HEAD_BYTES);
    builder
}

fn http2(streams: Streams) -> http2::Builder<Streams> {
    let mut builder = http2::Builder::new(streams);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .keep_alive_interval(HTTP2_PING)
        .keep_alive_timeout(HTTP2_PING);
    builder
}
