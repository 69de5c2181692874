//! What the chunks of a streamed answer say: tokens, finish, usage, errors.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::record::{Failure, FailureKind, TokenSource};

/// What one event added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// At least one token of the answer.
    Token,
    /// Nothing that a user would see: role, usage, finish.
    Other,
    /// `[DONE]`: the stream's end by the protocol.
    Done,
}

/// The tally of one answer.
#[derive(Debug, Default)]
pub struct Answer {
    token_chunks: u32,
    token_ids: u32,
    usage_tokens: Option<u32>,
    prompt_tokens: Option<u32>,
    finished: bool,
    done: bool,
    /// What was said, where a conversation goes on with it.
    text: Option<String>,
}

impl Answer {
    /// A tally that also keeps the first choice's text.
    pub fn with_text() -> Answer {
        Answer {
            text: Some(String::new()),
            ..Answer::default()
        }
    }

    /// The text so far, where it is kept.
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// Reads one event's data. Fails on what is not a chunk of the API, and on error events.
    pub fn on_event(&mut self, data: &[u8]) -> Result<Event, Failure> {
        if data.trim_ascii() == b"[DONE]" {
            self.done = true;
            return Ok(Event::Done);
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| {
            Failure::new(
                FailureKind::Garbage,
                format!("event is not an API chunk ({error}): {}", excerpt(data)),
            )
        })?;
        self.take(&chunk, data)
    }

    /// Reads a whole answer that was not streamed.
    pub fn on_whole(&mut self, body: &[u8]) -> Result<(), Failure> {
        let chunk: Chunk = serde_json::from_slice(body).map_err(|error| {
            Failure::new(
                FailureKind::Garbage,
                format!("answer is not JSON of the API ({error}): {}", excerpt(body)),
            )
        })?;
        self.take(&chunk, body)?;
        self.done = true;
        Ok(())
    }

    fn take(&mut self, chunk: &Chunk, raw: &[u8]) -> Result<Event, Failure> {
        if chunk.error {
            return Err(Failure::new(FailureKind::Error, excerpt(raw)));
        }
        if let Some(usage) = &chunk.usage {
            self.usage_tokens = usage.completion_tokens.or(self.usage_tokens);
            self.prompt_tokens = usage.prompt_tokens.or(self.prompt_tokens);
        } else if chunk.choices.is_none() {
            return Err(Failure::new(
                FailureKind::Garbage,
                format!("JSON without choices or usage: {}", excerpt(raw)),
            ));
        }
        let mut event = Event::Other;
        for choice in chunk.choices.iter().flatten() {
            self.finished |= choice.finish_reason;
            self.token_ids += choice.token_ids.0;
            if choice.has_token() {
                event = Event::Token;
            }
        }
        if event == Event::Token {
            self.token_chunks += 1;
        }
        if let Some(text) = &mut self.text {
            // Well-formed, as it has been read above: what is missing here is no text.
            text.push_str(&said(raw).unwrap_or_default());
        }
        Ok(event)
    }

    /// Whether the protocol's end was seen: `[DONE]`, or a finish reason.
    pub fn is_complete(&self) -> bool {
        self.done || self.finished
    }

    pub fn token_chunks(&self) -> u32 {
        self.token_chunks
    }

    pub fn prompt_tokens(&self) -> Option<u32> {
        self.prompt_tokens
    }

    /// Output tokens by the best source there is: the server's usage, ids in chunks, chunks.
    pub fn tokens(&self) -> (u32, TokenSource) {
        match self.usage_tokens {
            Some(tokens) => (tokens, TokenSource::Usage),
            None if self.token_ids > 0 => (self.token_ids, TokenSource::Ids),
            None => (self.token_chunks, TokenSource::Chunks),
        }
    }
}

/// What a chunk, or a whole answer, adds to the first choice's text.
fn said(raw: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Said {
        choices: Vec<Choice>,
    }
    #[derive(serde::Deserialize)]
    struct Choice {
        #[serde(default)]
        index: u32,
        text: Option<String>,
        #[serde(alias = "message")]
        delta: Option<Delta>,
    }
    #[derive(serde::Deserialize)]
    struct Delta {
        content: Option<String>,
    }
    let said: Said = serde_json::from_slice(raw).ok()?;
    let first = said.choices.into_iter().find(|choice| choice.index == 0)?;
    first.text.or_else(|| first.delta?.content)
}

