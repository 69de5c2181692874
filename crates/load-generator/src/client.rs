//! Sends one request and writes down what happens to it.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use hyper::{Request, Response};
use tokio::time::timeout_at;

use crate::answer::{Answer, Event, excerpt};
use crate::connection::{Clock, Connection};
use crate::conversation::{Conversation, Conversations};
use crate::error::LoadError;
use crate::plan::Plan;
use crate::reading::{ends_soon, finish, http_failure, read_up_to, require_event_stream};
use crate::record::{Failure, FailureKind, Outcome, Record};
use crate::sse::SseParser;
use crate::tls::Tls;
use crate::url::Target;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// https://www.w3.org/TR/trace-context/
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Largest event of a stream, and largest answer that is not streamed.
const MAX_EVENT_BYTES: usize = 4 << 20;
const MAX_WHOLE_BYTES: usize = 64 << 20;
/// Bytes of an error answer that are read for its message.
const MAX_ERROR_BYTES: usize = 4096;
/// Gaps kept of one request; a stream that never ends must not fill the memory.
const MAX_GAPS: usize = 1 << 20;

/// A server that ends a kept connection later than this after a request had it to answer.
const CROSSED_WITHIN_NS: u64 = 100_000_000;

/// The endpoint as one run sees it: its addresses, its idle connections, and what to say to it.
pub(crate) struct Client {
    target: Target,
    addresses: Result<Vec<SocketAddr>, String>,
    tls: Option<Tls>,
    trace_prefix: Option<String>,
    /// Requests begun so far, of all levels.
    begun: AtomicU64,
    authorization: Option<HeaderValue>,
    conversations: Conversations,
    stream: bool,
    timeout: Duration,
    clock: Clock,
    token_chunks: AtomicU64,
    /// Most recently used last; never more than requests were in flight.
    idle: Mutex<Vec<Connection>>,
}

/// A finished request, and how late it was sent through the generator's own doing.
pub(crate) struct Exchange {
    pub record: Record,
    pub send_lag_ns: Option<u64>,
    /// The answer's text, where the conversation goes on with it.
    answer_text: Option<String>,
}

impl Exchange {
    /// A request that was never begun.
    pub fn unsent(record: Record) -> Exchange {
        Exchange {
            record,
            send_lag_ns: None,
            answer_text: None,
        }
    }
}

/// What is known so far; survives the timeout that ends the exchange.
#[derive(Default)]
struct Observed {
    sent_ns: Option<u64>,
    resent: bool,
    send_lag_ns: u64,
    first_ns: Option<u64>,
    last_ns: Option<u64>,
    end_ns: Option<u64>,
    max_gap_ns: u64,
    gaps_us: Vec<u32>,
    status: Option<u16>,
    answer: Answer,
}

