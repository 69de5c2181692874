//! Reading an answer's body, and what its end or its breaking off means.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Response;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use tokio::time::timeout;

use crate::answer::Answer;
use crate::record::{Failure, FailureKind};
use crate::sse::{EventTooLong, SseParser};

/// How long after `[DONE]` the body may take to end before its connection is given up.
const AFTER_DONE: Duration = Duration::from_millis(500);

pub(crate) fn require_event_stream(response: &Response<Incoming>) -> Result<(), Failure> {
    let content_type = response.headers().get(CONTENT_TYPE);
    let content_type = content_type.map_or("", |value| value.to_str().unwrap_or("?"));
    match content_type
        .trim_start()
        .to_ascii_lowercase()
        .starts_with("text/event-stream")
    {
        true => Ok(()),
        false => Err(Failure::new(
            FailureKind::Garbage,
            format!("a stream was asked for, the answer's content type is {content_type:?}"),
        )),
    }
}

/// Judges a body that ended without `[DONE]`.
pub(crate) fn finish(answer: &Answer, parser: &SseParser, bytes_seen: bool) -> Result<(), Failure> {
    if answer.is_complete() {
        return Ok(());
    }
    let (kind, message) = if !bytes_seen {
        (FailureKind::Empty, "the stream ended without a byte")
    } else if answer.token_chunks() == 0 && parser.unknown_lines() > 0 {
        (
            FailureKind::Garbage,
            "the body is not a server-sent event stream",
        )
    } else {
        (
            FailureKind::Unfinished,
            "the stream ended without [DONE] or a finish reason",
        )
    };
    Err(Failure::new(kind, message))
}

/// Whether nothing but the body's end follows.
pub(crate) async fn ends_soon(body: &mut Incoming) -> bool {
    let rest = timeout(AFTER_DONE, async {
        while let Some(frame) = body.frame().await {
            let data = frame.ok().and_then(|frame| frame.into_data().ok());
            if data.is_none_or(|data| !data.trim_ascii().is_empty()) {
                return false;
            }
        }
        true
    });
    rest.await.unwrap_or(false)
}

/// The body's first `limit` bytes, and whether it ended within them.
pub(crate) async fn read_up_to(
    mut body: Incoming,
    limit: usize,
) -> Result<(Vec<u8>, bool), Failure> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(|error| http_failure(&error))?.into_data() {
            bytes.extend_from_slice(&data[..data.len().min(limit - bytes.len())]);
        }
        if bytes.len() >= limit {
            return Ok((bytes, false));
        }
    }
    Ok((bytes, true))
}

pub(crate) fn http_failure(error: &hyper::Error) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    let mut is_io = false;
    while let Some(inner) = cause {
        is_io |= inner.is::<io::Error>();
        message = format!("{message}: {inner}");
        cause = inner.source();
    }
    let broken = is_io || error.is_incomplete_message() || error.is_canceled() || error.is_closed();
    let kind = if error.is_parse() || !broken {
        FailureKind::Garbage
    } else {
        FailureKind::Reset
    };
    Failure::new(kind, message)
}

impl From<EventTooLong> for Failure {
    fn from(error: EventTooLong) -> Failure {
        Failure::new(FailureKind::Garbage, error.to_string())
    }
}
