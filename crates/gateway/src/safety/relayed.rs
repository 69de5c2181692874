//! What a server elsewhere says: each text of an answer passes the hooks by itself, and the JSON around it stays.
//!
//! ```text
//! choices[i].delta | .message   content, reasoning, refusal, tool_calls[k].function.arguments
//! choices[i]                    text
//! ```

use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use serde_json::{Value, json};

use super::chain::{Chain, End};
use super::{Notes, Safety};
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;
use crate::served::Served;

mod stream;

/// Texts of one answer; an honest server has a few for each choice.
const MAX_TEXTS: usize = 8192;
/// What a choice says besides its text.
const TELLING: [&str; 4] = [
    "logprobs",
    "token_ids",
    "prompt_token_ids",
    "prompt_logprobs",
];
const FIELDS: [&str; 4] = ["content", "reasoning_content", "reasoning", "refusal"];

/// An answer that is checked.
pub struct Relayed {
    safety: Arc<Safety>,
    record: Arc<RequestRecord>,
    served: Arc<Served>,
    texts: Vec<Text>,
    closed: Vec<u64>,
    /// A hook has ended a choice.
    cut: bool,
    /// Choices that the answer will have, where that is known.
    choices: Option<u32>,
    /// The client asked a stream for its usage.
    wants_usage: bool,
    /// What every event of a stream repeats, from its first one.
    head: Option<Value>,
}

struct Text {
    choice: u64,
    place: Place,
    chain: Chain,
    ended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Of a text completion.
    Text,
    /// One of `FIELDS`.
    Field(&'static str),
    /// What a tool is called with.
    Arguments(u64),
}

impl Relayed {
    /// `None` where no hook looks at answers. `choices`: how many there will be, if that is known.
    #[must_use]
    pub fn of(
        served: &Arc<Served>,
        record: &Arc<RequestRecord>,
        choices: Option<u32>,
        wants_usage: bool,
    ) -> Option<Relayed> {
        let safety = served
            .safety
            .as_ref()
            .filter(|safety| safety.checks_responses())?;
        Some(Relayed {
            safety: Arc::clone(safety),
            record: Arc::clone(record),
            served: Arc::clone(served),
            texts: Vec::new(),
            closed: Vec::new(),
            cut: false,
            choices,
            wants_usage,
            head: None,
        })
    }

    /// A whole answer, as it may be let out.
    ///
    /// # Errors
    /// A hook refuses it, or it cannot be read.
    pub async fn whole(mut self, json: &[u8]) -> ApiResult<Bytes> {
        let mut answer = object(json)?;
        for (number, choice) in choices_of(&mut answer).iter_mut().enumerate() {
            let index = choice["index"].as_u64().unwrap_or(number as u64);
            self.check_choice(index, "message", choice, true).await?;
        }
        Ok(Bytes::from(answer.to_string()))
    }

    /// A stream whose parts are whole events, as it may be let out.
    pub fn stream(self, body: Body) -> Body {
        stream::checked(self, body)
    }

    /// Leaves in a choice what may be let out. With `last` no more of it comes.
    async fn check_choice(
        &mut self,
        index: u64,
        container: &str,
        choice: &mut Value,
        mut last: bool,
    ) -> ApiResult<()> {
        let fields = choice.as_object_mut().ok_or_else(unreadable)?;
        if self.safety.reads_responses() {
            for name in TELLING {
                if let Some(value) = fields.get_mut(name) {
                    *value = Value::Null;
                }
            }
        }
        let mut end = None;
        for place in places(&choice[container], choice) {
            let number = self.text(index, place)?;
            let Some(text) = text_at(choice, container, place) else {
                continue;
            };
            let ended = self.push(number, text, last).await?;
            last |= ended.is_some();
            end = end.or(ended);
        }
        if last {
            self.closed.push(index);
            for number in 0..self.texts.len() {
                let (of, place) = (self.texts[number].choice, self.texts[number].place);
                if of != index || self.texts[number].ended {
                    continue;
                }
                let mut rest = String::new();
                let ended = self.push(number, &mut rest, true).await?;
                end = end.or(ended);
                if !rest.is_empty()
                    && let Some(text) = make_text_at(choice, container, place)
                {
                    text.push_str(&rest);
                }
            }
        }
        if let Some(end) = end {
            self.cut = true;
            choice["finish_reason"] = end.finish_reason.into();
            choice["stop_reason"] = (&*end.hook).into();
            self.record
                .update(|progress| progress.finish = Some(end.finish_reason));
        }
        Ok(())
    }

