//! The process's log, on standard error, and the level that it can be set to while it runs.

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt};

use crate::config::{Config, LogFormat, LogLevel};

/// Sets the log's level; without a log of its own, as inside a test, it does nothing.
#[derive(Debug, Clone, Default)]
pub struct Log(Option<Handle<LevelFilter, Registry>>);

impl Log {
    /// Sends the process's log to standard error.
    #[must_use]
    pub fn start(config: &Config) -> Log {
        let (level, handle) = reload::Layer::new(filter(config.log_level));
        let registry = tracing_subscriber::registry().with(level);
        // What cannot be written, as on a full disk, is lost: told on standard error too, it would be a panic.
        let lines = fmt::layer()
            .with_writer(std::io::stderr)
            .log_internal_errors(false);
        // Where the process has a log already, that one is kept.
        let started = match config.log_format {
            LogFormat::Text => registry.with(lines).try_init(),
            LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
        };
        Log(started.is_ok().then_some(handle))
    }

    pub fn set(&self, level: LogLevel) {
        if let Some(handle) = &self.0 {
            // It fails only when the log is gone.
            let _ = handle.reload(filter(level));
        }
    }
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}
