//! From an address to a gRPC channel over one socket.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint, Uri};

use super::config::ReplicaConfig;
use super::socket::{Link, Socket};
use crate::address::Address;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ConnectError {
    /// Nobody listens: the engine's process is gone.
    Dead(String),
    /// Anything else: it may pass.
    Failed(String),
}

impl ConnectError {
    pub(super) fn reason(&self) -> &str {
        let (ConnectError::Dead(reason) | ConnectError::Failed(reason)) = self;
        reason
    }
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                Self::Dead(error.to_string())
            }
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Windows large enough that a step's frame or a prompt's chunk never waits for an update.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Of what is read of a file with an address.
const MAX_ADDRESS_BYTES: u64 = 1024;

/// Connects one socket and makes a channel of it. The channel never reconnects by itself, so that the session
/// knows what became of its peer; it ends with its link.
pub(super) async fn open(
    address: &Address,
    config: &ReplicaConfig,
) -> Result<(Channel, Link), ConnectError> {
    let connected = async {
        let found;
        let address = match address {
            Address::File(path) => {
                found = written(path).await?;
                &found
            }
            known => known,
        };
        match address {
            Address::Unix(path) => over(UnixStream::connect(path).await?, config).await,
            Address::Tcp(host_port) => {
                let socket = TcpStream::connect(host_port.as_str()).await?;
                socket.set_nodelay(true)?;
                over(socket, config).await
            }
            Address::File(_) => Err(ConnectError::Failed(
                "the file names another file".to_owned(),
            )),
        }
    };
    match tokio::time::timeout(config.connect_timeout, connected).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Failed(format!(
            "no connection within {:?}",
            config.connect_timeout
        ))),
    }
}

/// The address in a file. What else may be in it is nobody's to see.
async fn written(path: &Path) -> Result<Address, ConnectError> {
    let mut text = String::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(MAX_ADDRESS_BYTES)
        .read_to_string(&mut text)
        .await?;
    text.trim()
        .parse()
        .map_err(|_| ConnectError::Failed("there is no address in the file".to_owned()))
}

async fn over<T>(socket: T, config: &ReplicaConfig) -> Result<(Channel, Link), ConnectError>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (socket, link) = Socket::new(socket);
    let only_once = Arc::new(Mutex::new(Some(TokioIo::new(socket))));
    let connector = tower::service_fn(move |_: Uri| {
        let socket = only_once.lock().take();
        async move { socket.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    });
    let channel = Endpoint::from_static("http://engine")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.peer_silence)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| ConnectError::Failed(full_message(&error)))?;
    Ok((channel, link))
}

/// An error with its causes.
pub(super) fn full_message(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message.push_str(": ");
        message.push_str(&cause.to_string());
        source = cause.source();
    }
    message
}

/// Waits between attempts: doubled each time, each drawn between half and the whole, so that many gateways do
/// not come back in step.
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) fn new(config: &ReplicaConfig, address: &Address) -> Self {
        let min = config.backoff_min.max(Duration::from_millis(1));
        let max = match address {
            Address::Unix(_) => config.backoff_max.min(config.backoff_max_here),
            Address::Tcp(_) | Address::File(_) => config.backoff_max,
        };
        Self {
            min,
            max: max.max(min),
            next: min,
        }
    }

    pub(super) fn reset(&mut self) {
        self.next = self.min;
    }

    pub(super) fn wait(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.max);
        whole.mul_f64(rand::random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_limit_and_starts_again() {
        let config = ReplicaConfig {
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_millis(350),
            backoff_max_here: Duration::from_millis(150),
            ..ReplicaConfig::default()
        };
        let elsewhere = Address::Tcp("engine:1".to_owned());
        let here = Address::Unix("/run/engine".into());
        for (address, waits_ms) in [
            (elsewhere, [100, 200, 350, 350]),
            (here, [100, 150, 150, 150]),
        ] {
            let mut backoff = Backoff::new(&config, &address);
            for whole_ms in waits_ms {
                let wait = backoff.wait();
                let whole = Duration::from_millis(whole_ms);
                assert!(wait <= whole && wait >= whole / 2, "{wait:?} of {whole:?}");
            }
            backoff.reset();
            assert!(backoff.wait() <= Duration::from_millis(100));
        }
    }
}
