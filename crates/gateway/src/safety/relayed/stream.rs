//! The same, event by event.

use std::convert::Infallible;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::{Relayed, choices_of, object};
use crate::error::{ApiError, ApiResult};

/// A stream whose parts are whole events, as it may be let out.
pub fn checked(relayed: Relayed, body: Body) -> Body {
    let events = Events {
        body: Some(body),
        relayed,
    };
    Body::from_stream(stream::unfold(events, |mut events| async move {
        let bytes = events.next().await?;
        Some((Ok::<Bytes, Infallible>(bytes), events))
    }))
}

/// A stream's events.
struct Events {
    /// `None` once nothing of it is wanted any more.
    body: Option<Body>,
    relayed: Relayed,
}

impl Events {
    /// The next events that are let out; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        while out.is_empty() {
            let Some(Ok(frame)) = self.body.as_mut()?.frame().await else {
                self.body = None;
                break;
            };
            let Ok(data) = frame.into_data() else {
                continue;
            };
            for event in events(&data) {
                if let Err(error) = self.event(event, &mut out).await {
                    self.fail(&error, &mut out);
                }
                if self.body.is_none() {
                    break;
                }
            }
        }
        (!out.is_empty()).then(|| Bytes::from(out))
    }

    /// Passes on of one event what may be let out.
    async fn event(&mut self, event: &[u8], out: &mut Vec<u8>) -> ApiResult<()> {
        let lines = event
            .split(|byte| *byte == b'\n')
            .map(<[u8]>::trim_ascii_end);
        let data: Vec<&[u8]> = lines
            .filter_map(|line| line.strip_prefix(b"data:"))
            .collect();
        let data = data.join(&b'\n');
        let data = data.trim_ascii();
        if data.is_empty() {
            out.extend_from_slice(event);
            return Ok(());
        }
        let relayed = &mut self.relayed;
        if data == b"[DONE]" {
            relayed.flush(out).await?;
            push(out, data);
            return Ok(());
        }
        let mut answer = object(data)?;
        let mut kept = Vec::new();
        relayed.head.get_or_insert_with(|| {
            let mut head = answer.clone();
            for name in ["choices", "usage"] {
                head.as_object_mut()
                    .and_then(|fields| fields.shift_remove(name));
            }
            head
        });
        let had_choices = !choices_of(&mut answer).is_empty();
        for mut choice in choices_of(&mut answer).iter_mut().map(Value::take) {
            let index = choice["index"].as_u64().unwrap_or(0);
            if relayed.closed.contains(&index) {
                continue;
            }
            let last = choice["finish_reason"].is_string();
            relayed
                .check_choice(index, "delta", &mut choice, last)
                .await?;
            kept.push(choice);
        }
        if !had_choices {
            // An error, or usage alone.
            push(out, data);
        } else if !kept.is_empty() {
            answer["choices"] = kept.into();
            push(out, answer.to_string().as_bytes());
        }
        let all = relayed
            .choices
            .is_some_and(|all| relayed.closed.len() >= all as usize);
        if relayed.cut && all {
            self.body = None;
            if self.relayed.wants_usage {
                answer["choices"] = json!([]);
                answer["usage"] = self.relayed.usage();
                push(out, answer.to_string().as_bytes());
            }
            push(out, b"[DONE]");
        }
        Ok(())
    }

    /// Ends the stream.
    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        self.body = None;
        let note = error.note();
        let status = error.status.as_u16();
        self.relayed
            .record
            .update(|progress| progress.failed = Some((status, note)));
        push(out, &error.to_json());
    }
}

impl Relayed {
    /// What is held back of choices whose end was never told.
    async fn flush(&mut self, out: &mut Vec<u8>) -> ApiResult<()> {
        let mut open: Vec<u64> = self.texts.iter().map(|text| text.choice).collect();
        open.sort_unstable();
        open.dedup();
        open.retain(|index| !self.closed.contains(index));
        for index in open {
            let mut choice = json!({"index": index});
            self.check_choice(index, "delta", &mut choice, true).await?;
            if choice.as_object().is_some_and(|fields| fields.len() > 1) {
                let mut event = self.head.clone().unwrap_or_else(|| json!({}));
                event["choices"] = json!([choice]);
                push(out, event.to_string().as_bytes());
            }
        }
        Ok(())
    }

    /// What was used until the stream was cut.
    fn usage(&self) -> Value {
        self.record.update(|progress| {
            json!({
                "prompt_tokens": progress.prompt_tokens,
                "completion_tokens": progress.output_tokens,
                "total_tokens": progress.prompt_tokens + progress.output_tokens,
            })
        })
    }
}

fn push(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\n\n");
}

/// Whole events, each with the empty line that ends it.
fn events(bytes: &[u8]) -> Vec<&[u8]> {
    let mut events = Vec::new();
    let (mut start, mut line) = (0, 0);
    for at in memchr::memchr_iter(b'\n', bytes) {
        if matches!(&bytes[line..at], b"" | b"\r") {
            events.push(&bytes[start..=at]);
            start = at + 1;
        }
        line = at + 1;
    }
    if start < bytes.len() {
        events.push(&bytes[start..]);
    }
    events
}
