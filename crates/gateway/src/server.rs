//! Accepts connections, speaks HTTP/1.1 and HTTP/2 (prior knowledge) on them, and ends them in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

use crate::app::{App, Phase};
use crate::connection::{ClientSocket, ConnectionState};
use crate::error::GatewayError;

const MAX_HEADERS: usize = 100;
const MAX_HEAD_BYTES: usize = 64 << 10;
const MAX_STREAMS_PER_CONNECTION: u32 = 256;
const HTTP2_PING: Duration = Duration::from_secs(20);
/// After the last request has ended, connections may take this long to close.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);
/// After running requests were told to stop, they may take this long to say so to their clients.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// Binds the configured address.
///
/// # Errors
/// `GatewayError::Bind` with the address.
pub async fn bind(host: &str, port: u16) -> Result<(TcpListener, SocketAddr), GatewayError> {
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
    bound
        .await
        .map_err(|source| GatewayError::Bind { address, source })
}

/// Serves until the app has drained; then every connection is closed and every replica let go.
pub async fn run(app: Arc<App>, listener: TcpListener, router: Router) {
    let (close, closing) = watch::channel(false);
    let mut connections = JoinSet::new();
    {
        let drained = drained(&app);
        tokio::pin!(drained);
        let places = Arc::new(Semaphore::new(
            app.config.max_connections.min(Semaphore::MAX_PERMITS),
        ));
        loop {
            let accept = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (listener.accept().await, place)
            };
            tokio::select! {
                () = &mut drained => break,
                Some(_) = connections.join_next() => {}
                (accepted, place) = accept => match accepted {
                    Ok((tcp, peer)) => {
                        let connection = serve_connection(Arc::clone(&app), tcp, peer, router.clone(), closing.clone());
                        connections.spawn(async move {
                            connection.await;
                            drop(place);
                        });
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
    drop(listener);
    close.send_replace(true);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    // What has not closed by then is aborted when the set is dropped.
    let _ = tokio::time::timeout(CLOSE_WITHIN, all_closed).await;
    connections.shutdown().await;
    app.fleet.shutdown().await;
    if let Some(accounts) = &app.accounts {
        accounts.shutdown().await;
    }
}

/// Waits until a drain was asked for and is over.
async fn drained(app: &App) {
    app.wait_for(Phase::Draining).await;
    let requests = app.in_flight();
    let timeout_s = app.config.drain_timeout_s;
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

async fn serve_connection(
    app: Arc<App>,
    tcp: TcpStream,
    peer: SocketAddr,
    router: Router,
    mut closing: watch::Receiver<bool>,
) {
    // Frames are written when they are whole; waiting for more to send would only delay tokens.
    let _ = tcp.set_nodelay(true);
    app.metrics.connections.fetch_add(1, Relaxed);
    app.metrics.connections_open.fetch_add(1, Relaxed);
    let open = OpenConnection(Arc::clone(&app));
    let state = ConnectionState::new(peer.ip().to_canonical().is_loopback());
    let write_timeout = Duration::from_secs_f64(app.config.write_timeout_s);
    let header_timeout = Duration::from_secs_f64(app.config.header_timeout_s);
    let socket = ClientSocket::new(
        tcp,
        Arc::clone(&state),
        Arc::clone(&app.metrics),
        write_timeout,
    );
    let for_requests = Arc::clone(&state);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Arc::clone(&for_requests));
        router.clone().oneshot(request.map(Body::new))
    });
    let builder = protocol(header_timeout);
    let connection = builder.serve_connection(TokioIo::new(socket), service);
    tokio::pin!(connection);
    let first_request_by = tokio::time::sleep(header_timeout);
    tokio::pin!(first_request_by);
    let mut waiting_for_first = true;
    let mut told_to_close = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended early");
                }
                break;
            }
            () = first_request_by.as_mut(), if waiting_for_first => {
                waiting_for_first = false;
                if state.requests.load(Relaxed) == 0 {
                    tracing::debug!("connection closed: no request came within header_timeout_s");
                    break;
                }
            }
            _ = closing.wait_for(|now| *now), if !told_to_close => {
                told_to_close = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
    drop(open);
}

struct OpenConnection(Arc<App>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.metrics.connections_open.fetch_sub(1, Relaxed);
    }
}

fn protocol(header_timeout: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .keep_alive_interval(HTTP2_PING)
        .keep_alive_timeout(HTTP2_PING);
    builder
}
