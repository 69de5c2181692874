//! The gateway's settings: one TOML document, checked whole before anything starts.

use std::path::PathBuf;
use std::time::Duration;

use scalellm_engine_link::ReplicaConfig;
use serde::{Deserialize, Serialize};

use crate::error::GatewayError;

mod check;
mod faults;
mod fixed;
mod model;
pub mod safety;
pub mod upstream;

pub use faults::FaultConfig;
pub use model::ModelConfig;
pub use upstream::UpstreamConfig;

/// Everything that `run_gateway` reads. Unknown keys are refused, so that a typo is not a silent default.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub host: String,
    /// 0 takes a free port.
    pub port: u16,
    /// Listens there too.
    pub unix_socket: Option<PathBuf>,
    /// Certificate chain and private key, in PEM; with them clients speak TLS.
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// Clients must present one of these as `Authorization: Bearer KEY`; empty lets everybody in.
    pub api_keys: Vec<String>,
    /// Keys, quotas and usage: `postgres://...`, `sqlite:PATH`, `sqlite` for a file in the user's data folder; absent for
    /// none of them.
    pub database_url: Option<String>,
    /// What known keys may do while that database does not answer.
    pub database_down: DatabaseDown,
    /// Longest wait of a request for the database.
    pub database_timeout_s: f64,
    /// A gateway that the database has not heard of for this long loses its slices of budgets.
    pub lease_s: f64,
    /// Usage is written this often: what a killed gateway loses.
    pub usage_interval_s: f64,
    /// For `/admin/v1`; while there is none it answers this machine alone.
    pub admin_keys: Vec<String>,
    pub max_body_bytes: usize,
    /// Of all request bodies that are being read and parsed; while it is taken, further ones get 503.
    pub max_body_memory_bytes: usize,
    /// Choices of one model that are generated at the same time; further requests wait for their turn.
    pub max_in_flight: usize,
    /// Places for each of the requests that the engines compute at once: more than one, so that the engines find work
    /// when requests end, and few, so that the order of the queue here counts.
    pub places_per_slot: f64,
    /// Requests of one model that wait for their turn; further ones get 503 with Retry-After, batch work first.
    pub max_queued: usize,
    /// Of the places, the share that batch work may have.
    pub batch_share: f64,
    pub max_connections: usize,
    /// How long running requests may go on after SIGTERM.
    pub drain_timeout_s: f64,
    /// Longest life of one request; 0 is no limit. `deadline_ms` in a request can only shorten it.
    pub request_timeout_s: f64,
    /// A connection that has not sent a whole request head by then is closed.
    pub header_timeout_s: f64,
    /// A request body that has not arrived by then gets 408.
    pub body_timeout_s: f64,
    /// A client that reads nothing for this long is dropped.
    pub write_timeout_s: f64,
    /// A replica whose loop has not come round for this long is hung: its requests end, and it gets no new ones.
    pub replica_hung_after_s: f64,
    /// A connection to a replica on which nothing at all came for this long is lost.
    pub replica_silence_s: f64,
    /// Threads for templates and tokenising; 0 is one for every two cores, at least one.
    pub text_threads: usize,
    /// Prompts that wait for one of those threads; further ones get 503.
    pub text_queue: usize,
    /// Memory of each model for the ids of texts seen before; 0 encodes every text anew.
    pub text_cache_bytes: usize,
    /// What happens when a replica fails.
    pub faults: FaultConfig,
    /// Collector of OpenTelemetry traces, by OTLP over HTTP: `http://HOST:4318`.
    pub otlp_endpoint: Option<String>,
    /// Of the requests whose client says nothing of tracing, the share that is traced.
    pub otlp_sample_ratio: f64,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
    pub models: Vec<ModelConfig>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// What requests of known keys may do while the database does not answer. Keys that were not seen lately are refused
/// either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatabaseDown {
    /// Go on; what they use is charged afterwards.
    Open,
    /// Go on while what is leased lasts, then get 503.
    Closed,
}

