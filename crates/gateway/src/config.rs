//! The gateway's settings: one TOML document, checked whole before anything starts.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use scalellm_engine_link::{Address, ReplicaConfig};
use scalellm_routing::Policy;
use serde::{Deserialize, Serialize};

use crate::error::GatewayError;
use crate::fault_config::FaultConfig;
use crate::traces;

pub mod upstream;

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

/// One served model and who computes it: replicas of our own, servers elsewhere, or these while none of those is ready.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    pub name: String,
    pub aliases: Vec<String>,
    /// Folder with the tokenizer's files, for the replicas.
    pub path: PathBuf,
    /// `unix:/path` or `host:port`.
    pub replicas: Vec<String>,
    pub upstreams: Vec<UpstreamConfig>,
    /// Of both, those that get no new requests; set through `/admin/v1` alone.
    #[serde(skip)]
    pub drained: Vec<String>,
    /// Lowers the engines' own limit.
    pub max_model_len: Option<u32>,
    /// File with a chat template that replaces the folder's.
    pub chat_template: Option<PathBuf>,
    /// How a replica is chosen: `prefix`, `least-load`, `shape` or `session`.
    pub routing: String,
    /// Where a controller writes the shape of its replicas down, for `/admin/v1/blueprint`.
    pub blueprint_file: Option<PathBuf>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            name: String::new(),
            aliases: Vec::new(),
            path: PathBuf::new(),
            replicas: Vec::new(),
            upstreams: Vec::new(),
            max_model_len: None,
            chat_template: None,
            drained: Vec::new(),
            routing: Policy::Prefix.name().to_owned(),
            blueprint_file: None,
        }
    }
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

    /// Checks what the types do not.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn validate(&self) -> Result<(), GatewayError> {
        let bad = |message: String| Err(GatewayError::Config(message));
        for (name, value, low) in [
            ("max_body_bytes", self.max_body_bytes, 1024),
            (
                "max_body_memory_bytes",
                self.max_body_memory_bytes,
                self.max_body_bytes,
            ),
            ("max_in_flight", self.max_in_flight, 1),
            ("max_connections", self.max_connections, 1),
            ("text_queue", self.text_queue, 1),
        ] {
            if value < low {
                return bad(format!("{name}: got {value}, allowed is {low} or more"));
            }
        }
        for (name, value, positive) in [
            ("drain_timeout_s", self.drain_timeout_s, false),
            ("request_timeout_s", self.request_timeout_s, false),
            ("header_timeout_s", self.header_timeout_s, true),
            ("body_timeout_s", self.body_timeout_s, true),
            ("write_timeout_s", self.write_timeout_s, true),
            ("replica_hung_after_s", self.replica_hung_after_s, true),
            ("replica_silence_s", self.replica_silence_s, true),
            ("database_timeout_s", self.database_timeout_s, true),
            ("lease_s", self.lease_s, true),
            ("usage_interval_s", self.usage_interval_s, true),
        ] {
            let allowed = (0.0..=1e7).contains(&value) && !(positive && value == 0.0);
            if !allowed {
                let least = if positive { "more than 0" } else { "0" };
                return bad(format!(
                    "{name}: got {value}, allowed is {least} to 1e7 seconds"
                ));
            }
        }
        for (name, keys) in [
            ("api_keys", &self.api_keys),
            ("admin_keys", &self.admin_keys),
        ] {
            if keys
                .iter()
                .any(|key| key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()))
            {
                return bad(format!(
                    "{name}: every key must be visible ASCII and not empty"
                ));
            }
        }
        if !(self.batch_share > 0.0 && self.batch_share <= 1.0) {
            return bad(format!(
                "batch_share: got {}, allowed is more than 0 to 1",
                self.batch_share
            ));
        }
        if !(1.0..=1000.0).contains(&self.places_per_slot) {
            return bad(format!(
                "places_per_slot: got {}, allowed is 1 to 1000",
                self.places_per_slot
            ));
        }
        if !(0.0..=1.0).contains(&self.otlp_sample_ratio) {
            return bad(format!(
                "otlp_sample_ratio: got {}, allowed is 0 to 1",
                self.otlp_sample_ratio
            ));
        }
        if let Some(endpoint) = &self.otlp_endpoint {
            traces::check_endpoint(endpoint)?;
        }
        for (there, absent, given, missing) in [
            (&self.tls_cert, &self.tls_key, "tls_cert", "tls_key"),
            (&self.tls_key, &self.tls_cert, "tls_key", "tls_cert"),
        ] {
            if there.is_some() && absent.is_none() {
                return bad(format!("{missing}: missing, needed with {given}"));
            }
        }
        self.faults.check().map_err(GatewayError::Config)?;
        if self.models.is_empty() {
            return bad("models: at least one [[models]] is needed".to_owned());
        }
        let mut names = std::collections::HashSet::new();
        for (index, model) in self.models.iter().enumerate() {
            for name in std::iter::once(&model.name).chain(&model.aliases) {
                if name.is_empty() || name.len() > 256 {
                    return bad(format!(
                        "models[{index}].name: got {name:?}, allowed are 1 to 256 bytes"
                    ));
                }
                if !names.insert(name) {
                    return bad(format!("models[{index}].name: {name:?} is used twice"));
                }
            }
            model.validate(index)?;
        }
        Ok(())
    }

    /// Takes from `old` what cannot change while the process runs; names what was to.
    pub fn keep_fixed(&mut self, old: &Config) -> Vec<&'static str> {
        fn keep<T: Clone + PartialEq>(
            name: &'static str,
            new: &mut T,
            old: &T,
        ) -> Option<&'static str> {
            let differs = new != old;
            new.clone_from(old);
            differs.then_some(name)
        }
        [
            keep("host", &mut self.host, &old.host),
            keep("port", &mut self.port, &old.port),
            keep("unix_socket", &mut self.unix_socket, &old.unix_socket),
            keep("database_url", &mut self.database_url, &old.database_url),
            keep("database_down", &mut self.database_down, &old.database_down),
            keep(
                "database_timeout_s",
                &mut self.database_timeout_s,
                &old.database_timeout_s,
            ),
            keep("lease_s", &mut self.lease_s, &old.lease_s),
            keep(
                "usage_interval_s",
                &mut self.usage_interval_s,
                &old.usage_interval_s,
            ),
            keep(
                "max_body_memory_bytes",
                &mut self.max_body_memory_bytes,
                &old.max_body_memory_bytes,
            ),
            keep(
                "max_connections",
                &mut self.max_connections,
                &old.max_connections,
            ),
            keep("text_threads", &mut self.text_threads, &old.text_threads),
            keep("text_queue", &mut self.text_queue, &old.text_queue),
            keep(
                "text_cache_bytes",
                &mut self.text_cache_bytes,
                &old.text_cache_bytes,
            ),
            keep("otlp_endpoint", &mut self.otlp_endpoint, &old.otlp_endpoint),
            keep(
                "otlp_sample_ratio",
                &mut self.otlp_sample_ratio,
                &old.otlp_sample_ratio,
            ),
            keep("log_format", &mut self.log_format, &old.log_format),
        ]
        .into_iter()
        .flatten()
        .collect()
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