impl Client {
    /// Resolves the target's name; failing that, every request fails with `connect`.
    pub async fn new(plan: &Plan, clock: Clock) -> Result<Client, LoadError> {
        let target = plan.target()?;
        let addresses = match tokio::net::lookup_host(&target.socket).await {
            Ok(found) => Ok(found.collect()),
            Err(error) => Err(format!("cannot resolve {}: {error}", target.socket)),
        };
        let authorization = match &plan.api_key {
            Some(key) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
                    .map_err(|error| LoadError::Plan(format!("api_key: {error}")))?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let tls = match &target.tls_name {
            Some(name) => Some(Tls::new(&plan.tls, name.clone())?),
            None => None,
        };
        Ok(Client {
            target,
            addresses,
            tls,
            trace_prefix: plan.trace_prefix.clone(),
            begun: AtomicU64::new(0),
            authorization,
            conversations: Conversations::new(plan),
            stream: plan.stream,
            timeout: Duration::from_secs_f64(plan.timeout_s),
            clock,
            token_chunks: AtomicU64::new(0),
            idle: Mutex::default(),
        })
    }

    /// How many prompts were taken so far, and how many there are.
    pub fn prompts(&self) -> (usize, usize) {
        self.conversations.taken_of()
    }

    pub fn next_conversation(&self) -> Conversation {
        self.conversations.begin_next()
    }

    /// Readies the conversation's next request; how long its user thinks before, or None when it
    /// is over: all was said, or a request did not complete.
    pub fn go_on(&self, conversation: &mut Conversation, exchange: &Exchange) -> Option<Duration> {
        let answer = exchange.answer_text.as_deref()?;
        self.conversations.go_on(conversation, answer)
    }

    pub fn instant(&self, ns: u64) -> Instant {
        self.clock.instant(ns)
    }

    /// Chunks with tokens received so far, of all requests.
    pub fn token_chunks(&self) -> u64 {
        self.token_chunks.load(Ordering::Relaxed)
    }

    /// Sends the conversation's request now. `scheduled_ns`: when it should have been sent (open
    /// loop), from which its wait is then counted.
    pub async fn exchange(
        &self,
        conversation: &Conversation,
        scheduled_ns: Option<u64>,
    ) -> Exchange {
        let begin_ns = self.clock.now_ns();
        let due_ns = scheduled_ns.unwrap_or(begin_ns);
        let mut observed = Observed {
            send_lag_ns: begin_ns.saturating_sub(due_ns),
            answer: match conversation.goes_on() {
                true => Answer::with_text(),
                false => Answer::default(),
            },
            ..Observed::default()
        };
        let deadline = self.clock.instant(due_ns) + self.timeout;
        let id = self.next_id();
        let attempt = self.attempt(&conversation.body, id.as_deref(), &mut observed);
        let outcome = match timeout_at(deadline.into(), attempt).await {
            Ok(Ok(())) => Outcome::Completed,
            Ok(Err(failure)) => Outcome::Failed(failure),
            Err(_) => Outcome::TimedOut,
        };
        let (tokens, token_source) = observed.answer.tokens();
        Exchange {
            send_lag_ns: observed.sent_ns.map(|_| observed.send_lag_ns),
            answer_text: (outcome == Outcome::Completed)
                .then(|| observed.answer.text().map(str::to_owned))
                .flatten(),
            record: Record {
                id,
                prompt: conversation.prompt,
                turn: conversation.turn,
                origin_ns: scheduled_ns.or(observed.sent_ns).unwrap_or(begin_ns),
                sent_ns: observed.sent_ns,
                resent: observed.resent,
                first_token_ns: observed.first_ns,
                last_token_ns: observed.last_ns,
                end_ns: observed.end_ns.unwrap_or_else(|| self.clock.now_ns()),
                tokens,
                token_source,
                prompt_tokens: observed.answer.prompt_tokens(),
                chunks: observed.answer.token_chunks(),
                max_gap_ns: observed.max_gap_ns,
                status: observed.status,
                outcome,
                gaps_us: observed.gaps_us,
            },
        }
    }

    /// The next request's id, where the plan gives them any.
    fn next_id(&self) -> Option<String> {
        let prefix = self.trace_prefix.as_ref()?;
        let number = 1 + self.begun.fetch_add(1, Ordering::Relaxed);
        Some(format!("{prefix}{number:016x}"))
    }

    async fn attempt(
        &self,
        body: &Bytes,
        id: Option<&str>,
        observed: &mut Observed,
    ) -> Result<(), Failure> {
        let (connection, response) = self.send(self.request(body.clone(), id), observed).await?;
        observed.status = Some(response.status().as_u16());
        let reusable = if !response.status().is_success() {
            let status = response.status();
            let body = read_up_to(response.into_body(), MAX_ERROR_BYTES).await;
            let (body, ended) = body.unwrap_or_default();
            if ended {
                self.keep(connection);
            }
            return Err(Failure::new(
                FailureKind::Status,
                format!("HTTP {}: {}", status.as_u16(), excerpt(&body)),
            ));
        } else if self.stream {
            self.read_stream(&connection, response, observed).await?
        } else {
            let (body, ended) = read_up_to(response.into_body(), MAX_WHOLE_BYTES).await?;
            observed.end_ns = Some(connection.read_ns());
            observed.answer.on_whole(&body)?;
            ended
        };
        if reusable {
            self.keep(connection);
        }
        match observed.answer.tokens().0 {
            0 => Err(Failure::new(
                FailureKind::Empty,
                "an answer without a token",
            )),
            _ => Ok(()),
        }
    }

    /// Hands the request to an idle connection or a new one. It is sent again where nothing of it
    /// was written, and once, on a new connection, where one that was kept from an earlier request
    /// ended without a word as soon as it was used: a server may let go of an idle one at any time
    /// (RFC 9112, section 9.3.1). Its wait counts from the first time; the report counts these.
    async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        observed: &mut Observed,
    ) -> Result<(Connection, Response<Incoming>), Failure> {
        loop {
            let idle = match observed.resent {
                false => self.take_idle().await,
                true => None,
            };
            let (mut connection, is_new) = match idle {
                Some(connection) => (connection, false),
                None => (self.connect().await?, true),
            };
            let ready_ns = self.clock.now_ns();
            connection.expect_send();
            let again = (!is_new).then(|| request.clone());
            let outcome = connection.sender.try_send_request(request).await;
            let sent_ns = connection.sent_ns();
            if let Some(sent_ns) = sent_ns {
                observed.send_lag_ns += sent_ns.saturating_sub(ready_ns);
            }
            observed.sent_ns = observed.sent_ns.or(sent_ns);
            let mut error = match outcome {
                Ok(response) => return Ok((connection, response)),
                Err(error) => error,
            };
            let is_unsent = error.take_message().is_some();
            let failure = http_failure(&error.into_error());
            let is_unanswered = failure.kind == FailureKind::Reset
                && connection.read_ns() < ready_ns
                && self.clock.now_ns() < ready_ns + CROSSED_WITHIN_NS;
            match again {
                Some(again) if is_unsent || is_unanswered => request = again,
                _ => return Err(failure),
            }
            observed.resent |= !is_unsent;
        }
    }

