//! Around every request: its id and times in, its headers, metrics and one log line out.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use crate::app::{App, Phase};
use crate::connection::ConnectionState;
use crate::error::{ApiError, ApiResult, ErrorNote};
use crate::gen_ai::Operation;
use crate::recent::{EndedRequest, serialised_us};
use crate::record::{REQUEST_ID_HEADER, RequestRecord, request_id};
use crate::routing::{ROUTE_HEADER, RouteWish};
use crate::stages::{Stage, micros};
use crate::traces::Parent;
use crate::written::Written;
use crate::{auth, metering, quota, routes};

const REPLAYS: HeaderName = HeaderName::from_static("x-scalellm-replays");
const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// nginx's status for a client that left before its answer.
const CLIENT_LEFT: u16 = 499;

/// The outermost layer of the router.
pub async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let now = Instant::now();
    let http1 = request.version() <= Version::HTTP_11;
    let is_head = request.method() == Method::HEAD;
    let connection = request.extensions().get::<Arc<ConnectionState>>().cloned();
    let first_byte = connection
        .as_ref()
        .and_then(|c| c.request_started())
        .filter(|_| http1);
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("other", |path| routes::label(path.as_str()));
    let parent = Parent::of_headers(request.headers());
    let id = request_id(request.headers(), parent);
    let trace = app
        .traces
        .as_ref()
        .and_then(|traces| traces.begin(parent, &id));
    let record = RequestRecord::new(
        id.into(),
        request.method().clone(),
        request.uri().path().to_owned(),
        route,
        first_byte.unwrap_or(now),
        trace,
    );
    record.add(Stage::Accept, now.saturating_duration_since(record.started));
    record.update(|progress| progress.wish = RouteWish::of_headers(request.headers()));
    let mut end = RequestEnd::new(Arc::clone(&app), Arc::clone(&record), connection);
    request.extensions_mut().insert(Arc::clone(&record));

    let gate = record.timed_async(
        Stage::Auth,
        gate(
            &app,
            &record,
            request.headers(),
            request.version(),
            end.connection.as_ref(),
        ),
    );
    let mut response = match gate.await {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    end.status = response.status().as_u16();
    end.note = response.extensions_mut().remove::<ErrorNote>();

    let is_stream = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|v| v.as_bytes().starts_with(b"text/event-stream"));
    let times = if is_stream {
        record.times()
    } else {
        record.times_so_far()
    };
    let headers = response.headers_mut();
    let replays = record.update(|progress| progress.replays);
    if replays > 0 {
        headers.insert(REPLAYS, HeaderValue::from(replays));
    }
    if let Some(key) = record.key() {
        quota::write_headers(key, headers);
    }
    let route = record.update(|progress| progress.route.take());
    if let Some(value) = route.and_then(|route| HeaderValue::try_from(route.to_string()).ok()) {
        headers.insert(ROUTE_HEADER, value);
    }
    for (name, value) in [
        (REQUEST_ID, HeaderValue::from_str(&record.id)),
        (SERVER_TIMING, HeaderValue::try_from(times.server_timing())),
    ] {
        if let Ok(value) = value {
            headers.insert(name, value);
        }
    }
    if http1 && app.phase() != Phase::Serving {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    } else if !http1 {
        headers.remove(header::CONNECTION);
    }
    response.map(|body| {
        // The answer to HEAD has no body that could be polled to its end.
        end.complete = is_head || body.is_end_stream();
        Body::new(ObservedBody { body, end })
    })
}

/// Whether a request may go on to its route.
async fn gate(
    app: &App,
    record: &RequestRecord,
    headers: &HeaderMap,
    version: Version,
    connection: Option<&Arc<ConnectionState>>,
) -> ApiResult<()> {
    if routes::is_open(record.route) {
        return Ok(());
    }
    if routes::is_admin(record.route) {
        let keys = &app.live().config.admin_keys;
        return auth::check_admin(headers, version, keys, connection);
    }
    auth::check(app, record, headers).await?;
    if app.phase() != Phase::Serving {
        app.metrics.rejected("draining");
        return Err(ApiError::draining(app.drain_retry_after_s()));
    }
    Ok(())
}

/// Ends a request's record when its response has ended, or when the client has left.
struct RequestEnd {
    app: Arc<App>,
    record: Arc<RequestRecord>,
    connection: Option<Arc<ConnectionState>>,
    written: Written,
    /// Spent on serialising before the first frame was handed over.
    first_serialise_us: u64,
    status: u16,
    note: Option<ErrorNote>,
    /// The whole response was handed to the connection.
    complete: bool,
}

