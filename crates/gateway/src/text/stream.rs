//! A tokenizer's decoder as a stream: each id's text as soon as nothing that follows can change it.
//!
//! A Hugging Face decoder maps the whole list of tokens to text. Each of its steps is one of four kinds here,
//! so that pushing ids one by one gives exactly the text of decoding them all, in constant work per token:
//!
//! ```text
//! step (tokenizer.json)      looks at                       holds back
//! Replace, Strip             one token                      nothing; done once for the whole vocabulary
//! Metaspace, WordPiece       whether it is the first token  nothing
//! ByteLevel                  bytes of all tokens            an unfinished UTF-8 character, at most 3 bytes
//! ByteFallback               a run of `<0xNN>` tokens       the run: one bad byte spoils all of it
//! BPEDecoder                 whether it is the last token   the end-of-word suffix
//! Fuse, then Strip           both ends of the text          characters that may be stripped at the end
//! ```

use tokenizers::Decoder;
use tokenizers::decoders::DecoderWrapper;

use super::error::TextError;

/// How a tokenizer's tokens become text; made once for each model.
pub(super) struct Plan {
    /// Steps that look at one token alone: applied to the vocabulary when it is laid out.
    each: Vec<Each>,
    /// Whether tokens stand for bytes (ByteLevel) rather than for characters.
    bytes: bool,
    /// A fresh stream's steps.
    steps: Vec<Step>,
}

/// A token as the vocabulary keeps it.
pub(super) enum Entry {
    Text(String),
    Bytes(Vec<u8>),
}

#[derive(Clone)]
enum Each {
    Decoder(DecoderWrapper),
    Strip(Strip),
}

/// `Strip` drops up to `start` and `stop` of `content` from the ends of a token.
#[derive(Clone, Copy)]
struct Strip {
    content: char,
    start: usize,
    stop: usize,
}

#[derive(Clone)]
enum Step {
    Each(Each),
    /// The first token decodes differently from the others.
    First {
        decoder: DecoderWrapper,
        seen: bool,
    },
    /// Without a decoder, tokens are joined by spaces.
    Join {
        seen: bool,
    },
    ByteFallback {
        run: Vec<u8>,
    },
    /// `held` begins with the suffix: a space within the text, nothing at its end.
    Suffix {
        suffix: String,
        held: String,
    },
    /// Strip of the whole text; `start` counts down, `held` may turn out to be the end.
    Ends {
        strip: Strip,
        held: String,
    },
}

impl Plan {
    /// The plan of a `tokenizer.json`'s decoder; an error if it has a step that needs the whole text.
    pub(super) fn new(decoder: Option<&DecoderWrapper>) -> Result<Self, TextError> {
        let mut plan = Self {
            each: Vec::new(),
            bytes: false,
            steps: Vec::new(),
        };
        let mut list = Vec::new();
        match decoder {
            Some(decoder) => flatten(decoder, &mut list),
            None => plan.steps.push(Step::Join { seen: false }),
        }
        // `fused`: all that follows sees one token, the whole text. `parts`: text comes in parts of tokens.
        let (mut fused, mut parts) = (false, false);
        for decoder in list {
            match decoder {
                DecoderWrapper::Fuse(_) => (fused, parts) = (true, false),
                other if parts => {
                    return Err(TextError::Unsupported(format!(
                        "{} after BPEDecoder",
                        name(other)
                    )));
                }
                DecoderWrapper::Strip(s) if fused => {
                    let strip = Strip {
                        content: s.content,
                        start: s.start,
                        stop: s.stop,
                    };
                    plan.steps.push(Step::Ends {
                        strip,
                        held: String::new(),
                    });
                }
                other if fused => {
                    return Err(TextError::Unsupported(format!(
                        "{} after the tokens are fused",
                        name(other)
                    )));
                }
                DecoderWrapper::ByteLevel(_) if plan.steps.is_empty() => {
                    plan.bytes = true;
                    fused = true;
                }
                DecoderWrapper::Replace(_) => plan.push_each(Each::Decoder(decoder.clone())),
                DecoderWrapper::Strip(s) => {
                    plan.push_each(Each::Strip(Strip {
                        content: s.content,
                        start: s.start,
                        stop: s.stop,
                    }));
                }
                DecoderWrapper::Metaspace(_) | DecoderWrapper::WordPiece(_) => {
                    plan.steps.push(Step::First {
                        decoder: decoder.clone(),
                        seen: false,
                    });
                }
                DecoderWrapper::ByteFallback(_) => {
                    plan.steps.push(Step::ByteFallback { run: Vec::new() })
                }
                DecoderWrapper::BPE(bpe) if !bpe.suffix.is_empty() => {
                    plan.steps.push(Step::Suffix {
                        suffix: bpe.suffix.clone(),
                        held: String::new(),
                    });
                    parts = true;
                }
                other => {
                    return Err(TextError::Unsupported(format!(
                        "{} at this place",
                        name(other)
                    )));
                }
            }
        }
        Ok(plan)
    }

