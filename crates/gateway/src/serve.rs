//! Starting and ending: as a process, or inside a test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::app::{App, Phase};
use crate::config::Config;
use crate::error::GatewayError;
use crate::log::Log;
use crate::reload::Changes;
use crate::routes;
use crate::server::{self, Listeners};

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
        Gateway::start_from(config, None, Log::default()).await
    }

    /// The same; `path` is the file that a reload reads.
    ///
    /// # Errors
    /// As `start`.
    pub async fn start_from(
        config: Config,
        path: Option<PathBuf>,
        log: Log,
    ) -> Result<Gateway, GatewayError> {
        config.validate()?;
        // The port first: a second server on it should fail before it has loaded anything.
        let (listeners, address) = Listeners::bind(&config).await?;
        let app = App::start(config, Changes::new(path), log)?;
        let router = routes::router(Arc::clone(&app));
        let task = tokio::spawn(server::run(Arc::clone(&app), listeners, router));
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

/// Serves until SIGTERM or SIGINT has drained it; a second signal ends it at once. SIGHUP has it read `path` again.
/// Blocks.
///
/// # Errors
/// As [`Gateway::start`].
pub fn serve(config: Config, path: Option<PathBuf>) -> Result<(), GatewayError> {
    config.validate()?;
    let log = Log::start(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("gateway")
        .build()?;
    runtime.block_on(async {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut terminations = signal(SignalKind::terminate())?;
        let mut hangups = signal(SignalKind::hangup())?;
        let mut gateway = Gateway::start_from(config, path, log).await?;
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
        let reloads = async {
            while hangups.recv().await.is_some() {
                if let Err(error) = app.changes.reload(&app).await {
                    tracing::error!(%error, "nothing was reloaded");
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = gateway.ended() => {}
            () = signals => {}
            () = reloads => {}
        }
        tracing::info!("ended");
        Ok(())
    })
}
