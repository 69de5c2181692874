//! A foreign engine's stream on its way through: whole events pass as the bytes they came in.
//!
//! An event is looked into only if it holds usage (which is metered, and dropped where only the gateway asked for it)
//! or if the model is called otherwise there. What has come of an unfinished event waits for the rest.

use std::ops::Range;
use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// An event may grow to this.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// What a request can use of either kind of token, and far from what sums could not hold.
const MAX_USED_TOKENS: u64 = u32::MAX as u64;

/// OpenAI's count of what a request has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PromptTokensDetails {
    pub cached_tokens: Option<u64>,
}

impl Usage {
    /// Whether it may be believed: an account is charged with it.
    fn is_possible(&self) -> bool {
        self.prompt_tokens.max(self.completion_tokens) <= MAX_USED_TOKENS
    }

    #[must_use]
    pub fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details
            .and_then(|details| details.cached_tokens)
            .unwrap_or(0)
            .min(self.prompt_tokens)
    }
}

#[derive(Deserialize)]
struct Counted {
    usage: Option<Usage>,
    #[serde(default)]
    choices: Option<Vec<IgnoredAny>>,
}

// To prepare a search takes longer than to search a small answer.
static USAGE_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));
static MODEL_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"model\""));

/// What is read from and written into answers: whole ones, and those of streams.
#[derive(Debug)]
pub struct Answers {
    /// The model's name in the client's words, as JSON; `None` if the upstream calls it the same.
    model: Option<String>,
}

impl Answers {
    #[must_use]
    pub fn new(model: Option<&str>) -> Answers {
        Answers {
            model: model.map(|name| serde_json::Value::from(name).to_string()),
        }
    }

    /// The usage that an answer tells, and whether it tells anything else.
    #[must_use]
    pub fn usage(&self, json: &[u8]) -> Option<(Usage, bool)> {
        let told = values(&USAGE_KEY, json).any(|value| value.first() == Some(&b'{'));
        if !told {
            return None;
        }
        let counted: Counted = serde_json::from_slice(json).ok()?;
        Some((
            counted.usage.filter(Usage::is_possible)?,
            counted.choices.is_some_and(|choices| !choices.is_empty()),
        ))
    }

    /// The answer with the client's name of the model, where that is another.
    #[must_use]
    pub fn renamed(&self, json: &[u8]) -> Option<Vec<u8>> {
        let name = self.model.as_ref()?;
        let value = values(&MODEL_KEY, json).next()?;
        let end = string_end(value)?;
        let at = json.len() - value.len();
        if &value[..end] == name.as_bytes() {
            return None;
        }
        Some([&json[..at], name.as_bytes(), &json[at + end..]].concat())
    }
}

/// What follows each place where `key` is the key of a field. In valid JSON a quote inside a string is escaped, so
/// what looks like a quoted key with a colon is one.
fn values<'a>(key: &'a Finder<'static>, json: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    key.find_iter(json).filter_map(|at| {
        let after = json[at + key.needle().len()..].trim_ascii_start();
        Some(after.strip_prefix(b":")?.trim_ascii_start())
    })
}

