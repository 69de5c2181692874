//! What the gateway reads of a request that it passes on, and the few bytes of it that it changes.
//!
//! ```text
//! {"model": "chat", "messages": [...], "stream": true}
//!           ^^^^^^ the upstream's name of the model
//!  ^ "stream_options":{"include_usage":true}, so that the stream can be metered
//! ```
//!
//! `deadline_ms`, which is the gateway's own, is cut out: some servers refuse fields that they do not know.

use std::ops::Range;

use bytes::Bytes;
use serde_json::Value;

use crate::error::{ApiError, ApiResult};
use crate::request::fields::{got, wrong};

mod top;

use top::{Prompt, Top};

const MAX_DEADLINE_MS: u64 = 86_400_000;
/// Of a value that is read: more would be parsed for nothing.
const MAX_FIELD_BYTES: usize = 4096;

/// A request that is passed on.
#[derive(Debug, Default, PartialEq)]
pub struct Asked {
    /// As the client gave it.
    pub model: Option<String>,
    pub stream: bool,
    /// The usage of a stream is asked for by the gateway alone, and kept from the client.
    pub usage_is_ours: bool,
    pub max_tokens: Option<u32>,
    pub n: u32,
    pub deadline_ms: Option<u64>,
    pub prompt: Prompt,
    model_at: Option<Range<usize>>,
    /// It has fields besides those that are cut out.
    has_more: bool,
    /// What is put in the place of a part of the body, in the body's order.
    edits: Vec<(Range<usize>, Bytes)>,
}

impl Asked {
    /// Reads a body; what is not read here is the upstream's to check.
    ///
    /// # Errors
    /// 400 for what is no JSON object, and for bad values of the fields that the gateway acts on.
    pub fn read(body: &[u8]) -> ApiResult<Asked> {
        let text = std::str::from_utf8(body).map_err(|e| {
            let at = e.valid_up_to();
            ApiError::body(format!(
                "the request body is not UTF-8: byte {at} cannot be there"
            ))
        })?;
        let top = Top::read(text)?;
        let value = |name: &str, place: &Option<Range<usize>>| {
            let parse = |place: Range<usize>| match place.len() {
                ..=MAX_FIELD_BYTES => serde_json::from_str(&text[place]).map_err(invalid),
                bytes => Err(ApiError::field(
                    name,
                    format!("{name}: got {bytes} bytes, allowed are {MAX_FIELD_BYTES}"),
                )),
            };
            place.clone().map(parse).transpose()
        };
        let max_tokens = count(value("max_tokens", &top.max_tokens)?);
        let max_completion_tokens = value("max_completion_tokens", &top.max_completion_tokens)?;
        let mut asked = Asked {
            prompt: top.prompt(text),
            model: string("model", value("model", &top.model)?)?,
            model_at: top.model,
            has_more: top.fields > usize::from(top.deadline_ms.is_some()),
            stream: boolean("stream", value("stream", &top.stream)?)?,
            max_tokens: count(max_completion_tokens).or(max_tokens),
            n: count(value("n", &top.n)?).unwrap_or(1).max(1),
            deadline_ms: deadline(value("deadline_ms", &top.deadline_ms)?)?,
            ..Asked::default()
        };
        if let Some(place) = &top.deadline_ms {
            let cut = field_around(text, place);
            asked.edits.push((cut, Bytes::new()));
        }
        if asked.stream {
            let options = value("stream_options", &top.stream_options)?;
            asked.ask_for_usage(text, options.zip(top.stream_options));
        }
        asked.edits.sort_by_key(|(range, _)| range.start);
        Ok(asked)
    }