    fn request(&self, body: Bytes, id: Option<&str>) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = hyper::Method::POST;
        // Both were parsed from a URL, so they fit; what does not is the server's to refuse.
        *request.uri_mut() = self.target.path.parse().unwrap_or_default();
        let headers = request.headers_mut();
        if let Ok(host) = HeaderValue::from_str(&self.target.authority) {
            headers.insert(HOST, host);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let accept = if self.stream {
            "text/event-stream"
        } else {
            "application/json"
        };
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        if let Some(id) = id {
            // The span is the request's number: the id's latter half.
            let parent = format!("00-{id}-{}-01", &id[id.len() / 2..]);
            for (name, value) in [(X_REQUEST_ID, id), (TRACEPARENT, parent.as_str())] {
                if let Ok(value) = HeaderValue::from_str(value) {
                    headers.insert(name, value);
                }
            }
        }
        request
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let fail = |message: String| Failure::new(FailureKind::Connect, message);
        let addresses = self
            .addresses
            .as_ref()
            .map_err(|error| fail(error.clone()))?;
        Connection::open(addresses, self.tls.as_ref(), self.clock)
            .await
            .map_err(|error| fail(format!("cannot connect to {}: {error}", self.target.socket)))
    }

    async fn take_idle(&self) -> Option<Connection> {
        loop {
            let mut connection = self.lock_idle().pop()?;
            if connection.sender.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }

    fn keep(&self, connection: Connection) {
        if !connection.sender.is_closed() {
            self.lock_idle().push(connection);
        }
    }

    fn lock_idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Reads the stream to its end. Returns whether the connection can be used again.
    async fn read_stream(
        &self,
        connection: &Connection,
        response: Response<Incoming>,
        observed: &mut Observed,
    ) -> Result<bool, Failure> {
        require_event_stream(&response)?;
        let mut body = response.into_body();
        let mut parser = SseParser::new(MAX_EVENT_BYTES);
        let mut bytes_seen = false;
        loop {
            let Some(frame) = body.frame().await else {
                observed.end_ns = Some(self.clock.now_ns());
                return finish(&observed.answer, &parser, bytes_seen).map(|()| true);
            };
            let frame = frame.map_err(|error| http_failure(&error))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            bytes_seen |= !data.is_empty();
            let read_ns = connection.read_ns();
            let mut done = false;
            parser.push(&data, |event| -> Result<(), Failure> {
                match observed.answer.on_event(event)? {
                    Event::Token => self.note_token(observed, read_ns),
                    Event::Done => done = true,
                    Event::Other => {}
                }
                Ok(())
            })?;
            if done {
                observed.end_ns = Some(read_ns);
                return Ok(ends_soon(&mut body).await);
            }
        }
    }

    fn note_token(&self, observed: &mut Observed, read_ns: u64) {
        if let Some(last_ns) = observed.last_ns {
            let gap_ns = read_ns.saturating_sub(last_ns);
            observed.max_gap_ns = observed.max_gap_ns.max(gap_ns);
            if observed.gaps_us.len() < MAX_GAPS {
                observed
                    .gaps_us
                    .push(u32::try_from(gap_ns / 1000).unwrap_or(u32::MAX));
            }
        }
        self.token_chunks.fetch_add(1, Ordering::Relaxed);
        observed.first_ns.get_or_insert(read_ns);
        observed.last_ns = Some(read_ns);
    }
}