    /// The number of a text, which may be new.
    fn text(&mut self, choice: u64, place: Place) -> ApiResult<usize> {
        let is_it = |text: &Text| text.choice == choice && text.place == place;
        if let Some(number) = self.texts.iter().position(is_it) {
            return Ok(number);
        }
        if self.texts.len() == MAX_TEXTS {
            return Err(unreadable());
        }
        self.texts.push(Text {
            choice,
            place,
            chain: Chain::new(&self.safety),
            ended: false,
        });
        Ok(self.texts.len() - 1)
    }

    async fn push(
        &mut self,
        number: usize,
        text: &mut String,
        last: bool,
    ) -> ApiResult<Option<End>> {
        let notes = Notes {
            record: &self.record,
            served: &self.served,
        };
        let of = &mut self.texts[number];
        if of.ended {
            text.clear();
            return Ok(None);
        }
        let end = of.chain.push(&self.safety, text, last, notes).await?;
        of.ended = last || end.is_some();
        Ok(end)
    }
}

/// The texts that are there.
fn places(message: &Value, choice: &Value) -> Vec<Place> {
    let text = choice["text"].is_string().then_some(Place::Text);
    let fields = FIELDS
        .into_iter()
        .filter(|field| message[*field].is_string())
        .map(Place::Field);
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let arguments = calls
        .enumerate()
        .filter(|(_, call)| call["function"]["arguments"].is_string())
        .map(|(number, call)| Place::Arguments(number_of(number, call)));
    text.into_iter().chain(fields).chain(arguments).collect()
}

/// Which of the tools it is; whole answers do not say it.
fn number_of(number: usize, call: &Value) -> u64 {
    call["index"].as_u64().unwrap_or(number as u64)
}

fn text_at<'a>(choice: &'a mut Value, container: &str, place: Place) -> Option<&'a mut String> {
    let value = match place {
        Place::Text => choice.get_mut("text"),
        Place::Field(field) => choice.get_mut(container)?.get_mut(field),
        Place::Arguments(wanted) => {
            let calls = choice
                .get_mut(container)?
                .get_mut("tool_calls")?
                .as_array_mut()?;
            let mut numbered = calls.iter_mut().enumerate();
            let (_, call) = numbered.find(|(number, call)| number_of(*number, call) == wanted)?;
            call.get_mut("function")?.get_mut("arguments")
        }
    };
    match value {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

/// The same, made where it is not there.
fn make_text_at<'a>(
    choice: &'a mut Value,
    container: &str,
    place: Place,
) -> Option<&'a mut String> {
    let has_room = matches!(choice[container], Value::Null | Value::Object(_));
    if has_room && text_at(choice, container, place).is_none() {
        match place {
            Place::Text => choice["text"] = "".into(),
            Place::Field(field) => choice[container][field] = "".into(),
            Place::Arguments(number) => {
                let call = json!({"index": number, "function": {"arguments": ""}});
                let calls = &mut choice[container]["tool_calls"];
                match calls.as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => *calls = json!([call]),
                }
            }
        }
    }
    text_at(choice, container, place)
}

fn choices_of(answer: &mut Value) -> &mut [Value] {
    match answer.get_mut("choices") {
        Some(Value::Array(choices)) => choices,
        _ => &mut [],
    }
}

fn object(json: &[u8]) -> ApiResult<Value> {
    serde_json::from_slice(json)
        .ok()
        .filter(Value::is_object)
        .ok_or_else(unreadable)
}

/// What cannot be read cannot be checked.
fn unreadable() -> Box<ApiError> {
    ApiError::upstream_failed("the upstream's answer cannot be read, and so not be checked")
}