    fn ask_for_usage(&mut self, text: &str, options: Option<(Value, Range<usize>)>) {
        const WANTED: &str = r#"{"include_usage":true}"#;
        let Some((options, range)) = options else {
            // There is a field, "stream", that can follow the comma.
            let first = text.find('{').map_or(0, |brace| brace + 1);
            let field = format!(r#""stream_options":{WANTED},"#);
            self.edits.push((first..first, Bytes::from(field)));
            self.usage_is_ours = true;
            return;
        };
        let wanted = match options {
            Value::Null => WANTED.to_owned(),
            Value::Object(mut options)
                if options.get("include_usage") != Some(&Value::Bool(true)) =>
            {
                options.insert("include_usage".to_owned(), true.into());
                Value::Object(options).to_string()
            }
            // It is asked for already, or it is the upstream's to refuse.
            _ => return,
        };
        self.edits.push((range, Bytes::from(wanted)));
        self.usage_is_ours = true;
    }

    /// The body for an upstream, in parts; those that did not change are shared with `body`.
    #[must_use]
    pub fn parts(&self, body: &Bytes, model: &str) -> Vec<Bytes> {
        let renamed =
            (self.model.as_deref() != Some(model)).then(|| Value::from(model).to_string());
        let mut edits = self.edits.clone();
        match (renamed, &self.model_at) {
            (Some(name), Some(range)) => edits.push((range.clone(), Bytes::from(name))),
            (Some(name), None) => {
                let first = memchr::memchr(b'{', body).map_or(0, |brace| brace + 1);
                let comma = if self.has_more { "," } else { "" };
                let field = format!(r#""model":{name}{comma}"#);
                edits.push((first..first, Bytes::from(field)));
            }
            (None, _) => {}
        }
        edits.sort_by_key(|(range, _)| range.start);
        let mut parts = Vec::with_capacity(2 * edits.len() + 1);
        let mut from = 0;
        for (range, replacement) in edits {
            parts.push(body.slice(from..range.start.max(from)));
            parts.push(replacement);
            from = range.end.max(from);
        }
        parts.push(body.slice(from..));
        parts.retain(|part| !part.is_empty());
        parts
    }
}

/// Of a field whose value is at `value`, all that has to go with it: its key, and one comma.
fn field_around(text: &str, value: &Range<usize>) -> Range<usize> {
    let bytes = text.as_bytes();
    let before = |mut at: usize, what: u8| {
        while at > 0 && bytes[at - 1] != what {
            at -= 1;
        }
        at.saturating_sub(1)
    };
    // No quote is in this key, however it is escaped, so the two nearest ones are its own.
    let start = before(before(value.start, b'"'), b'"');
    let ahead = text[..start].trim_ascii_end();
    if ahead.ends_with(',') {
        return ahead.len() - 1..value.end;
    }
    let behind = text[value.end..].trim_ascii_start();
    let comma = usize::from(behind.starts_with(','));
    start..text.len() - behind.len() + comma
}

fn invalid(error: impl std::fmt::Display) -> Box<ApiError> {
    ApiError::body(format!("the request body is not valid JSON: {error}"))
}

fn string(name: &str, value: Option<Value>) -> ApiResult<Option<String>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(name, &other, "a string")),
    }
}

fn boolean(name: &str, value: Option<Value>) -> ApiResult<bool> {
    match value {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(value),
        Some(other) => Err(wrong(name, &other, "true or false")),
    }
}

/// A number that quotas are reckoned with; whether it is allowed, the upstream says.
fn count(value: Option<Value>) -> Option<u32> {
    let number = value?.as_f64()?;
    (number >= 0.0).then_some(number as u32)
}

