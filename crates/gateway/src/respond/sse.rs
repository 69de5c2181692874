//! Server-sent events. A step's frames go into one buffer and leave in one write; while the client does not read,
//! nothing is made and the ids wait in the request's stream, which `max_tokens` bounds.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;

use crate::choice::ChoiceEvent;
use crate::error::ApiResult;
use crate::generation::Generation;
use crate::record::RequestRecord;
use crate::stages::Stage;

/// Turns events into one endpoint's frames.
pub trait Format: Send + 'static {
    fn events(&mut self, generation: &Generation, events: Vec<ChoiceEvent>, out: &mut Frames);
    /// Frames after the last event, before `[DONE]`.
    fn end(&mut self, generation: &Generation, record: &RequestRecord, out: &mut Frames);
}

/// Frames that leave together.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// Adds `data: JSON` as one frame. JSON holds no line break, so one line is all it takes.
    pub fn push(&mut self, body: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        // Writing our own types to memory cannot fail.
        let _ = serde_json::to_writer(&mut self.0, body);
        self.0.extend_from_slice(b"\n\n");
    }

    fn raw(&mut self, data: &[u8]) {
        self.0.extend_from_slice(b"data: ");
        self.0.extend_from_slice(data);
        self.0.extend_from_slice(b"\n\n");
    }
}

struct Stream<F> {
    generation: Generation,
    format: F,
    record: Arc<RequestRecord>,
    /// What came before the response's head was sent.
    first: Option<Vec<ChoiceEvent>>,
    ended: bool,
}

/// Waits for the first output, so that what fails before it is an HTTP status and the head can tell its stages; then
/// answers with the stream.
///
/// # Errors
/// What ended the request before its first output.
pub async fn respond<F: Format>(
    mut generation: Generation,
    format: F,
    record: Arc<RequestRecord>,
) -> ApiResult<Response> {
    let first = generation.next().await.transpose()?;
    let stream = Stream {
        generation,
        format,
        record,
        first,
        ended: false,
    };
    // In a box: `unfold` has room for it twice, in its state and in the future of the next write.
    let stream = Box::new(stream);
    let body = Body::from_stream(stream::unfold(stream, |mut stream| async move {
        let bytes = stream.next_bytes().await?;
        Some((Ok::<Bytes, Infallible>(bytes), stream))
    }));
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (
            header::HeaderName::from_static("x-accel-buffering"),
            HeaderValue::from_static("no"),
        ),
    ];
    Ok((headers, body).into_response())
}

impl<F: Format> Stream<F> {
    /// The next write; `None` at the end.
    async fn next_bytes(&mut self) -> Option<Bytes> {
        let mut out = Frames::default();
        while out.0.is_empty() {
            if self.ended {
                return None;
            }
            let next = match self.first.take() {
                Some(events) => Some(Ok(events)),
                None => self.generation.next().await,
            };
            let start = Instant::now();
            match next {
                Some(Ok(events)) => self.format.events(&self.generation, events, &mut out),
                Some(Err(error)) => {
                    out.raw(&error.to_json());
                    self.ended = true;
                }
                None => {}
            }
            if !self.ended && self.generation.is_finished() {
                self.format.end(&self.generation, &self.record, &mut out);
                out.raw(b"[DONE]");
                self.ended = true;
            }
            self.record.add(Stage::Serialise, start.elapsed());
        }
        Some(Bytes::from(out.0))
    }
}