/// The beginning of `bytes` as text, for messages.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    const LONGEST: usize = 200;
    let cut = &bytes[..bytes.len().min(LONGEST)];
    let mut text = String::from_utf8_lossy(cut).trim().to_owned();
    if bytes.len() > LONGEST {
        text.push('…');
    }
    text
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    #[serde(deserialize_with = "is_set")]
    error: bool,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Usage {
    completion_tokens: Option<u32>,
    prompt_tokens: Option<u32>,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Choice {
    text: Content,
    #[serde(alias = "message")]
    delta: Option<Delta>,
    token_ids: Content,
    #[serde(deserialize_with = "is_set")]
    finish_reason: bool,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Delta {
    #[serde(deserialize_with = "is_set")]
    role: bool,
    content: Content,
    reasoning_content: Content,
    reasoning: Content,
    tool_calls: Content,
}

impl Choice {
    /// A chunk whose text is empty stands for a token when nothing else explains it: the bytes of
    /// half a character are held back, special tokens have no text.
    fn has_token(&self) -> bool {
        let held_back = |content: &Content| content.1 && !self.finish_reason;
        let delta = self.delta.as_ref().is_some_and(|delta| {
            [
                &delta.content,
                &delta.reasoning_content,
                &delta.reasoning,
                &delta.tool_calls,
            ]
            .iter()
            .any(|content| content.0 > 0)
                || (!delta.role && held_back(&delta.content))
        });
        self.token_ids.0 > 0 || self.text.0 > 0 || delta || held_back(&self.text)
    }
}

/// The length of a string or list, and whether it was there (not absent, not null).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Content(u32, bool);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string, a list, an object or null")
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::default())
    }

    fn visit_str<E>(self, text: &str) -> Result<Content, E> {
        Ok(Content(u32::try_from(text.len()).unwrap_or(u32::MAX), true))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
        let mut length = 0;
        while list.next_element::<IgnoredAny>()?.is_some() {
            length += 1;
        }
        Ok(Content(length, true))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut length = 0;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            length += 1;
        }
        Ok(Content(length, true))
    }
}

fn is_set<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::<IgnoredAny>::deserialize(deserializer)?.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(chunks: &[&str]) -> (Answer, Vec<Event>) {
        let mut answer = Answer::default();
        let events = chunks
            .iter()
            .map(|chunk| answer.on_event(chunk.as_bytes()).expect(chunk))
            .collect();
        (answer, events)
    }

    #[test]
    fn a_chat_stream_counts_its_content_and_not_its_role_finish_or_usage() {
        let (answer, events) = events(&[
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"content":"Hi"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"content":""}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}"#,
            "[DONE]",
        ]);
        use Event::{Done, Other, Token};
        assert_eq!(events, [Other, Token, Token, Other, Other, Done]);
        assert_eq!(answer.tokens(), (3, TokenSource::Usage));
        assert_eq!(answer.prompt_tokens(), Some(5));
        assert!(answer.is_complete());
    }

    #[test]
    fn completion_chunks_count_by_their_ids_when_there_is_no_usage() {
        let (answer, events) = events(&[
            r#"{"choices":[{"text":"ab","token_ids":[7,8],"finish_reason":null}]}"#,
            r#"{"choices":[{"text":"","token_ids":[9],"finish_reason":"length"}],"usage":null}"#,
        ]);
        assert_eq!(events, [Event::Token, Event::Token]);
        assert_eq!(answer.tokens(), (3, TokenSource::Ids));
        assert!(answer.is_complete());
    }

    #[test]
    fn reasoning_and_tool_calls_are_tokens_too() {
        let (answer, _) = events(&[
            r#"{"choices":[{"delta":{"role":"assistant","reasoning_content":"hm"}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0}],"content":null}}]}"#,
        ]);
        assert_eq!(answer.tokens(), (2, TokenSource::Chunks));
        assert!(!answer.is_complete());
    }

    #[test]
    fn a_whole_answer_gives_its_usage() {
        let mut answer = Answer::default();
        let body = r#"{"choices":[{"message":{"role":"assistant","content":"x"},
            "finish_reason":"stop"}],"usage":{"completion_tokens":9,"prompt_tokens":2}}"#;
        answer.on_whole(body.as_bytes()).expect("answer");
        assert_eq!(answer.tokens(), (9, TokenSource::Usage));
        assert!(answer.is_complete());
    }

    #[test]
    fn the_text_of_the_first_choice_is_kept_when_it_is_asked_for() {
        let mut answer = Answer::with_text();
        for chunk in [
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"Hi "}}]}"#,
            r#"{"choices":[{"index":1,"delta":{"content":"no"}}]}"#,
            r#"{"choices":[{"index":0,"text":"you"}]}"#,
            r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"completion_tokens":2}}"#,
            "[DONE]",
        ] {
            answer.on_event(chunk.as_bytes()).expect(chunk);
        }
        assert_eq!(answer.text(), Some("Hi you"));
        assert_eq!(Answer::default().text(), None);
    }

    #[test]
    fn error_events_and_foreign_json_fail_by_kind() {
        let kind = |data: &str| {
            Answer::default()
                .on_event(data.as_bytes())
                .expect_err(data)
                .kind
        };
        assert_eq!(
            kind(r#"{"error":{"message":"engine lost"}}"#),
            FailureKind::Error
        );
        assert_eq!(kind("<html>"), FailureKind::Garbage);
        assert_eq!(kind(r#"{"hello":1}"#), FailureKind::Garbage);
        assert_eq!(kind(r#"{"choices":3}"#), FailureKind::Garbage);
        assert_eq!(kind("[1,2]"), FailureKind::Garbage);
    }
}
