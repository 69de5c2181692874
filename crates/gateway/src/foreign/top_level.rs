//! The fields of a JSON object as they stand in its text; what is within their values is not read.
//!
//! A prompt of 220 KB is one string here, whose end is looked for many bytes at a time. So a value is known to end where
//! it does, and not to be right: that is for whoever takes it as JSON (RFC 8259).

use std::borrow::Cow;
use std::ops::Range;

/// Why a text is no JSON object, and at which byte that is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} at byte {at}")]
pub struct Malformed {
    at: usize,
    expected: &'static str,
}

/// Calls `take` with the key of each field, and where its value is.
///
/// # Errors
/// The first place where `text` cannot be one JSON object, as far as it is read.
pub fn fields<'a>(
    text: &'a str,
    mut take: impl FnMut(Cow<'a, str>, Range<usize>),
) -> Result<(), Malformed> {
    let mut scan = Scan { text, at: 0 };
    scan.space();
    scan.byte(b'{', "an object")?;
    scan.space();
    if scan.next() != Some(b'}') {
        loop {
            let key = scan.key()?;
            scan.space();
            scan.byte(b':', "a colon")?;
            scan.space();
            let start = scan.at;
            scan.value()?;
            take(key, start..scan.at);
            scan.space();
            if scan.next() != Some(b',') {
                break;
            }
            scan.at += 1;
            scan.space();
        }
    }
    scan.byte(b'}', "a comma or the object's end")?;
    scan.space();
    match scan.next() {
        None => Ok(()),
        Some(_) => Err(scan.expected("nothing more")),
    }
}

struct Scan<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scan<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.at..]
    }

    fn next(&self) -> Option<u8> {
        self.rest().first().copied()
    }

    fn expected(&self, expected: &'static str) -> Malformed {
        let at = self.at;
        Malformed { at, expected }
    }

    fn space(&mut self) {
        let is_space = |b: &u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
        self.at += self.rest().iter().take_while(|b| is_space(b)).count();
    }

    fn byte(&mut self, byte: u8, expected: &'static str) -> Result<(), Malformed> {
        if self.next() != Some(byte) {
            return Err(self.expected(expected));
        }
        self.at += 1;
        Ok(())
    }

    fn key(&mut self) -> Result<Cow<'a, str>, Malformed> {
        let start = self.at;
        let expected = "a key";
        if self.next() != Some(b'"') {
            return Err(self.expected(expected));
        }
        self.string()?;
        let quoted = &self.text[start..self.at];
        if memchr::memchr(b'\\', quoted.as_bytes()).is_none() {
            return Ok(Cow::Borrowed(&quoted[1..quoted.len() - 1]));
        }
        let key = serde_json::from_str(quoted).map(Cow::Owned);
        key.map_err(|_| Malformed {
            at: start,
            expected,
        })
    }

    fn value(&mut self) -> Result<(), Malformed> {
        match self.next() {
            Some(b'"') => self.string(),
            Some(b'{' | b'[') => self.nested(),
            _ => self.word(),
        }
    }

    /// From its opening quote to behind its closing one.
    fn string(&mut self) -> Result<(), Malformed> {
        self.at += 1;
        while let Some(found) = memchr::memchr2(b'"', b'\\', self.rest()) {
            self.at += found + 1;
            if self.text.as_bytes()[self.at - 1] == b'"' {
                return Ok(());
            }
            // What is escaped is no end. If it is of several bytes, the others are neither quote nor backslash.
            self.at = (self.at + 1).min(self.text.len());
        }
        self.at = self.text.len();
        Err(self.expected("a string's end"))
    }

    /// An object or a list, to behind its last bracket.
    fn nested(&mut self) -> Result<(), Malformed> {
        let mut depth = 0_usize;
        while let Some(byte) = self.next() {
            match byte {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Ok(());
            }
        }
        Err(self.expected("a closing bracket"))
    }

    /// A number, `true`, `false` or `null`.
    fn word(&mut self) -> Result<(), Malformed> {
        let is_of_word = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
        let len = self.rest().iter().take_while(|b| is_of_word(b)).count();
        let word = &self.text[self.at..self.at + len];
        if serde_json::from_str::<serde::de::IgnoredAny>(word).is_err() {
            return Err(self.expected("a value"));
        }
        self.at += len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;

    fn read(text: &str) -> Result<Map<String, Value>, Malformed> {
        let mut found = Map::new();
        fields(text, |key, place| {
            let value = serde_json::from_str(&text[place]).expect("a value is JSON");
            found.insert(key.into_owned(), value);
        })?;
        Ok(found)
    }

    #[test]
    fn what_is_no_object_is_told_with_its_place() {
        for (text, says) in [
            ("", "expected an object at byte 0"),
            (" [1]", "expected an object at byte 1"),
            ("{", "expected a key at byte 1"),
            ("{\"a\"", "expected a colon at byte 4"),
            ("{\"a\":}", "expected a value at byte 5"),
            ("{\"a\":tru\"b\":1}", "expected a value at byte 5"),
            ("{\"a\":01}", "expected a value at byte 5"),
            ("{\"a\":1,}", "expected a key at byte 7"),
            (
                "{\"a\":1 \"b\":2}",
                "expected a comma or the object's end at byte 7",
            ),
            ("{\"a\":\"b\\\"}", "expected a string's end at byte 10"),
            ("{\"a\":\"b\\", "expected a string's end at byte 8"),
            ("{\"a\":[{}", "expected a closing bracket at byte 8"),
            ("{\"a\\q\":1}", "expected a key at byte 1"),
            ("{}}", "expected nothing more at byte 2"),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), says, "{text}");
        }
    }

    #[test]
    fn depth_takes_no_stack() {
        let text = format!(
            "{{\"a\":{}{},\"b\":1}}",
            "[".repeat(1 << 20),
            "]".repeat(1 << 20)
        );
        let mut keys = Vec::new();
        fields(&text, |key, _| keys.push(key.into_owned())).unwrap();
        assert_eq!(keys, ["a", "b"]);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let text = "([\"\\\\{}\\[\\]:,a-c\u{e9}\u{1f600}\n]|\\PC){0,12}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((text, inner), 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn an_object_is_read_as_serde_json_reads_it(value in any_json(), pretty: bool) {
            let text = if pretty {
                serde_json::to_string_pretty(&value).unwrap()
            } else {
                value.to_string()
            };
            match serde_json::from_str(&text).unwrap() {
                Value::Object(expected) => prop_assert_eq!(read(&text).unwrap(), expected),
                _ => prop_assert!(read(&text).is_err()),
            }
        }

        #[test]
        fn no_text_is_too_strange(text in "[{}\\[\\]\",:\\\\a1 \u{e9}]{0,24}") {
            let read_here = fields(&text, |_, _| ());
            if serde_json::from_str::<Map<String, Value>>(&text).is_ok() {
                prop_assert_eq!(read_here, Ok(()));
            }
        }
    }
}
