//! The listener's thread and its life.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;
use tonic_health::server::HealthReporter;

use super::EngineInfo;
use super::bind::{Bound, bind};
use super::config::ListenerConfig;
use super::core::Core;
use super::handle::EngineHandle;
use super::service::Service;
use crate::address::Address;
use crate::proto::engine_server::EngineServer;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Serving,
    /// Send what was emitted, then end.
    Closing,
    /// End at once, as a killed process would.
    Aborted,
}

/// Serves the engine protocol on a thread of its own. Dropping it closes it.
pub struct Listener {
    core: Arc<Core>,
    address: Address,
    life: watch::Sender<Life>,
    thread: Option<thread::JoinHandle<()>>,
}

const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

impl Listener {
    /// Binds and serves with the default limits. A taken address is `AddrInUse`; a model without vocabulary or
    /// length is `InvalidInput`.
    pub fn start(address: &Address, info: EngineInfo) -> io::Result<(Listener, EngineHandle)> {
        Self::start_with(address, info, ListenerConfig::default())
    }

    pub fn start_with(
        address: &Address,
        info: EngineInfo,
        config: ListenerConfig,
    ) -> io::Result<(Listener, EngineHandle)> {
        for (field, value) in [
            ("vocab_size", info.vocab_size),
            ("max_model_len", info.max_model_len),
            ("max_num_seqs", info.max_num_seqs),
        ] {
            if value == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("{field} is 0; at least 1 is needed"),
                ));
            }
        }
        let (bound, address) = bind(address)?;
        let core = Core::new(info, config);
        let (life, lives) = watch::channel(Life::Serving);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let serving = core.clone();
        let thread = thread::Builder::new()
            .name("scalellm-link".to_owned())
            .spawn(move || run(&runtime, serving, bound, lives))?;
        let handle = EngineHandle { core: core.clone() };
        Ok((
            Listener {
                core,
                address,
                life,
                thread: Some(thread),
            },
            handle,
        ))
    }

    /// The bound address, with the real port where 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Stops listening, sends what was emitted for at most `flush_timeout`, and joins the thread.
    pub fn close(mut self) {
        self.end(Life::Closing);
    }

    /// Breaks every connection at once and joins the thread, as if the process had been killed.
    pub fn abort(mut self) {
        self.end(Life::Aborted);
    }

    fn end(&mut self, life: Life) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.core.close();
        self.life.send_replace(life);
        if thread.join().is_err() {
            tracing::error!("the listener's thread panicked");
        }
        if life == Life::Closing
            && let Address::Unix(path) = &self.address
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %error, "the socket was not removed");
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.end(Life::Closing);
    }
}

fn run(runtime: &Runtime, core: Arc<Core>, bound: Bound, lives: watch::Receiver<Life>) {
    runtime.block_on(async {
        let served = match bound {
            Bound::Unix(listener) => match UnixListener::from_std(listener) {
                Ok(listener) => serve(core, UnixListenerStream::new(listener), lives).await,
                Err(error) => Err(error.into()),
            },
            Bound::Tcp(listener) => match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let incoming = TcpListenerStream::new(listener).map(|socket| {
                        let socket = socket?;
                        socket.set_nodelay(true)?;
                        Ok(socket)
                    });
                    serve(core, incoming, lives).await
                }
                Err(error) => Err(error.into()),
            },
        };
        if let Err(error) = served {
            tracing::error!(%error, "the listener ended");
        }
    });
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn serve<S>(
    core: Arc<Core>,
    incoming: impl futures_util::Stream<Item = io::Result<S>>,
    mut lives: watch::Receiver<Life>,
) -> Result<(), BoxError>
where
    S: tokio::io::AsyncRead
        + tokio::io::AsyncWrite
        + tonic::transport::server::Connected
        + Unpin
        + Send
        + 'static,
{
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status(LOOP, tonic_health::ServingStatus::NotServing)
        .await;
    let engine = EngineServer::new(Service { core: core.clone() })
        .max_decoding_message_size(core.config.max_message_bytes);
    let mut closing = lives.clone();
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(core.config.keepalive_interval))
        .max_concurrent_streams(64)
        .add_service(health_service)
        .add_service(engine)
        .serve_with_incoming_shutdown(incoming, async move {
            // An error means that the listener itself is gone: the same.
            let _ = closing.wait_for(|life| *life != Life::Serving).await;
        });
    let flush_timeout = core.config.flush_timeout;
    let ended = async {
        let aborted = lives
            .wait_for(|life| *life != Life::Serving)
            .await
            .is_ok_and(|life| *life == Life::Aborted);
        if !aborted {
            tokio::time::sleep(flush_timeout).await;
        }
    };
    tokio::select! {
        served = server => served.map_err(BoxError::from),
        () = ended => Ok(()),
        () = tick(&core, &health) => Ok(()),
    }
}

/// What the health service says of the loop: the listener's thread would answer while it hangs.
const LOOP: &str = "loop";

/// Load frames, lost sessions and the health service's answers: `loop` for whether the process is of use, the
/// protocol's name and the empty one for whether it takes requests. Never ends.
async fn tick(core: &Core, health: &HealthReporter) {
    let mut draining = false;
    let mut looping = false;
    health.set_serving::<EngineServer<Service>>().await;
    let mut interval =
        tokio::time::interval((core.config.load_interval / 2).max(Duration::from_millis(1)));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut even = false;
    loop {
        interval.tick().await;
        core.reap();
        even = !even;
        if even {
            core.load_is_due();
        }
        if core.is_looping() != looping {
            looping = !looping;
            let status = match looping {
                true => tonic_health::ServingStatus::Serving,
                false => tonic_health::ServingStatus::NotServing,
            };
            health.set_service_status(LOOP, status).await;
        }
        if core.is_draining() && !draining {
            draining = true;
            health.set_not_serving::<EngineServer<Service>>().await;
            health
                .set_service_status("", tonic_health::ServingStatus::NotServing)
                .await;
        }
    }
}
