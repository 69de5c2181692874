//! One server elsewhere: its connections, its health, its counts.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
};
use parking_lot::Mutex;
use scalellm_routing::{BreakerSettings, Prefixes, SentPrefixes, stable_hash};
use tokio::task::AbortHandle;

use super::exchange::{Exchange, Failure};
use super::health::Health;
use super::link::Link;
use super::pick::Candidate;
use crate::config::upstream::{Base, Timeouts};
use crate::config::{FaultConfig, UpstreamConfig};
use crate::engine_name::engine_name;
use crate::error::GatewayError;
use crate::socket::Socket;
use crate::tls::Tls;

const CONNECT_TIMEOUT: &str = "connect_timeout_s";
/// How often one that is down is asked.
const ASK_AGAIN: Duration = Duration::from_secs(1);
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE_FOR: Duration = Duration::from_secs(60);
/// Of an answer about health, what is read so that the connection can be used again.
const MAX_HEALTH_BYTES: usize = 1 << 20;

pub struct Upstream {
    /// Its `url`, by which metrics and the log call it.
    pub name: Arc<str>,
    /// What clients are told in its place.
    pub told_as: String,
    /// The model's name there.
    pub model: String,
    /// The same in every gateway, for sessions.
    pub id: u64,
    pub config: UpstreamConfig,
    pub timeouts: Timeouts,
    base: Base,
    authorization: Option<HeaderValue>,
    /// The same ones in every request, as they are sent.
    own_headers: Vec<u8>,
    tls: Option<Tls>,
    idle: Mutex<Vec<(Link, Instant)>>,
    pub health: Health,
    pub counts: Counts,
    /// What its cache may hold.
    sent_prefixes: Mutex<SentPrefixes>,
    prober: Mutex<Option<AbortHandle>>,
}

#[derive(Debug, Default)]
pub struct Counts {
    pub requests: AtomicU64,
    pub failures: AtomicU64,
    /// Connections that were opened.
    pub connections: AtomicU64,
    /// Answers without usage, whose tokens were estimated.
    pub estimated: AtomicU64,
    pub in_flight: Arc<AtomicUsize>,
}

impl Upstream {
    /// Starts asking for its health, so a runtime must be there; the same one among `running` goes on instead. `path`
    /// is the key's in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` for what is wrong with its URL, key or authorities.
    pub fn start(
        config: &UpstreamConfig,
        model: &str,
        path: &str,
        breaker: BreakerSettings,
        running: &[Arc<Upstream>],
    ) -> Result<Arc<Upstream>, GatewayError> {
        let model = config.model.as_deref().unwrap_or(model);
        let authorization = config.authorization(path)?;
        let same = running.iter().find(|upstream| {
            upstream.config == *config
                && upstream.model == model
                && upstream.authorization == authorization
        });
        if let Some(same) = same {
            return Ok(Arc::clone(same));
        }
        let bad = |reason: String| GatewayError::Config(format!("{path}: {reason}"));
        let base = config.base().map_err(bad)?;
        let tls = base
            .tls
            .then(|| Tls::new(&base.host, config.ca_file.as_deref()))
            .transpose()
            .map_err(bad)?;
        let upstream = Arc::new(Upstream {
            name: config.url.as_str().into(),
            told_as: engine_name("upstream", &config.url),
            model: model.to_owned(),
            id: stable_hash(config.url.as_bytes()),
            timeouts: config.timeouts(),
            own_headers: own_headers(&base.authority, authorization.as_ref()),
            authorization,
            tls,
            base,
            idle: Mutex::default(),
            health: Health::new(breaker),
            counts: Counts::default(),
            sent_prefixes: Mutex::default(),
            prober: Mutex::default(),
            config: config.clone(),
        });
        let probing = tokio::spawn(keep_watch(Arc::downgrade(&upstream)));
        *upstream.prober.lock() = Some(probing.abort_handle());
        Ok(upstream)
    }

