//! Takes typed fields out of a JSON object; what is left at the end was unknown.

use serde_json::{Map, Value};

use crate::error::{ApiError, ApiResult, shown};

/// Names in a warning are cut to this, and so is their number.
const MAX_WARNED_NAME_BYTES: usize = 64;
const MAX_WARNED_NAMES: usize = 10;

/// A request's JSON object. A field that is `null` counts as absent everywhere.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
}

/// A range of numbers in words and in effect.
#[derive(Debug, Clone, Copy)]
pub struct FloatRange {
    pub low: f64,
    pub low_is_open: bool,
    pub high: f64,
}

impl FloatRange {
    #[must_use]
    pub const fn closed(low: f64, high: f64) -> FloatRange {
        FloatRange {
            low,
            low_is_open: false,
            high,
        }
    }

    #[must_use]
    pub const fn above(low: f64, high: f64) -> FloatRange {
        FloatRange {
            low,
            low_is_open: true,
            high,
        }
    }

    fn contains(&self, value: f64) -> bool {
        value <= self.high
            && if self.low_is_open {
                value > self.low
            } else {
                value >= self.low
            }
    }

    fn words(&self) -> String {
        let low = if self.low_is_open { "more than " } else { "" };
        format!("a number from {low}{} to {}", self.low, self.high)
    }
}