fn deadline(value: Option<Value>) -> ApiResult<Option<u64>> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    match value
        .as_u64()
        .filter(|ms| (1..=MAX_DEADLINE_MS).contains(ms))
    {
        Some(ms) => Ok(Some(ms)),
        None => Err(ApiError::field(
            "deadline_ms",
            format!(
                "deadline_ms: got {}, allowed is an integer from 1 to {MAX_DEADLINE_MS}",
                got(&value)
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;

    fn sent(body: &str, model: &str) -> String {
        let bytes = Bytes::from(body.to_owned());
        let asked = Asked::read(&bytes).unwrap();
        String::from_utf8(asked.parts(&bytes, model).concat()).unwrap()
    }

    #[test]
    fn a_body_is_changed_only_where_it_must_be() {
        let plain = r#"{"model": "m", "messages": [{"x": "\"model\": 1"}],  "seed":1e3}"#;
        assert_eq!(sent(plain, "m"), plain);
        assert_eq!(
            sent(plain, "o/p"),
            plain.replace(r#""model": "m""#, r#""model": "o/p""#)
        );
        assert_eq!(sent(" {}", "m"), r#" {"model":"m"}"#);
        assert_eq!(sent(r#"{"deadline_ms":5}"#, "m"), r#"{"model":"m"}"#);
        assert_eq!(
            sent(r#"{"deadline_ms":5,"a":1}"#, "m"),
            r#"{"model":"m","a":1}"#
        );
        assert_eq!(sent(r#"{"a":1}"#, "m"), r#"{"model":"m","a":1}"#);
        assert_eq!(
            sent(r#"{"model":null,"a":1}"#, "m"),
            r#"{"model":"m","a":1}"#
        );
        assert_eq!(
            sent(r#"{"m\u006fdel":"x"}"#, "m\""),
            r#"{"m\u006fdel":"m\""}"#
        );
    }

    #[test]
    fn a_stream_is_asked_for_its_usage() {
        for (body, changed, ours) in [
            (
                r#"{"model":"m","stream":true}"#,
                r#"{"stream_options":{"include_usage":true},"model":"m","stream":true}"#,
                true,
            ),
            (
                r#"{"stream_options":null,"stream":true,"model":"m"}"#,
                r#"{"stream_options":{"include_usage":true},"stream":true,"model":"m"}"#,
                true,
            ),
            (
                r#"{"model":"m","stream":true,"stream_options":{"a":1,"include_usage":false}}"#,
                r#"{"model":"m","stream":true,"stream_options":{"a":1,"include_usage":true}}"#,
                true,
            ),
            (
                r#"{"model":"m","stream":true,"stream_options":{"include_usage": true}}"#,
                r#"{"model":"m","stream":true,"stream_options":{"include_usage": true}}"#,
                false,
            ),
            (
                r#"{"model":"m","stream":true,"stream_options":7}"#,
                r#"{"model":"m","stream":true,"stream_options":7}"#,
                false,
            ),
            (
                r#"{"model":"m","stream":false}"#,
                r#"{"model":"m","stream":false}"#,
                false,
            ),
        ] {
            assert_eq!(sent(body, "m"), changed);
            assert_eq!(Asked::read(body.as_bytes()).unwrap().usage_is_ours, ours);
        }
    }

    #[test]
    fn the_gateways_own_field_is_cut_out() {
        for (body, changed) in [
            (
                r#"{"model":"m" , "deadline_ms": 5 ,"a":1}"#,
                r#"{"model":"m"  ,"a":1}"#,
            ),
            (r#"{"deadline_ms":5,"model":"m"}"#, r#"{"model":"m"}"#),
            (
                r#"{ "deadl\u0069ne_ms" : 5 , "model":"m"}"#,
                r#"{  "model":"m"}"#,
            ),
            (r#"{"model":"m","deadline_ms":null}"#, r#"{"model":"m"}"#),
        ] {
            assert_eq!(sent(body, "m"), changed);
        }
        assert_eq!(
            Asked::read(br#"{"deadline_ms": 5}"#).unwrap().deadline_ms,
            Some(5)
        );
    }

    #[test]
    fn what_the_gateway_acts_on_is_checked() {
        for (body, says) in [
            ("", "expected an object at byte 0"),
            ("[1]", "expected an object at byte 0"),
            ("{\"model\":}", "not valid JSON: expected a value at byte 9"),
            ("{\"model\":\"\\q\"}", "not valid JSON: expected an escape"),
            ("{\"model\":1}", "model: got 1, allowed is a string"),
            ("{\"stream\":\"yes\"}", "stream: got \"yes\""),
            ("{\"deadline_ms\":0}", "deadline_ms: got 0"),
            ("{\"model\":\"a\",\"mod\\u0065l\":\"b\"}", "duplicate field"),
            ("{\"messages\":[],\"messages\":[]}", "duplicate field"),
            ("{\"suffix\":\"\",\"suffix\":\"\"}", "duplicate field"),
        ] {
            let message = Asked::read(body.as_bytes()).unwrap_err().message;
            assert!(message.contains(says), "{message}");
        }
        assert!(
            Asked::read(b"{\"a\":\"\xff\"}")
                .unwrap_err()
                .message
                .contains("byte 6")
        );
        let long = format!(r#"{{"n":[{}1]}}"#, "1,".repeat(2048));
        let error = Asked::read(long.as_bytes()).unwrap_err();
        assert_eq!(error.message, "n: got 4099 bytes, allowed are 4096");
        let asked = Asked::read(br#"{"max_tokens":7,"max_completion_tokens":9,"n":3}"#).unwrap();
        assert_eq!((asked.max_tokens, asked.n), (Some(9), 3));
    }

    #[test]
    fn any_place_of_the_edited_fields_gives_json_with_the_same_rest() {
        let fields = [
            r#""model": "m""#,
            r#" "stream" :true"#,
            r#""deadline_ms":7 "#,
            r#""x":[{"a":"}"}]"#,
        ];
        for order in 0..24 {
            let mut left: Vec<&str> = fields.to_vec();
            let mut pick = order;
            let mut chosen = Vec::new();
            while !left.is_empty() {
                chosen.push(left.remove(pick % left.len()));
                pick /= left.len() + 1;
            }
            let body = format!("{{{}}}", chosen.join(","));
            let value: Map<String, Value> = serde_json::from_str(&sent(&body, "other")).unwrap();
            let expected = serde_json::json!({
                "model": "other", "stream": true, "stream_options": {"include_usage": true}, "x": [{"a": "}"}]
            });
            assert_eq!(Value::Object(value), expected, "{body}");
        }
    }
}