/// Where the string ends that `json` begins with.
fn string_end(json: &[u8]) -> Option<usize> {
    let mut escaped = false;
    if json.first() != Some(&b'"') {
        return None;
    }
    for (at, byte) in json.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// One stream of server-sent events.
#[derive(Debug)]
pub struct Events {
    answers: Answers,
    drop_usage: bool,
    /// Of an unfinished event.
    rest: BytesMut,
    /// Bytes of `rest` that were looked at, and where the line begins that they end in.
    looked_at: usize,
    line_start: usize,
    /// Events with data, other than `[DONE]`.
    pub count: u64,
    pub usage: Option<Usage>,
    /// `[DONE]` has come.
    pub done: bool,
    /// An event has told of an error.
    pub failed: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct EventTooLong;

enum Verdict {
    Keep,
    Drop,
    Replace(Vec<u8>),
}

impl Events {
    #[must_use]
    pub fn new(answers: Answers, drop_usage: bool) -> Events {
        Events {
            answers,
            drop_usage,
            rest: BytesMut::new(),
            looked_at: 0,
            line_start: 0,
            count: 0,
            usage: None,
            done: false,
            failed: false,
        }
    }

    /// Takes what came and gives the whole events in it, perhaps none.
    ///
    /// # Errors
    /// An event that does not end.
    pub fn push(&mut self, data: Bytes) -> Result<Bytes, EventTooLong> {
        let mut whole = if self.rest.is_empty() {
            data
        } else {
            self.rest.extend_from_slice(&data);
            std::mem::take(&mut self.rest).freeze()
        };
        let (ends, line_start) = self.ends(&whole);
        let end = ends.last().copied().unwrap_or(0);
        let rest = whole.split_off(end);
        if rest.len() > MAX_EVENT_BYTES {
            return Err(EventTooLong);
        }
        self.looked_at = rest.len();
        self.line_start = line_start - end;
        // Taken back without a copy where nobody else holds a part of it.
        self.rest = BytesMut::from(rest);
        Ok(self.look_into(&whole, &ends))
    }

    /// Where events end, and where the last line begins.
    fn ends(&self, bytes: &[u8]) -> (Vec<usize>, usize) {
        let mut line_start = self.line_start;
        let mut ends = Vec::new();
        for at in memchr::memchr_iter(b'\n', &bytes[self.looked_at..]) {
            let at = self.looked_at + at;
            if matches!(&bytes[line_start..at], b"" | b"\r") {
                ends.push(at + 1);
            }
            line_start = at + 1;
        }
        (ends, line_start)
    }

    fn look_into(&mut self, whole: &Bytes, ends: &[usize]) -> Bytes {
        let mut changed: Option<BytesMut> = None;
        let mut start = 0;
        for &end in ends {
            let event = &whole[start..end];
            match (self.verdict(event), &mut changed) {
                (Verdict::Keep, None) => {}
                (Verdict::Keep, Some(out)) => out.extend_from_slice(event),
                (verdict, out) => {
                    let out = out.get_or_insert_with(|| BytesMut::from(&whole[..start]));
                    if let Verdict::Replace(event) = verdict {
                        out.extend_from_slice(&event);
                    }
                }
            }
            start = end;
        }
        changed.map_or_else(|| whole.clone(), BytesMut::freeze)
    }

    fn verdict(&mut self, event: &[u8]) -> Verdict {
        let Some(range) = data_line(event) else {
            return Verdict::Keep;
        };
        let json = &event[range.clone()];
        if json == b"[DONE]" {
            self.done = true;
            return Verdict::Keep;
        }
        self.count += 1;
        self.failed |= json.starts_with(b"{\"error\"");
        if let Some((usage, tells_more)) = self.answers.usage(json) {
            self.usage = Some(usage);
            if self.drop_usage && !tells_more {
                self.count -= 1;
                return Verdict::Drop;
            }
        }
        match self.answers.renamed(json) {
            Some(json) => {
                Verdict::Replace([&event[..range.start], &json, &event[range.end..]].concat())
            }
            None => Verdict::Keep,
        }
    }
}

/// Where the data of an event is, without the space before it and the line's end.
fn data_line(event: &[u8]) -> Option<Range<usize>> {
    let mut start = 0;
    loop {
        let line_end = memchr::memchr(b'\n', &event[start..]).map(|at| start + at)?;
        let line = &event[start..line_end];
        if let Some(data) = line.strip_prefix(b"data:") {
            let lead = data.len() - data.trim_ascii_start().len();
            let from = start + 5 + lead;
            return Some(from..from + data.trim_ascii().len());
        }
        start = line_end + 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}"#;

    fn chunk(text: &str) -> String {
        format!(
            "data: {{\"model\":\"up\",\"choices\":[{{\"delta\":{{\"content\":{text:?}}}}}],\"usage\":null}}\n\n"
        )
    }

    fn stream() -> String {
        [
            ": hello\r\n\r\n".to_owned(),
            chunk("a\n\nb"),
            chunk("\"usage\":{\"model\":1}"),
            format!("data: {USAGE}\r\n\r\n"),
            "data: [DONE]\n\n".to_owned(),
        ]
        .concat()
    }

    fn passed(events: &mut Events, parts: &[&[u8]]) -> String {
        let out = parts
            .iter()
            .map(|part| events.push(Bytes::copy_from_slice(part)).unwrap());
        String::from_utf8(out.collect::<Vec<_>>().concat()).unwrap()
    }

    #[test]
    fn bytes_pass_as_they_are() {
        let mut events = Events::new(Answers::new(None), false);
        assert_eq!(passed(&mut events, &[stream().as_bytes()]), stream());
        assert!(events.done && !events.failed);
        assert_eq!(events.count, 3);
        let usage = events.usage.unwrap();
        assert_eq!(
            (
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens()
            ),
            (3, 2, 1)
        );
    }

    #[test]
    fn a_whole_event_is_not_copied() {
        let data = Bytes::from(chunk("x"));
        let out = Events::new(Answers::new(None), true)
            .push(data.clone())
            .unwrap();
        assert_eq!(out.as_ptr(), data.as_ptr());
    }

    #[test]
    fn usage_that_only_the_gateway_wanted_is_dropped() {
        let mut events = Events::new(Answers::new(None), true);
        let expected = stream().replace(&format!("data: {USAGE}\r\n\r\n"), "");
        assert_eq!(passed(&mut events, &[stream().as_bytes()]), expected);
        assert_eq!(events.usage.unwrap().completion_tokens, 2);
        let both = "data: {\"choices\":[{}],\"usage\":{\"completion_tokens\":9}}\n\n";
        assert_eq!(passed(&mut events, &[both.as_bytes()]), both);
        assert_eq!(events.usage.unwrap().completion_tokens, 9);
    }

    #[test]
    fn usage_beyond_belief_is_not_taken() {
        let answers = Answers::new(None);
        let told = |prompt: u64, cached: u64| {
            let json = format!(
                r#"{{"usage":{{"prompt_tokens":{prompt},"completion_tokens":1,"prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}"#
            );
            answers.usage(json.as_bytes()).map(|(usage, _)| usage)
        };
        assert!(told(u64::MAX, 0).is_none());
        assert_eq!(told(3, 9).unwrap().cached_tokens(), 3);
    }

    #[test]
    fn the_model_is_called_as_the_client_does() {
        let answers = Answers::new(Some("my\"own"));
        let renamed = answers
            .renamed(br#"{"x":"model","model" : "a\"b","y":1}"#)
            .unwrap();
        assert_eq!(renamed, br#"{"x":"model","model" : "my\"own","y":1}"#);
        assert_eq!(answers.renamed(br#"{"model":"my\"own"}"#), None);
        assert_eq!(answers.renamed(br#"{"model":7}"#), None);
        let mut events = Events::new(Answers::new(Some("mine")), false);
        let expected = stream().replace("\"model\":\"up\"", "\"model\":\"mine\"");
        assert_eq!(passed(&mut events, &[stream().as_bytes()]), expected);
    }

    #[test]
    fn an_event_that_does_not_end_is_an_error() {
        let mut events = Events::new(Answers::new(None), false);
        let line = Bytes::from(vec![b'x'; MAX_EVENT_BYTES]);
        assert_eq!(events.push(line).unwrap(), Bytes::new());
        assert_eq!(events.push(Bytes::from_static(b"y")), Err(EventTooLong));
    }

    #[test]
    fn an_error_is_noticed() {
        let mut events = Events::new(Answers::new(None), false);
        passed(
            &mut events,
            &[b"data: {\"error\":{\"message\":\"no\"}}\n\n"],
        );
        assert!(events.failed);
    }

    proptest! {
        /// However the bytes are cut, what comes out is the same.
        #[test]
        fn cuts_do_not_matter(cuts in proptest::collection::vec(0..600_usize, 0..40)) {
            let text = stream();
            let mut at: Vec<usize> = cuts.into_iter().filter(|cut| *cut < text.len()).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let parts: Vec<&[u8]> = at.windows(2).map(|w| &text.as_bytes()[w[0]..w[1]]).collect();
            let mut cut = Events::new(Answers::new(Some("mine")), true);
            let mut uncut = Events::new(Answers::new(Some("mine")), true);
            let expected = passed(&mut uncut, &[text.as_bytes()]);
            prop_assert_eq!(passed(&mut cut, &parts), expected);
            prop_assert_eq!((cut.count, cut.usage, cut.done), (uncut.count, uncut.usage, uncut.done));
        }

        #[test]
        fn any_bytes_are_taken(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut events = Events::new(Answers::new(Some("mine")), true);
            for part in parts {
                let _ = events.push(Bytes::from(part));
            }
        }
    }
}
