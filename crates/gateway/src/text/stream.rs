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

use tokenizers::decoders::DecoderWrapper;

use super::bytes::{Utf8, byte_level, fallback_byte};
use super::error::TextError;
use super::steps::{Each, Step, Strip, feed};

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
        self.utf8.as_ref().is_none_or(|utf8| utf8.is_empty())
            && self.steps.iter().all(|step| match step {
                Step::Each(_) | Step::First { .. } | Step::Join { .. } => true,
                Step::ByteFallback { run } => run.is_empty(),
                Step::Suffix { held, .. } | Step::Ends { held, .. } => held.is_empty(),
            })
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
