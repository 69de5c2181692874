//! What is known of one request while it lives: its id, its times, its counts.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue, Method};
use parking_lot::Mutex;
use scalellm_accounts::KeyState;
use scalellm_engine_link::proto;

use crate::error::ErrorNote;
use crate::fleet::Model;
use crate::metering::Metering;
use crate::routing::{RouteNote, RouteWish};
use crate::safety::Outcome;
use crate::served::Served;
use crate::stages::{Stage, StageTimes};
use crate::traces::{Parent, TraceContext};

pub const REQUEST_ID_HEADER: &str = "x-request-id";
const MAX_ID_BYTES: usize = 128;

pub struct RequestRecord {
    pub id: Arc<str>,
    pub method: Method,
    pub path: String,
    /// The route's pattern; "other" where none matched.
    pub route: &'static str,
    /// When its first byte was read.
    pub started: Instant,
    /// If it is traced.
    pub trace: Option<TraceContext>,
    /// Set once the request is known to come with a key of the database.
    key: OnceLock<Arc<KeyState>>,
    progress: Mutex<Progress>,
}

#[derive(Default)]
pub struct Progress {
    pub times: StageTimes,
    pub model: Option<Arc<Served>>,
    /// The same, where replicas of our own compute it.
    pub own: Option<Arc<Model>>,
    pub replica: Option<Arc<str>>,
    pub wish: RouteWish,
    /// If the client wishes to know.
    pub route: Option<RouteNote>,
    pub body_bytes: usize,
    /// What the request holds of its key's budgets, and its row of usage.
    pub metering: Metering,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    /// Of the choice that has most.
    pub longest_choice_tokens: u64,
    /// How often a choice went on at a replica after its own died.
    pub replays: u32,
    pub first_tokens: Option<TokensCame>,
    pub last_tokens: Option<TokensCame>,
    /// What the engine said with its first output, and with its last.
    pub engine_first: Option<Box<proto::StageTimes>>,
    pub engine_last: Option<Box<proto::StageTimes>>,
    /// Of `Detokenise`, what came before the first token was out.
    pub first_detokenise_us: Option<u64>,
    /// Known by whoever ended the response early; its status replaces the response's in log and metrics.
    pub failed: Option<(u16, ErrorNote)>,
    pub finish: Option<&'static str>,
    /// What the model's hooks did.
    pub safety: Outcome,
}

/// When tokens came, and what the gateway itself had worked on the output by then.
#[derive(Debug, Clone, Copy)]
pub struct TokensCame {
    pub at: Instant,
    pub own_work: Duration,
}

impl Progress {
    /// Tokens have come now.
    pub fn tokens_came(&mut self, now: Instant) {
        let came = TokensCame {
            at: now,
            own_work: self.times.own_output_work(),
        };
        self.first_tokens.get_or_insert(came);
        self.last_tokens = Some(came);
    }

    /// Sets `Decode` without the stages of the gateway's that lie within it, so that no time counts twice.
    pub fn close_decode(&mut self) {
        if let (Some(first), Some(last)) = (self.first_tokens, self.last_tokens) {
            let whole = last.at.saturating_duration_since(first.at);
            let own = last.own_work.saturating_sub(first.own_work);
            self.times.set(Stage::Decode, whole.saturating_sub(own));
        }
    }
}

impl RequestRecord {
    #[must_use]
    pub fn new(
        id: Arc<str>,
        method: Method,
        path: String,
        route: &'static str,
        started: Instant,
        trace: Option<TraceContext>,
    ) -> Arc<RequestRecord> {
        Arc::new(RequestRecord {
            id,
            method,
            path,
            route,
            started,
            trace,
            key: OnceLock::new(),
            progress: Mutex::default(),
        })
    }

    #[must_use]
    pub fn key(&self) -> Option<&Arc<KeyState>> {
        self.key.get()
    }

    pub fn set_key(&self, key: Arc<KeyState>) {
        // A request is authenticated once.
        let _ = self.key.set(key);
    }

    pub fn update<T>(&self, change: impl FnOnce(&mut Progress) -> T) -> T {
        change(&mut self.progress.lock())
    }

    /// How long the request's body is.
    pub fn body_bytes(&self) -> usize {
        self.progress.lock().body_bytes
    }

    pub fn add(&self, stage: Stage, took: Duration) {
        self.update(|progress| progress.times.add(stage, took));
    }

    /// Runs `work` as (a part of) `stage`.
    pub fn timed<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.add(stage, start.elapsed());
        result
    }

    /// The same for a future.
    pub async fn timed_async<T>(&self, stage: Stage, work: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = work.await;
        self.add(stage, start.elapsed());
        result
    }

    #[must_use]
    pub fn times(&self) -> StageTimes {
        self.update(|progress| progress.times)
    }

    /// With the stages that go on until now.
    #[must_use]
    pub fn times_so_far(&self) -> StageTimes {
        self.update(|progress| {
            progress.close_decode();
            let mut times = progress.times;
            times.set(Stage::Total, self.started.elapsed());
            times
        })
    }
}

/// The client's `x-request-id` if it is 1 to 128 visible ASCII characters, else its trace, else a new one.
#[must_use]
pub fn request_id(headers: &HeaderMap, parent: Option<Parent>) -> String {
    let given = headers.get(REQUEST_ID_HEADER).map(HeaderValue::as_bytes);
    match given {
        Some(id)
            if (1..=MAX_ID_BYTES).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic) =>
        {
            String::from_utf8_lossy(id).into_owned()
        }
        _ => {
            let id = parent.map_or_else(rand::random, |parent| parent.trace);
            format!("{id:032x}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traces::TRACEPARENT;

    #[test]
    fn a_clients_id_is_kept_only_if_it_is_harmless() {
        let id = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID_HEADER, HeaderValue::from_bytes(value).unwrap());
            request_id(&headers, None)
        };
        assert_eq!(id(b"abc-123"), "abc-123");
        for bad in [&b""[..], b"a b", "\u{e9}".as_bytes(), &[b'x'; 129]] {
            let made = id(bad);
            assert_eq!(made.len(), 32);
            assert_ne!(made, id(bad));
        }
    }

    #[test]
    fn a_request_of_a_trace_without_an_id_of_its_own_bears_the_traces() {
        let id = |parent: &'static str, own: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, HeaderValue::from_static(parent));
            if let Some(own) = own {
                headers.insert(REQUEST_ID_HEADER, HeaderValue::from_static(own));
            }
            request_id(&headers, Parent::of_headers(&headers))
        };
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(id(parent, None), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(id(parent, Some("mine")), "mine");
    }
}