impl Fields {
    /// Reads a body.
    ///
    /// # Errors
    /// 400 with the position of what is not UTF-8, not JSON or not an object.
    pub fn parse(body: &[u8]) -> ApiResult<Fields> {
        let text = std::str::from_utf8(body).map_err(|e| {
            ApiError::body(format!(
                "the request body is not UTF-8: byte {} cannot be there",
                e.valid_up_to()
            ))
        })?;
        if text.trim_ascii().is_empty() {
            return Err(ApiError::body(
                "the request body is empty; a JSON object is needed",
            ));
        }
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Fields { map }),
            Ok(other) => Err(ApiError::body(format!(
                "the request body must be a JSON object, got {}",
                got(&other)
            ))),
            Err(e) => Err(ApiError::body(format!(
                "the request body is not valid JSON: {e}"
            ))),
        }
    }

    /// The field, unless absent or null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    pub fn bool(&mut self, name: &str) -> ApiResult<Option<bool>> {
        self.take(name)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| wrong(name, &value, "true or false"))
            })
            .transpose()
    }

    /// An integer; `2.0` counts as one.
    pub fn int(&mut self, name: &str, low: i64, high: i64) -> ApiResult<Option<i64>> {
        self.take(name)
            .map(|value| {
                as_integer(&value)
                    .filter(|v| (low..=high).contains(v))
                    .ok_or_else(|| wrong(name, &value, &format!("an integer from {low} to {high}")))
            })
            .transpose()
    }

    pub fn u32(&mut self, name: &str, low: u32, high: u32) -> ApiResult<Option<u32>> {
        Ok(self
            .int(name, low.into(), high.into())?
            .and_then(|value| u32::try_from(value).ok()))
    }

    pub fn float(&mut self, name: &str, range: FloatRange) -> ApiResult<Option<f32>> {
        self.take(name)
            .map(|value| {
                value
                    .as_f64()
                    .filter(|v| range.contains(*v))
                    // What is too small to be told from an open end is that end.
                    .filter(|v| !range.low_is_open || f64::from(normal(*v)) > range.low)
                    .map(normal)
                    .ok_or_else(|| wrong(name, &value, &range.words()))
            })
            .transpose()
    }

    pub fn string(&mut self, name: &str) -> ApiResult<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, &other, "a string")),
        }
    }

    pub fn object(&mut self, name: &str) -> ApiResult<Option<Map<String, Value>>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong(name, &other, "an object")),
        }
    }

    pub fn ids(&mut self, name: &str, max: usize) -> ApiResult<Option<Vec<u32>>> {
        self.take(name)
            .map(|value| token_ids(name, value, max))
            .transpose()
    }

    /// Accepts the field only while `is_default` says that it asks for nothing.
    pub fn refuse(
        &mut self,
        name: &str,
        allowed: &str,
        is_default: impl FnOnce(&Value) -> bool,
    ) -> ApiResult<()> {
        match self.take(name) {
            Some(value) if !is_default(&value) => Err(ApiError::unsupported(
                name,
                format!(
                    "{name}: not supported by this server; got {}, allowed is {allowed}",
                    got(&value)
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The value of the warning header, if any field is left.
    #[must_use]
    pub fn unknown(self) -> Option<String> {
        let names: Vec<String> = self
            .map
            .keys()
            .take(MAX_WARNED_NAMES)
            .map(|name| harmless(name))
            .collect();
        if names.is_empty() {
            return None;
        }
        let more = self.map.len() - names.len();
        let tail = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        Some(format!(
            "unknown fields ignored: {}{tail}",
            names.join(", ")
        ))
    }
}

/// The name as a header may carry it.
fn harmless(name: &str) -> String {
    let visible = |c: char| {
        if c.is_ascii_graphic() && c != ',' {
            c
        } else {
            '?'
        }
    };
    let cut: String = name
        .chars()
        .take(MAX_WARNED_NAME_BYTES)
        .map(visible)
        .collect();
    if name.chars().nth(MAX_WARNED_NAME_BYTES).is_some() {
        format!("{cut}...")
    } else {
        cut
    }
}

/// As 32 bits; what is smaller than they can say exactly is 0.
fn normal(value: f64) -> f32 {
    let value = value as f32;
    if value.is_normal() { value } else { 0.0 }
}

pub fn as_integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        let float = value.as_f64()?;
        (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
    })
}

/// A value as an error message may repeat it.
pub fn got(value: &Value) -> String {
    match value {
        Value::String(text) => shown(text),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(map) => format!("an object of {} fields", map.len()),
        scalar => scalar.to_string(),
    }
}

pub fn wrong(name: &str, value: &Value, allowed: &str) -> Box<ApiError> {
    ApiError::field(
        name,
        format!("{name}: got {}, allowed is {allowed}", got(value)),
    )
}

pub fn missing(name: &str, allowed: &str) -> Box<ApiError> {
    ApiError::field(name, format!("{name}: missing, needed is {allowed}"))
}

/// A list of token ids; whether the model knows them is checked when the model is.
pub fn token_ids(name: &str, value: Value, max: usize) -> ApiResult<Vec<u32>> {
    let Value::Array(items) = value else {
        return Err(wrong(name, &value, "a list of token ids"));
    };
    if items.len() > max {
        return Err(ApiError::field(
            name,
            format!("{name}: got {} ids, allowed are at most {max}", items.len()),
        ));
    }
    let id = |(index, item): (usize, &Value)| {
        as_integer(item)
            .and_then(|v| u32::try_from(v).ok())
            .ok_or_else(|| {
                wrong(
                    &format!("{name}[{index}]"),
                    item,
                    "a token id, an integer of 0 or more",
                )
            })
    };
    items.iter().enumerate().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn bad_bodies_are_told_where() {
        for (body, says) in [
            (&b""[..], "empty"),
            (b"{\"a\": \xff}", "byte 6"),
            (b"{\"a\": }", "line 1 column 7"),
            (b"[1]", "a list of 1"),
            (b"{\"a\": NaN}", "line 1"),
            (b"{\"a\": 1e999}", "number out of range"),
        ] {
            let message = Fields::parse(body).unwrap_err().message;
            assert!(message.contains(says), "{message}");
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(
            Fields::parse(deep.as_bytes())
                .unwrap_err()
                .message
                .contains("recursion")
        );
    }

    #[test]
    fn numbers_keep_to_their_ranges() {
        assert_eq!(fields(r#"{"n": 2.0}"#).int("n", 1, 3).unwrap(), Some(2));
        assert_eq!(fields(r#"{"n": null}"#).int("n", 1, 3).unwrap(), None);
        for bad in [
            "0",
            "4",
            "1.5",
            "\"2\"",
            "true",
            "[]",
            "99999999999999999999",
        ] {
            let error = fields(&format!("{{\"n\": {bad}}}"))
                .int("n", 1, 3)
                .unwrap_err();
            assert!(
                error.message.contains("an integer from 1 to 3"),
                "{}",
                error.message
            );
            assert_eq!(error.param.as_deref(), Some("n"));
        }
        let open = FloatRange::above(0.0, 1.0);
        assert_eq!(fields(r#"{"p": 1}"#).float("p", open).unwrap(), Some(1.0));
        for bad in ["0", "1e-42", "1e-60"] {
            let given = fields(&format!("{{\"p\": {bad}}}")).float("p", open);
            assert!(given.is_err(), "{bad}");
        }
    }

    #[test]
    fn unknown_fields_make_one_bounded_line() {
        assert_eq!(fields("{}").unknown(), None);
        let odd = fields("{\"a\\r\\nb\": 1, \"x,y\": 2}").unknown().unwrap();
        assert_eq!(odd, "unknown fields ignored: a??b, x?y");
        let many: Map<String, Value> = (0..500)
            .map(|i| (format!("{i:0200}"), Value::Null))
            .collect();
        let line = Fields { map: many }.unknown().unwrap();
        assert!(line.len() < 800 && line.ends_with("and 490 more"), "{line}");
    }
}