    fn push_each(&mut self, each: Each) {
        if self.steps.is_empty() {
            self.each.push(each);
        } else {
            self.steps.push(Step::Each(each));
        }
    }

    /// What the vocabulary keeps for `token`.
    pub(super) fn entry(&self, token: String) -> Result<Entry, TextError> {
        let mut text = token;
        for each in &self.each {
            text = each.apply(&text).map_err(TextError::Unsupported)?;
        }
        Ok(if self.bytes {
            Entry::Bytes(byte_level(&text))
        } else {
            Entry::Text(text)
        })
    }

    /// Whether a lone `piece` is a byte of a longer character, and which.
    pub(super) fn fallback_byte(&self, piece: &[u8]) -> Option<u8> {
        let uses = self
            .steps
            .iter()
            .any(|step| matches!(step, Step::ByteFallback { .. }));
        if uses {
            fallback_byte(std::str::from_utf8(piece).ok()?)
        } else {
            None
        }
    }

    /// Whether tokens stand for bytes.
    pub(super) fn is_byte_level(&self) -> bool {
        self.bytes
    }
}

/// The decoder of one stream.
#[derive(Clone)]
pub(super) struct Stream {
    utf8: Option<Utf8>,
    steps: Vec<Step>,
}

impl Stream {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            utf8: plan.bytes.then(Utf8::default),
            steps: plan.steps.clone(),
        }
    }

    /// A stream that stands in the middle of a text, where no token is the first.
    pub(super) fn within_text(plan: &Plan) -> Self {
        let mut stream = Self::new(plan);
        for step in &mut stream.steps {
            match step {
                Step::First { seen, .. } => *seen = true,
                Step::Ends { strip, .. } => (strip.start, strip.stop) = (0, 0),
                Step::Each(_)
                | Step::Join { .. }
                | Step::ByteFallback { .. }
                | Step::Suffix { .. } => {}
            }
        }
        stream
    }

    /// Take the next token's piece; text that nothing can change any more goes to `out`.
    pub(super) fn push(&mut self, piece: &[u8], out: &mut String) {
        match &mut self.utf8 {
            Some(utf8) => utf8.push(piece, |text| feed(&mut self.steps, text, out)),
            None => feed(&mut self.steps, &String::from_utf8_lossy(piece), out),
        }
    }

    /// The end of the tokens: what was held back goes to `out`.
    pub(super) fn finish(&mut self, out: &mut String) {
        if let Some(utf8) = &mut self.utf8 {
            utf8.finish(|text| feed(&mut self.steps, text, out));
        }
        for index in 0..self.steps.len() {
            let (done, rest) = self.steps.split_at_mut(index + 1);
            if let Some(step) = done.last_mut() {
                step.finish(|text| feed(rest, text, out));
            }
        }
    }

    /// The end of the prompt: whole characters in held byte runs count as shown; an unfinished one may yet be
    /// completed by the output.
    pub(super) fn settle(&mut self) {
        for step in &mut self.steps {
            if let Step::ByteFallback { run } = step {
                match std::str::from_utf8(run) {
                    Err(error) if error.error_len().is_none() => {
                        drop(run.drain(..error.valid_up_to()))
                    }
                    _ => run.clear(),
                }
            }
        }
    }

    /// Whether all text of the pushed tokens is out.
    pub(super) fn is_settled(&self) -> bool {
        self.utf8.as_ref().is_none_or(|utf8| utf8.held.is_empty())
            && self.steps.iter().all(|step| match step {
                Step::Each(_) | Step::First { .. } | Step::Join { .. } => true,
                Step::ByteFallback { run } => run.is_empty(),
                Step::Suffix { held, .. } | Step::Ends { held, .. } => held.is_empty(),
            })
    }
}

/// Run `text`, one token's, through `steps`.
fn feed(steps: &mut [Step], text: &str, out: &mut String) {
    match steps.split_first_mut() {
        None => out.push_str(text),
        Some((step, rest)) => step.push(text, |text| feed(rest, text, out)),
    }
}