impl ModelConfig {
    /// How a replica is chosen.
    ///
    /// # Errors
    /// `GatewayError::Config` names what is allowed.
    pub fn policy(&self, index: usize) -> Result<Policy, GatewayError> {
        self.routing
            .parse()
            .map_err(|error| GatewayError::Config(format!("models[{index}].routing: {error}")))
    }

    fn validate(&self, index: usize) -> Result<(), GatewayError> {
        let path = format!("models[{index}]");
        let bad = |message: String| Err(GatewayError::Config(format!("{path}.{message}")));
        if self.replicas.is_empty() && self.upstreams.is_empty() {
            return bad(format!(
                "replicas: model {:?} has none, and no upstreams",
                self.name
            ));
        }
        if !self.replicas.is_empty() && self.path.as_os_str().is_empty() {
            return bad(
                "path: missing, needed is the folder of the replicas' tokenizer".to_owned(),
            );
        }
        self.addresses(index)?;
        self.policy(index)?;
        for (number, upstream) in self.upstreams.iter().enumerate() {
            upstream.validate(&format!("{path}.upstreams[{number}]"))?;
        }
        if self.max_model_len == Some(0) {
            return bad("max_model_len: got 0, allowed is 1 or more".to_owned());
        }
        Ok(())
    }

    /// The replicas' addresses, parsed; `index` is the model's in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` names the bad one.
    pub fn addresses(&self, index: usize) -> Result<Vec<Address>, GatewayError> {
        self.replicas
            .iter()
            .enumerate()
            .map(|(number, text)| {
                Address::from_str(text).map_err(|e| {
                    GatewayError::Config(format!(
                        "models[{index}].replicas[{number}]: got {text:?} ({e}), allowed is unix:/path, host:port or file:/path"
                    ))
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "[[models]]\nname = 'm'\npath = '/m'\nreplicas = ['unix:/run/m.sock']\n";

    #[test]
    fn defaults_fill_what_is_left_out() {
        let config = Config::from_toml(MODEL).unwrap();
        assert_eq!((config.port, config.log_format), (8000, LogFormat::Text));
        assert_eq!(config.request_timeout(), Some(Duration::from_secs(3600)));
    }

    #[test]
    fn secrets_that_are_left_out_come_from_the_environment() {
        let given = |name: &str| match name {
            "SCALELLM_API_KEY" => Some("one, two,".to_owned()),
            "SCALELLM_ADMIN_KEY" => Some("root".to_owned()),
            _ => Some(String::new()),
        };
        let config = Config::with_secrets(MODEL, given).unwrap();
        assert_eq!(config.api_keys, ["one", "two"]);
        assert_eq!(config.admin_keys, ["root"]);
        assert_eq!(config.database_url, None);
        let text = format!("api_keys = ['mine']\n{MODEL}");
        let config = Config::with_secrets(&text, given).unwrap();
        assert_eq!(config.api_keys, ["mine"]);
    }

    #[test]
    fn each_bad_key_is_named() {
        for (text, named) in [
            (String::new(), "models"),
            (format!("prot = 1\n{MODEL}"), "prot"),
            (format!("port = 'x'\n{MODEL}"), "port"),
            (format!("max_in_flight = 0\n{MODEL}"), "max_in_flight"),
            (
                format!("log_level = 'verbose'\n{MODEL}"),
                "unknown variant `verbose`, expected one of `error`, `warning`, `info`, `debug`, `trace`",
            ),
            (
                format!("drain_timeout_s = -1.0\n{MODEL}"),
                "drain_timeout_s",
            ),
            (format!("write_timeout_s = nan\n{MODEL}"), "write_timeout_s"),
            (format!("api_keys = ['']\n{MODEL}"), "api_keys"),
            (
                format!("otlp_endpoint = 'collector:4318'\n{MODEL}"),
                "otlp_endpoint: got \"collector:4318\"",
            ),
            (
                format!("otlp_sample_ratio = 2.0\n{MODEL}"),
                "otlp_sample_ratio",
            ),
            (format!("{MODEL}{MODEL}"), "models[1].name"),
            (
                MODEL.replace("'unix:/run/m.sock'", ""),
                "models[0].replicas",
            ),
            (
                MODEL.replace("unix:/run/m.sock", "no port"),
                "models[0].replicas[0]",
            ),
            (MODEL.replace("path = '/m'", ""), "models[0].path"),
            (
                format!("{MODEL}[[models.upstreams]]\nurl = 'x'\n"),
                "models[0].upstreams[0].url",
            ),
            (
                format!("{MODEL}[[models.upstreams]]\nurl = 'http://x'\nwieght = 1\n"),
                "wieght",
            ),
            (format!("{MODEL}max_model_len = 0\n"), "max_model_len"),
            (
                format!("{MODEL}routing = 'random'\n"),
                "models[0].routing: got \"random\", allowed are least-load, prefix, shape, session",
            ),
            (
                format!("{MODEL}[faults]\nreplay_wait_s = -1"),
                "faults.replay_wait_s",
            ),
            (
                format!("{MODEL}[faults]\nretry_share = 2"),
                "faults.retry_share",
            ),
            (
                format!("{MODEL}[faults]\nbreaker_probes = 0"),
                "faults.breaker_probes",
            ),
            (format!("{MODEL}[faults]\nreplays = 1"), "replays"),
        ] {
            let message = Config::from_toml(&text).unwrap_err().to_string();
            assert!(
                message.contains(named),
                "{message:?} does not name {named:?}"
            );
        }
    }
}