impl RequestEnd {
    fn new(
        app: Arc<App>,
        record: Arc<RequestRecord>,
        connection: Option<Arc<ConnectionState>>,
    ) -> RequestEnd {
        app.request_started();
        RequestEnd {
            app,
            record,
            written: Written::new(connection.clone()),
            first_serialise_us: 0,
            connection,
            status: 0,
            note: None,
            complete: false,
        }
    }
}

/// Asked every few seconds by whoever watches the gateway, who sees the answer: logged at debug level.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];

impl Drop for RequestEnd {
    fn drop(&mut self) {
        self.written.look();
        let record = &self.record;
        let total = record.started.elapsed();
        let (status, note, outcome) = record.update(|progress| {
            progress.times.set(Stage::Total, total);
            if !self.written.took.is_zero() {
                progress.times.set(Stage::Write, self.written.took);
            }
            progress.close_decode();
            match progress.failed.take() {
                Some((status, note)) => (status, Some(note), "error"),
                None if !self.complete => (CLIENT_LEFT, self.note.take(), "client_left"),
                None if self.status >= 400 => (self.status, self.note.take(), "error"),
                None => (self.status, None, "ok"),
            }
        });
        let meters = self.app.accounts.as_ref().map(|accounts| accounts.meters());
        metering::end(meters, record, &self.app.clock, status, outcome);
        record.update(|progress| {
            self.app.metrics.request_ended(record.route, status);
            let Some(model) = &progress.model else { return };
            self.app.metrics.observe_stages(&progress.times);
            model.count_tokens(
                progress.prompt_tokens,
                progress.cached_tokens,
                progress.output_tokens,
            );
            if let Some(own) = progress.own.as_ref().filter(|_| outcome == "ok")
                && progress.longest_choice_tokens > 0
            {
                let tokens = usize::try_from(progress.longest_choice_tokens).unwrap_or(usize::MAX);
                own.routing.observe_output(tokens, self.app.clock.now_ms());
            }
            let Some(operation) = Operation::of_route(record.route) else {
                return;
            };
            let times = model.metrics.times.of(operation);
            times.ended(status, micros(total));
            if let Some(us) = progress.times.get_us(Stage::First) {
                times.first_token.observe_us(us);
            }
            if let (Some(first), Some(last)) = (progress.first_tokens, progress.last_tokens)
                && progress.longest_choice_tokens > 1
            {
                let decode_us = micros(last.at.saturating_duration_since(first.at));
                times
                    .output_token
                    .observe_us(decode_us / (progress.longest_choice_tokens - 1));
            }
        });
        let ended = record.update(|progress| {
            let serialise_us = self.first_serialise_us;
            let clock = &self.app.clock;
            EndedRequest::new(record, progress, status, &self.written, serialise_us, clock)
        });
        if let Some(ended) = ended.map(Arc::new) {
            if let (Some(traces), Some(_)) = (&self.app.traces, record.trace) {
                traces.offer(Arc::clone(&ended));
            }
            self.app.recent.push(ended);
        }
        let is_probe = PROBES.contains(&record.path.as_ref());
        record.update(|progress| {
            // The level of an event has to be a constant.
            macro_rules! log {
                ($level:ident) => {
                    tracing::$level!(
                        target: "access",
                        request_id = &*record.id,
                        method = record.method.as_str(),
                        path = record.path,
                        status,
                        outcome,
                        model = progress.model.as_ref().map(|model| &*model.name),
                        replica = progress.replica.as_deref(),
                        prompt_tokens = progress.prompt_tokens,
                        cached_tokens = progress.cached_tokens,
                        output_tokens = progress.output_tokens,
                        finish = progress.finish,
                        replays = progress.replays,
                        safety = Some(progress.safety.text()).filter(|text| !text.is_empty()),
                        code = note.as_ref().and_then(|note| note.code),
                        param = note.as_ref().and_then(|note| note.param.as_deref()),
                        error = note.as_ref().and_then(|note| note.message.as_deref()),
                        stages = progress.times.server_timing(),
                    )
                };
            }
            if is_probe {
                log!(debug);
            } else {
                log!(info);
            }
        });
        if let Some(connection) = &self.connection {
            connection.request_ended();
        }
        self.app.request_ended();
    }
}

/// A response's body that knows when it has ended.
struct ObservedBody {
    body: Body,
    end: RequestEnd,
}

impl HttpBody for ObservedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.end.written.look();
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
            if self.end.written.first.is_none() {
                self.end.first_serialise_us = serialised_us(&self.end.record);
            }
            self.end.written.gave();
        }
        if frame.is_none() || self.body.is_end_stream() {
            self.end.complete = true;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