impl Step {
    fn push(&mut self, token: &str, mut next: impl FnMut(&str)) {
        match self {
            Self::Each(each) => next(&each.apply(token).unwrap_or_default()),
            Self::First { decoder, seen } => {
                let text = decode_at(decoder, token, *seen);
                *seen = true;
                next(&text);
            }
            Self::Join { seen } => {
                if *seen {
                    next(" ");
                }
                *seen = true;
                next(token);
            }
            Self::ByteFallback { run } => match fallback_byte(token) {
                Some(byte) => run.push(byte),
                None => {
                    end_run(run, &mut next);
                    next(token);
                }
            },
            Self::Suffix { suffix, held } => {
                if !held.is_empty() {
                    next(&held.replace(suffix.as_str(), " "));
                    held.clear();
                }
                let (now, later) =
                    token.split_at(token.find(suffix.as_str()).unwrap_or(token.len()));
                next(now);
                held.push_str(later);
            }
            Self::Ends { strip, held } => {
                let mut text = token;
                while strip.start > 0 && !text.is_empty() {
                    match text.strip_prefix(strip.content) {
                        Some(rest) => {
                            text = rest;
                            strip.start -= 1;
                        }
                        None => strip.start = 0,
                    }
                }
                if strip.stop == 0 {
                    next(text);
                    return;
                }
                held.push_str(text);
                let trailing = held
                    .chars()
                    .rev()
                    .take(strip.stop)
                    .take_while(|&c| c == strip.content)
                    .count();
                let shown = held.len() - trailing * strip.content.len_utf8();
                next(&held[..shown]);
                held.drain(..shown);
            }
        }
    }

    fn finish(&mut self, mut next: impl FnMut(&str)) {
        match self {
            Self::Each(_) | Self::First { .. } | Self::Join { .. } => {}
            Self::ByteFallback { run } => end_run(run, &mut next),
            Self::Suffix { suffix, held } => {
                next(&held.replace(suffix.as_str(), ""));
                held.clear();
            }
            Self::Ends { held, .. } => held.clear(),
        }
    }
}

impl Each {
    fn apply(&self, token: &str) -> Result<String, String> {
        match self {
            Self::Decoder(decoder) => {
                let texts = decoder
                    .decode_chain(vec![token.to_owned()])
                    .map_err(|e| e.to_string())?;
                Ok(texts.concat())
            }
            Self::Strip(strip) => {
                let mut text = token;
                for _ in 0..strip.start {
                    text = text.strip_prefix(strip.content).unwrap_or(text);
                }
                for _ in 0..strip.stop {
                    text = text.strip_suffix(strip.content).unwrap_or(text);
                }
                Ok(text.to_owned())
            }
        }
    }
}

/// `token` as the first or as a later one.
fn decode_at(decoder: &DecoderWrapper, token: &str, later: bool) -> String {
    let mut tokens = vec![token.to_owned()];
    if later {
        tokens.insert(0, String::new());
    }
    decoder
        .decode_chain(tokens)
        .ok()
        .and_then(|mut texts| texts.pop())
        .unwrap_or_default()
}

/// The end of a run of byte tokens: its characters if all of it is UTF-8, else one U+FFFD for each byte.
fn end_run(run: &mut Vec<u8>, next: &mut impl FnMut(&str)) {
    if run.is_empty() {
        return;
    }
    match std::str::from_utf8(run) {
        Ok(text) => next(text),
        Err(_) => run.iter().for_each(|_| next("\u{fffd}")),
    }
    run.clear();
}

/// The byte of a `<0xNN>` token.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// The bytes of a byte-level token: a character for each byte, printable ones standing for themselves
/// (GPT-2's table); a token with any other character stands for its own UTF-8.
fn byte_level(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        // The other 68 bytes follow in order from 256.
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Bytes to text as `String::from_utf8_lossy` would, in pieces.
#[derive(Clone, Default)]
struct Utf8 {
    /// The beginning of a character, at most 3 bytes.
    held: Vec<u8>,
}

impl Utf8 {
    fn push(&mut self, bytes: &[u8], mut next: impl FnMut(&str)) {
        let joined;
        let mut rest = if self.held.is_empty() {
            bytes
        } else {
            self.held.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.held);
            joined.as_slice()
        };
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => return next(text),
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    if let Ok(text) = std::str::from_utf8(valid) {
                        next(text);
                    }
                    let Some(bad) = error.error_len() else {
                        self.held.extend_from_slice(after);
                        return;
                    };
                    next("\u{fffd}");
                    rest = &after[bad..];
                }
            }
        }
    }

    fn finish(&mut self, mut next: impl FnMut(&str)) {
        if !self.held.is_empty() {
            next("\u{fffd}");
            self.held.clear();
        }
    }
}

fn flatten<'a>(decoder: &'a DecoderWrapper, list: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence
            .get_decoders()
            .iter()
            .for_each(|d| flatten(d, list)),
        other => list.push(other),
    }
}

fn name(decoder: &DecoderWrapper) -> &'static str {
    match decoder {
        DecoderWrapper::BPE(_) => "BPEDecoder",
        DecoderWrapper::ByteLevel(_) => "ByteLevel",
        DecoderWrapper::WordPiece(_) => "WordPiece",
        DecoderWrapper::Metaspace(_) => "Metaspace",
        DecoderWrapper::CTC(_) => "CTC",
        DecoderWrapper::Sequence(_) => "Sequence",
        DecoderWrapper::Replace(_) => "Replace",
        DecoderWrapper::Fuse(_) => "Fuse",
        DecoderWrapper::Strip(_) => "Strip",
        DecoderWrapper::ByteFallback(_) => "ByteFallback",
    }
}
