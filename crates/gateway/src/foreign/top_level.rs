//! The fields of a JSON object as they stand in its text; their values are checked, and not made.
//!
//! A prompt of 220 KB is one string here, through which the search goes many bytes at a time. What is no JSON (RFC 8259)
//! is refused as strictly as by a parser: a server that takes more than that could read other fields than these.

use std::borrow::Cow;
use std::ops::Range;

/// Far more than requests have; parsers that call themselves for each level run out of stack sooner or later.
const MAX_DEPTH: usize = 512;

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
/// The first place where `text` cannot be one JSON object.
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

    fn key_and_colon(&mut self) -> Result<(), Malformed> {
        if self.next() != Some(b'"') {
            return Err(self.expected("a key"));
        }
        self.string()?;
        self.space();
        self.byte(b':', "a colon")?;
        self.space();
        Ok(())
    }

    fn value(&mut self) -> Result<(), Malformed> {
        // What closes the objects and lists that are open.
        let mut open: Vec<u8> = Vec::new();
        loop {
            match self.next() {
                Some(bracket @ (b'{' | b'[')) => {
                    let closer = bracket + 2;
                    self.at += 1;
                    self.space();
                    if self.next() == Some(closer) {
                        self.at += 1;
                    } else if open.len() == MAX_DEPTH {
                        return Err(self.expected("no deeper nesting"));
                    } else {
                        open.push(closer);
                        if closer == b'}' {
                            self.key_and_colon()?;
                        }
                        continue;
                    }
                }
                Some(b'"') => self.string()?,
                _ => self.word()?,
            }
            // A value has ended, and perhaps what it is in.
            loop {
                let Some(&closer) = open.last() else {
                    return Ok(());
                };
                self.space();
                match self.next() {
                    Some(b',') => {
                        self.at += 1;
                        self.space();
                        if closer == b'}' {
                            self.key_and_colon()?;
                        }
                        break;
                    }
                    Some(byte) if byte == closer => {
                        self.at += 1;
                        open.pop();
                    }
                    _ => return Err(self.expected("a comma or a closing bracket")),
                }
            }
        }
    }

    /// From its opening quote to behind its closing one.
    fn string(&mut self) -> Result<(), Malformed> {
        self.at += 1;
        while let Some(found) = memchr::memchr2(b'"', b'\\', self.rest()) {
            if has_control(&self.rest()[..found]) {
                return Err(self.expected("no control character in the string that goes on"));
            }
            self.at += found + 1;
            if self.text.as_bytes()[self.at - 1] == b'"' {
                return Ok(());
            }
            self.at += match self.rest() {
                [b'u', hex @ ..]
                    if hex.len() >= 4 && hex[..4].iter().all(u8::is_ascii_hexdigit) =>
                {
                    5
                }
                [b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 1,
                _ => return Err(self.expected("an escape")),
            };
        }
        self.at = self.text.len();
        Err(self.expected("a string's end"))
    }

    /// A number, `true`, `false` or `null`.
    fn word(&mut self) -> Result<(), Malformed> {
        for word in ["true", "false", "null"] {
            if self.rest().starts_with(word.as_bytes()) {
                self.at += word.len();
                return Ok(());
            }
        }
        let expected = self.expected("a value");
        self.at += usize::from(self.next() == Some(b'-'));
        let starts_with_zero = self.next() == Some(b'0');
        match self.digits() {
            0 => return Err(expected),
            1 => {}
            _ if starts_with_zero => return Err(expected),
            _ => {}
        }
        if self.next() == Some(b'.') {
            self.at += 1;
            if self.digits() == 0 {
                return Err(expected);
            }
        }
        if matches!(self.next(), Some(b'e' | b'E')) {
            self.at += 1;
            self.at += usize::from(matches!(self.next(), Some(b'+' | b'-')));
            if self.digits() == 0 {
                return Err(expected);
            }
        }
        Ok(())
    }

    /// How many there are.
    fn digits(&mut self) -> usize {
        let count = self
            .rest()
            .iter()
            .take_while(|b| b.is_ascii_digit())
            .count();
        self.at += count;
        count
    }
}

/// By chunks, each without a branch, so that many bytes are looked at together.
fn has_control(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .any(|chunk| chunk.iter().fold(false, |any, byte| any | (*byte < b' ')))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use serde::de::IgnoredAny;
    use serde_json::{Map, Value};

    use super::*;

    const STRANGE: &str = "[{}\\[\\]\",:\\\\a1.0eEu+ntrue\t\n \u{e9}-]{0,24}";

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
            ("{\"a\":\"b\\", "expected an escape at byte 8"),
            (
                "{\"a\":[{}",
                "expected a comma or a closing bracket at byte 8",
            ),
            ("{\"a\":[}", "expected a value at byte 6"),
            (
                "{\"a\":[1 2]}",
                "expected a comma or a closing bracket at byte 8",
            ),
            ("{\"a\":[{1:2}]}", "expected a key at byte 7"),
            ("{\"a\":\"\\q\"}", "expected an escape at byte 7"),
            ("{\"a\":\"\\u12g4\"}", "expected an escape at byte 7"),
            (
                "{\"a\":\"b\nc\"}",
                "expected no control character in the string that goes on at byte 6",
            ),
            ("{\"a\\q\":1}", "expected an escape at byte 4"),
            ("{\"\\ud800\":1}", "expected a key at byte 1"),
            ("{}}", "expected nothing more at byte 2"),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), says, "{text}");
        }
    }

    fn is_an_object_to_serde(text: &str) -> bool {
        serde_json::from_str::<HashMap<String, IgnoredAny>>(text).is_ok()
    }

    #[test]
    fn depth_has_a_limit() {
        for (depth, fits) in [(MAX_DEPTH, true), (MAX_DEPTH + 2, false), (1 << 20, false)] {
            let text = format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
            assert_eq!(fields(&text, |_, _| ()).is_ok(), fits, "{depth}");
        }
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
        fn what_is_no_json_to_serde_json_is_none_here(text in STRANGE) {
            prop_assert_eq!(fields(&text, |_, _| ()).is_ok(), is_an_object_to_serde(&text));
        }

        #[test]
        fn nor_is_json_with_a_bit_of_it_changed(value in any_json(), at: prop::sample::Index, new in STRANGE) {
            let text = serde_json::json!({ "a": value }).to_string();
            let mut at = at.index(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            let mut rest = text[at..].chars();
            rest.next();
            let new: String = new.chars().take(2).collect();
            let text = format!("{}{new}{}", &text[..at], rest.as_str());
            prop_assert_eq!(fields(&text, |_, _| ()).is_ok(), is_an_object_to_serde(&text), "{}", text);
        }
    }
}
