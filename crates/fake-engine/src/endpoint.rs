//! An OpenAI-compatible endpoint of set speed over HTTP/1.1: what a gateway has behind it where its engines are
//! foreign. It reads how many tokens are wanted and whether as a stream, and nothing else of a request.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Sleep;

use crate::alarm::{Alarm, Alarms};

/// Answered of a request that names no number.
const DEFAULT_TOKENS: u32 = 16;
const MAX_TOKENS: u32 = 1 << 20;
/// The runtime's timers fire on the millisecond that follows; half of one earlier they are right on average.
const HALF_TICK: Duration = Duration::from_micros(500);

type AnswerBody = UnsyncBoxBody<Bytes, Infallible>;

/// What every request is answered with.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    pub ttft: Duration,
    pub tbt: Duration,
}

/// What is read of a request.
#[derive(Debug, Deserialize)]
struct Asked {
    #[serde(default)]
    stream: bool,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
}

impl Asked {
    fn tokens(&self) -> u32 {
        let asked = self.max_completion_tokens.or(self.max_tokens);
        asked.unwrap_or(DEFAULT_TOKENS).clamp(1, MAX_TOKENS)
    }
}

/// Serves on a port of the loopback until `stop` is set, on the thread that calls.
pub fn run_endpoint(port: u16, speed: Speed, stop: watch::Receiver<bool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(accept(port, speed, stop))
}

async fn accept(port: u16, speed: Speed, mut stop: watch::Receiver<bool>) -> io::Result<()> {
    let alarms = Arc::new(Alarms::start()?);
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = stop.changed() => return Ok(()),
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                connections.spawn(serve(stream, speed, Arc::clone(&alarms)));
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn serve(stream: TcpStream, speed: Speed, alarms: Arc<Alarms>) {
    // Without this a token would wait for the acknowledgement of the one before it.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let answer = service_fn(|request| answer(request, speed, &alarms));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), answer);
    // A client that leaves is no error of the endpoint's.
    served.await.unwrap_or_default();
}

async fn answer(
    request: Request<Incoming>,
    speed: Speed,
    alarms: &Alarms,
) -> Result<Response<AnswerBody>, Infallible> {
    if request.method() != Method::POST {
        let models =
            r#"{"object":"list","data":[{"id":"demo","object":"model","owned_by":"fake"}]}"#;
        return Ok(whole(StatusCode::OK, models.into()));
    }
    let kind = match request.uri().path() {
        "/v1/chat/completions" => Kind::Chat,
        "/v1/completions" => Kind::Completion,
        _ => return Ok(refusal(StatusCode::NOT_FOUND, "no such path")),
    };
    let body = match request.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return Ok(refusal(StatusCode::BAD_REQUEST, "the body broke off")),
    };
    let Ok(asked) = serde_json::from_slice::<Asked>(&body) else {
        return Ok(refusal(StatusCode::BAD_REQUEST, "not JSON"));
    };
    let tokens = asked.tokens();
    if asked.stream {
        let events = Events::new(kind, tokens, speed, alarms);
        let mut response = Response::new(events.boxed_unsync());
        let kind = HeaderValue::from_static("text/event-stream");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        return Ok(response);
    }
    tokio::time::sleep(speed.ttft + speed.tbt * (tokens - 1)).await;
    Ok(whole(StatusCode::OK, kind.answer(tokens)))
}