/// The least severity that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warning,
    Info,
    Debug,
    Trace,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            unix_socket: None,
            tls_cert: None,
            tls_key: None,
            api_keys: Vec::new(),
            database_url: None,
            database_down: DatabaseDown::Open,
            database_timeout_s: 2.0,
            lease_s: 30.0,
            usage_interval_s: 1.0,
            admin_keys: Vec::new(),
            max_body_bytes: 16 << 20,
            max_body_memory_bytes: 1 << 30,
            max_in_flight: 2048,
            places_per_slot: 2.0,
            max_queued: 1024,
            batch_share: 0.75,
            max_connections: 16384,
            drain_timeout_s: 30.0,
            request_timeout_s: 3600.0,
            header_timeout_s: 30.0,
            body_timeout_s: 60.0,
            write_timeout_s: 60.0,
            replica_hung_after_s: 5.0,
            replica_silence_s: 2.0,
            text_threads: 0,
            text_queue: 2048,
            text_cache_bytes: 64 << 20,
            faults: FaultConfig::default(),
            otlp_endpoint: None,
            otlp_sample_ratio: 1.0,
            log_level: LogLevel::Info,
            log_format: LogFormat::Text,
            models: Vec::new(),
        }
    }
}

impl Config {
    /// Reads and checks a TOML document, without the environment.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn from_toml(text: &str) -> Result<Config, GatewayError> {
        Config::with_secrets(text, |_| None)
    }

    /// The same, and takes secrets that the document leaves out from the environment: `SCALELLM_API_KEY` and
    /// `SCALELLM_ADMIN_KEY` (several with commas), `SCALELLM_DATABASE_URL`.
    ///
    /// # Errors
    /// As `from_toml`.
    pub fn read(text: &str) -> Result<Config, GatewayError> {
        Config::with_secrets(text, |name| std::env::var(name).ok())
    }

    fn with_secrets(
        text: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Config, GatewayError> {
        let mut config: Config = toml::from_str(text)
            .map_err(|e| GatewayError::Config(e.to_string().trim_end().to_owned()))?;
        for (keys, name) in [
            (&mut config.api_keys, "SCALELLM_API_KEY"),
            (&mut config.admin_keys, "SCALELLM_ADMIN_KEY"),
        ] {
            if keys.is_empty() {
                let given = variable(name).unwrap_or_default();
                let given = given.split(',').map(str::trim);
                keys.extend(given.filter(|key| !key.is_empty()).map(str::to_owned));
            }
        }
        if config.database_url.is_none() {
            config.database_url = variable("SCALELLM_DATABASE_URL").filter(|url| !url.is_empty());
        }
        config.validate()?;
        Ok(config)
    }

    /// Settings of keys, quotas and usage; `None` without a database.
    #[must_use]
    pub fn accounts(&self) -> Option<scalellm_accounts::Settings> {
        let seconds = Duration::from_secs_f64;
        Some(scalellm_accounts::Settings {
            database_url: self.database_url.clone()?,
            when_down: match self.database_down {
                DatabaseDown::Open => scalellm_accounts::WhenDown::Open,
                DatabaseDown::Closed => scalellm_accounts::WhenDown::Closed,
            },
            timeout: seconds(self.database_timeout_s),
            lease: seconds(self.lease_s),
            usage_interval: seconds(self.usage_interval_s),
            ..scalellm_accounts::Settings::default()
        })
    }

    #[must_use]
    pub fn text_threads(&self) -> usize {
        match self.text_threads {
            0 => std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2)),
            threads => threads,
        }
    }

    #[must_use]
    pub fn replica(&self) -> ReplicaConfig {
        ReplicaConfig {
            hung_after: Duration::from_secs_f64(self.replica_hung_after_s),
            peer_silence: Duration::from_secs_f64(self.replica_silence_s),
            ..ReplicaConfig::default()
        }
    }

    #[must_use]
    pub fn request_timeout(&self) -> Option<Duration> {
        (self.request_timeout_s > 0.0).then(|| Duration::from_secs_f64(self.request_timeout_s))
    }
}
