//! Starting and ending: as a process, or inside a test.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tracing_subscriber::filter::LevelFilter;

use crate::app::{App, Phase};
use crate::config::{Config, LogFormat, LogLevel};
use crate::error::GatewayError;
use crate::{routes, server};

/// A running gateway. Dropping it stops it at once.
pub struct Gateway {
    app: Arc<App>,
    address: SocketAddr,
    task: Option<JoinHandle<()>>,
}

impl Gateway {
    /// Binds, loads the models' tokenizers, starts connecting to the replicas and serves.
    ///
    /// # Errors
    /// A taken port, a bad model folder, a bad setting.
    pub async fn start(config: Config) -> Result<Gateway, GatewayError> {
        config.validate()?;
        // The port first: a second server on it should fail before it has loaded anything.
        let (listener, address) = server::bind(&config.host, config.port).await?;
        let app = App::start(config)?;
        let router = routes::router(Arc::clone(&app));
        let task = tokio::spawn(server::run(Arc::clone(&app), listener, router));
        Ok(Gateway {
            app,
            address,
            task: Some(task),
        })
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Refuses new requests from now on, and ends when the running ones have.
    pub fn drain(&self) {
        self.app.enter(Phase::Draining);
    }

    /// Ends running requests with an error, then itself.
    pub fn stop(&self) {
        self.app.enter(Phase::Stopping);
    }

    /// HTTP requests whose response has not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.app.in_flight()
    }

    /// Waits for the end that `drain` or `stop` asked for.
    pub async fn ended(&mut self) {
        if let Some(task) = self.task.take()
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the server's task failed");
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Serves until SIGTERM or SIGINT has drained it; a second signal ends it at once. Blocks.
///
/// # Errors
/// As [`Gateway::start`].
pub fn serve(config: Config) -> Result<(), GatewayError> {
    config.validate()?;
    start_log(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("gateway")
        .build()?;
    runtime.block_on(async {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut terminations = signal(SignalKind::terminate())?;
        let mut gateway = Gateway::start(config).await?;
        tracing::info!(address = %gateway.address(), "listening");
        let app = Arc::clone(&gateway.app);
        let signals = async {
            for phase in [Phase::Draining, Phase::Stopping] {
                tokio::select! {
                    _ = interrupts.recv() => {}
                    _ = terminations.recv() => {}
                }
                app.enter(phase);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = gateway.ended() => {}
            () = signals => {}
        }
        tracing::info!("ended");
        Ok(())
    })
}

/// Sends the process's log to standard error.
fn start_log(config: &Config) {
    let level = match config.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr);
    // Where the process has a log already, that one is kept.
    let _ = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