fn whole(status: StatusCode, json: String) -> Response<AnswerBody> {
    let mut response = Response::new(Full::from(json).boxed_unsync());
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn refusal(status: StatusCode, message: &str) -> Response<AnswerBody> {
    whole(
        status,
        format!(r#"{{"error":{{"message":"{message}","type":"invalid_request_error"}}}}"#),
    )
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Chat,
    Completion,
}

impl Kind {
    fn object(self) -> &'static str {
        match self {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        }
    }

    fn chunk(self, finish: &str) -> Bytes {
        let text = if finish == "null" { " a" } else { "" };
        let (object, said) = match self {
            Kind::Chat => (
                "chat.completion.chunk",
                format!(r#""delta":{{"content":"{text}"}}"#),
            ),
            Kind::Completion => ("text_completion", format!(r#""text":"{text}""#)),
        };
        let choice = format!(r#"{{"index":0,{said},"finish_reason":{finish}}}"#);
        Bytes::from(format!(
            "data: {{\"id\":\"fake\",\"object\":\"{object}\",\"created\":1,\"model\":\"demo\",\"choices\":[{choice}]}}\n\n"
        ))
    }

    fn last(self, tokens: u32) -> Bytes {
        let mut text = self.chunk("\"length\"").to_vec();
        let usage = usage(tokens);
        text.extend_from_slice(
            format!("data: {{\"id\":\"fake\",\"object\":\"{}.chunk\",\"created\":1,\"model\":\"demo\",\"choices\":[],{usage}}}\n\ndata: [DONE]\n\n", self.object()).as_bytes(),
        );
        Bytes::from(text)
    }

    fn answer(self, tokens: u32) -> String {
        let words = " a".repeat(tokens as usize);
        let said = match self {
            Kind::Chat => format!(r#""message":{{"role":"assistant","content":"{words}"}}"#),
            Kind::Completion => format!(r#""text":"{words}""#),
        };
        let choice = format!(r#"{{"index":0,{said},"finish_reason":"length"}}"#);
        let object = self.object();
        let usage = usage(tokens);
        format!(
            r#"{{"id":"fake","object":"{object}","created":1,"model":"demo","choices":[{choice}],{usage}}}"#
        )
    }
}

fn usage(tokens: u32) -> String {
    format!(
        r#""usage":{{"prompt_tokens":1,"completion_tokens":{tokens},"total_tokens":{}}}"#,
        u64::from(tokens) + 1
    )
}

/// A stream's events, each written for itself: between two the connection is flushed.
struct Events {
    kind: Kind,
    token: Bytes,
    tokens: u32,
    sent: u32,
    flushed: bool,
    /// Of the first token, exactly.
    first: Alarm,
    /// Of those after it, within a millisecond.
    due: Pin<Box<Sleep>>,
    tbt: Duration,
}

impl Events {
    fn new(kind: Kind, tokens: u32, speed: Speed, alarms: &Alarms) -> Events {
        let first = Instant::now() + speed.ttft;
        let second = first + speed.tbt.saturating_sub(HALF_TICK);
        Events {
            kind,
            token: kind.chunk("null"),
            tokens,
            sent: 0,
            flushed: false,
            first: alarms.at(first),
            due: Box::pin(tokio::time::sleep_until(second.into())),
            tbt: speed.tbt,
        }
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.sent > self.tokens {
            return Poll::Ready(None);
        }
        if !self.flushed {
            self.flushed = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let due = match self.sent {
            0 => Pin::new(&mut self.first).poll(context),
            // The end follows the last token at once.
            sent if sent == self.tokens => Poll::Ready(()),
            _ => self.due.as_mut().poll(context),
        };
        if due.is_pending() {
            return Poll::Pending;
        }
        let event = if self.sent < self.tokens {
            self.token.clone()
        } else {
            self.kind.last(self.tokens)
        };
        self.sent += 1;
        self.flushed = false;
        // Each is due at its time, so that one that came late makes no other late.
        if self.sent > 1 {
            let next = self.due.deadline() + self.tbt;
            self.due.as_mut().reset(next);
        }
        Poll::Ready(Some(Ok(Frame::data(event))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_bounded_and_all_else_ignored() {
        let tokens = |json: &str| serde_json::from_str::<Asked>(json).unwrap().tokens();
        assert_eq!(tokens(r#"{"prompt": "x"}"#), DEFAULT_TOKENS);
        assert_eq!(tokens(r#"{"max_tokens": 3}"#), 3);
        assert_eq!(
            tokens(r#"{"max_tokens": 3, "max_completion_tokens": 4}"#),
            4
        );
        assert_eq!(tokens(r#"{"max_tokens": 0}"#), 1);
        assert_eq!(tokens(r#"{"max_tokens": 4294967295}"#), MAX_TOKENS);
    }

    #[tokio::test]
    async fn a_stream_is_its_tokens_one_by_one_and_then_its_end() {
        let speed = Speed {
            ttft: Duration::ZERO,
            tbt: Duration::ZERO,
        };
        let alarms = Alarms::start().unwrap();
        let mut events = Events::new(Kind::Chat, 3, speed, &alarms);
        let mut texts = Vec::new();
        while let Some(frame) = events.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            texts.push(String::from_utf8(data.to_vec()).unwrap());
        }
        assert_eq!(texts.len(), 4);
        assert!(
            texts[..3]
                .iter()
                .all(|text| text.contains(r#""content":" a""#))
        );
        assert!(texts[3].contains(r#""finish_reason":"length""#));
        assert!(texts[3].contains(r#""completion_tokens":3"#));
        assert!(texts[3].ends_with("data: [DONE]\n\n"));
    }
}
