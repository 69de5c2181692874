//! The steps of a streaming decoder: what each takes in, holds back and hands on.

use tokenizers::Decoder;
use tokenizers::decoders::DecoderWrapper;

use super::bytes::fallback_byte;

/// A step that looks at one token alone.
#[derive(Clone)]
pub(super) enum Each {
    Decoder(DecoderWrapper),
    Strip(Strip),
}

/// `Strip` drops up to `start` and `stop` of `content` from the ends of a token.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) content: char,
    pub(super) start: usize,
    pub(super) stop: usize,
}

/// A step of one stream, with its state.
#[derive(Clone)]
pub(super) enum Step {
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
    /// A run of byte tokens that may go on.
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

/// Run `text`, one token's, through `steps`.
pub(super) fn feed(steps: &mut [Step], text: &str, out: &mut String) {
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

    pub(super) fn finish(&mut self, mut next: impl FnMut(&str)) {
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
    pub(super) fn apply(&self, token: &str) -> Result<String, String> {
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