    /// One that is no choice among several: nothing asks whether it is well.
    ///
    /// # Errors
    /// As [`Upstream::start`].
    pub fn start_alone(config: &UpstreamConfig, path: &str) -> Result<Arc<Upstream>, GatewayError> {
        Upstream::start(config, "", path, FaultConfig::default().breaker(), &[])
    }

    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.health.is_reached(!self.config.health_path.is_empty())
    }

    #[must_use]
    pub fn state(&self) -> &'static str {
        if self.is_usable() { "up" } else { "down" }
    }

    /// What speaks for sending it a prompt; `index` is its own among the model's.
    #[must_use]
    pub fn candidate(&self, index: usize, prompt: &Prefixes) -> Candidate {
        Candidate {
            index,
            id: self.id,
            weight: self.config.weight,
            in_flight: self.counts.in_flight.load(Relaxed),
            sent: self.sent_prefixes.lock().share(prompt),
        }
    }

    /// A request is sent to it. Counted now and not when it answers, so that what begins alike and comes together goes
    /// together; one that is not answered well costs a later request nothing but a wrong guess.
    pub fn sent(&self, prompt: &Prefixes) {
        self.counts.requests.fetch_add(1, Relaxed);
        self.health.sent();
        self.sent_prefixes.lock().remember(prompt);
    }

    /// It said something.
    pub fn reached(&self) {
        if self.health.reached() {
            tracing::info!(upstream = &*self.name, "the upstream is back");
        }
    }

    fn not_reached(&self, reason: &str) {
        if self.health.not_reached() {
            // One that comes back from a restart has an empty cache.
            self.sent_prefixes.lock().clear();
            tracing::warn!(upstream = &*self.name, reason, "the upstream is down");
        }
    }

    /// A request failed that another server might have answered.
    pub fn failed(&self, reason: &str) {
        if self.health.failed() {
            tracing::warn!(
                upstream = &*self.name,
                reason,
                "the upstream fails its requests: it gets none for a while"
            );
        }
    }

    /// A request failed so.
    pub fn lost(&self, failure: &Failure) {
        let reason = failure.to_string();
        if let Failure::Connect(_) | Failure::Late(CONNECT_TIMEOUT) = failure {
            self.not_reached(&reason);
        }
        self.failed(&reason);
    }

    /// The head of a request for `path` below its URL, with its key.
    #[must_use]
    pub fn head(
        &self,
        method: &str,
        path: &str,
        headers: &[(&HeaderName, &[u8])],
        body_bytes: usize,
    ) -> Bytes {
        let mut head = Vec::with_capacity(512);
        for part in [method, " ", &self.base.path, path, " HTTP/1.1\r\n"] {
            head.extend_from_slice(part.as_bytes());
        }
        head.extend_from_slice(&self.own_headers);
        for (name, value) in headers {
            write_header(&mut head, name, value);
        }
        if body_bytes > 0 {
            write_header(
                &mut head,
                &CONTENT_LENGTH,
                body_bytes.to_string().as_bytes(),
            );
        }
        head.extend_from_slice(b"\r\n");
        Bytes::from(head)
    }

    /// A request that posts JSON to `path` below its URL, with its key, in parts.
    #[must_use]
    pub fn post_json(&self, path: &str, body: Bytes) -> Vec<Bytes> {
        let kind: (&HeaderName, &[u8]) = (&CONTENT_TYPE, b"application/json");
        vec![self.head("POST", path, &[kind], body.len()), body]
    }

    /// An idle connection that is still open.
    pub fn take_idle(&self) -> Option<Link> {
        loop {
            let (mut link, since) = self.idle.lock().pop()?;
            if since.elapsed() < IDLE_FOR && link.is_ready() {
                return Some(link);
            }
        }
    }

    /// # Errors
    /// Why there is none.
    pub async fn connect(&self) -> Result<Link, Failure> {
        self.counts.connections.fetch_add(1, Relaxed);
        let connecting = async {
            let socket = Socket::connect(&self.base.host, self.base.port, self.tls.as_ref())
                .await
                .map_err(|error| Failure::Connect(error.to_string()))?;
            Ok(Link::new(socket))
        };
        tokio::time::timeout(self.timeouts.connect, connecting)
            .await
            .unwrap_or(Err(Failure::Late(CONNECT_TIMEOUT)))
    }

    /// Keeps a connection for the next request, if there is room.
    pub fn give_back(&self, mut link: Link) {
        link.used = true;
        let mut idle = self.idle.lock();
        if idle.len() < self.config.max_idle_connections {
            idle.push((link, Instant::now()));
        }
    }

    fn close_old(&self) {
        let old: Vec<_> = {
            let mut idle = self.idle.lock();
            // The last used are last.
            let kept = idle.partition_point(|(_, since)| since.elapsed() >= IDLE_FOR);
            idle.drain(..kept).collect()
        };
        drop(old);
    }

    /// Asks whether it is well.
    async fn probe(self: &Arc<Self>) -> Result<(), String> {
        let path = &self.config.health_path;
        let request = vec![self.head("GET", path, &[], 0)];
        let asking = async {
            let (head, mut exchange) = Exchange::start(self, request, || true).await?;
            exchange.collect(MAX_HEALTH_BYTES).await?;
            Ok::<_, Failure>(head.status)
        };
        let status = tokio::time::timeout(HEALTH_TIMEOUT + self.timeouts.connect, asking)
            .await
            .map_err(|_| format!("{path} does not answer"))?
            .map_err(|failure| format!("{path}: {failure}"))?;
        // A server that lacks the page answers none the less; one that refuses the key is of no use.
        if status.is_server_error() || status == hyper::StatusCode::UNAUTHORIZED {
            return Err(format!("{path} answers {status}"));
        }
        Ok(())
    }
}

/// `authority` was parsed as part of a URL, so there is no line's end in it.
fn own_headers(authority: &str, authorization: Option<&HeaderValue>) -> Vec<u8> {
    let mut lines = Vec::new();
    write_header(&mut lines, &HOST, authority.as_bytes());
    write_header(&mut lines, &ACCEPT_ENCODING, b"identity");
    if let Some(authorization) = authorization {
        write_header(&mut lines, &AUTHORIZATION, authorization.as_bytes());
    }
    lines
}

fn write_header(lines: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    lines.extend_from_slice(name.as_str().as_bytes());
    lines.extend_from_slice(b": ");
    lines.extend_from_slice(value);
    lines.extend_from_slice(b"\r\n");
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(prober) = self.prober.lock().take() {
            prober.abort();
        }
    }
}

async fn keep_watch(upstream: Weak<Upstream>) {
    loop {
        let wait = {
            let Some(upstream) = upstream.upgrade() else {
                return;
            };
            upstream.close_old();
            let interval = Duration::from_secs_f64(upstream.config.health_interval_s);
            if upstream.config.health_path.is_empty() {
                interval
            } else {
                match upstream.probe().await {
                    Ok(()) => {
                        upstream.reached();
                        interval
                    }
                    Err(reason) => {
                        upstream.not_reached(&reason);
                        interval.min(ASK_AGAIN)
                    }
                }
            }
        };
        tokio::time::sleep(wait).await;
    }
}
