//! Sizes, and answers that go round in circles.

use crate::config::safety::LimitsConfig;
use crate::error::GatewayError;

/// How far back a repetition is looked for.
const WINDOW_BYTES: usize = 16 << 10;
/// How often; counted in bytes of the text, so that it does not matter in which pieces it came.
const LOOK_EVERY_BYTES: usize = 64;
/// Where something repeats itself, so much of the end has been there before.
const SEEN_BEFORE_BYTES: usize = 16;
const MIN_REPEATS: usize = 3;

#[derive(Debug)]
pub struct Limits {
    pub max_request_chars: Option<usize>,
    max_response_chars: Option<usize>,
    max_repeats: Option<usize>,
    min_repeated_bytes: usize,
}

/// What an answer is beyond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beyond {
    Size,
    Repeats,
}

impl Beyond {
    /// As the answer's `finish_reason` has it.
    #[must_use]
    pub fn finish_reason(self) -> &'static str {
        match self {
            Beyond::Size => "length",
            Beyond::Repeats => "repetition",
        }
    }
}

impl Limits {
    /// `path` is the hook's place in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn new(config: &LimitsConfig, path: &str) -> Result<Limits, GatewayError> {
        let most = WINDOW_BYTES / MIN_REPEATS;
        for (key, value, range) in [
            (
                "max_request_chars",
                config.max_request_chars,
                1..=usize::MAX,
            ),
            (
                "max_response_chars",
                config.max_response_chars,
                1..=usize::MAX,
            ),
            ("max_repeats", config.max_repeats, MIN_REPEATS..=most),
            (
                "min_repeated_bytes",
                Some(config.min_repeated_bytes),
                1..=WINDOW_BYTES,
            ),
        ] {
            if let Some(value) = value.filter(|value| !range.contains(value)) {
                let (low, high) = (range.start(), range.end());
                return Err(GatewayError::Config(match *high {
                    usize::MAX => format!("{path}.{key}: got {value}, allowed is {low} or more"),
                    high => format!("{path}.{key}: got {value}, allowed is {low} to {high}"),
                }));
            }
        }
        if (
            config.max_request_chars,
            config.max_response_chars,
            config.max_repeats,
        ) == (None, None, None)
        {
            return Err(GatewayError::Config(format!(
                "{path}: needed is max_request_chars, max_response_chars or max_repeats"
            )));
        }
        Ok(Limits {
            max_request_chars: config.max_request_chars,
            max_response_chars: config.max_response_chars,
            max_repeats: config.max_repeats,
            min_repeated_bytes: config.min_repeated_bytes,
        })
    }

    #[must_use]
    pub fn on_responses(&self) -> bool {
        self.max_response_chars.is_some() || self.max_repeats.is_some()
    }

    /// Whether `text` ends in what was said too often: `max_repeats` times in a row, and long enough together.
    fn goes_in_circles(&self, text: &[u8], max_repeats: usize) -> bool {
        let Some(before) = text.len().checked_sub(SEEN_BEFORE_BYTES) else {
            return false;
        };
        // Nearly every text is done with here.
        if memchr::memmem::rfind(&text[..text.len() - 1], &text[before..]).is_none() {
            return false;
        }
        let backwards: Vec<u8> = text.iter().rev().copied().collect();
        // borders[n]: the longest proper border of the first n + 1 bytes, as in the search by Knuth, Morris and Pratt;
        // what repeats itself with a period p has a border of its length less p.
        let mut borders: Vec<usize> = vec![0; backwards.len()];
        let mut border = 0;
        for at in 1..backwards.len() {
            while border > 0 && backwards[at] != backwards[border] {
                border = borders[border - 1];
            }
            if backwards[at] == backwards[border] {
                border += 1;
            }
            borders[at] = border;
            let length = at + 1;
            if length >= self.min_repeated_bytes && length >= max_repeats * (length - border) {
                return true;
            }
        }
        false
    }
}

/// One text of an answer.
#[derive(Debug, Default)]
pub struct Measured {
    chars: usize,
    bytes: usize,
    /// Its end, at most twice the window.
    tail: Vec<u8>,
}

impl Measured {
    /// Takes new text, and cuts it where it is beyond a limit.
    pub fn push(&mut self, limits: &Limits, text: &mut String) -> Option<Beyond> {
        let mut beyond = None;
        if let Some(max) = limits.max_response_chars {
            if let Some((end, _)) = text.char_indices().nth(max - self.chars) {
                text.truncate(end);
                beyond = Some(Beyond::Size);
            }
            self.chars += text.chars().count();
        }
        if let Some(max_repeats) = limits.max_repeats
            && let Some(end) = self.circles(limits, max_repeats, text.as_bytes())
        {
            let whole = (0..=end).rev().find(|at| text.is_char_boundary(*at));
            text.truncate(whole.unwrap_or(0));
            beyond = Some(Beyond::Repeats);
        }
        beyond
    }

    /// Where in `new` it is seen that the text goes in circles.
    fn circles(&mut self, limits: &Limits, max_repeats: usize, new: &[u8]) -> Option<usize> {
        let mut taken = 0;
        while taken < new.len() {
            let next_look = LOOK_EVERY_BYTES - self.bytes % LOOK_EVERY_BYTES;
            let until = new.len().min(taken + next_look);
            self.tail.extend_from_slice(&new[taken..until]);
            self.bytes += until - taken;
            taken = until;
            if self.bytes.is_multiple_of(LOOK_EVERY_BYTES) {
                let from = self.tail.len().saturating_sub(WINDOW_BYTES);
                if limits.goes_in_circles(&self.tail[from..], max_repeats) {
                    return Some(taken);
                }
                if from > WINDOW_BYTES {
                    self.tail.drain(..from);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(text: &str) -> Result<Limits, GatewayError> {
        Limits::new(&toml::from_str(text).unwrap(), "l")
    }

    /// What is let out of the pieces, and why it ends.
    fn measured(limits: &Limits, pieces: &[&str]) -> (String, Option<Beyond>) {
        let mut measured = Measured::default();
        let mut out = String::new();
        for piece in pieces {
            let mut text = (*piece).to_owned();
            let beyond = measured.push(limits, &mut text);
            out += &text;
            if beyond.is_some() {
                return (out, beyond);
            }
        }
        (out, None)
    }

    #[test]
    fn an_answer_ends_at_its_longest() {
        let limits = limits("max_response_chars = 5").unwrap();
        assert_eq!(
            measured(&limits, &["é", "bcdef", "g"]),
            ("ébcde".to_owned(), Some(Beyond::Size))
        );
        assert_eq!(
            measured(&limits, &["ébc", "de"]),
            ("ébcde".to_owned(), None)
        );
    }

    #[test]
    fn an_answer_that_goes_in_circles_ends() {
        let limits = limits("max_repeats = 8").unwrap();
        for unit in ["-", "no ", "And so on, and so forth. é\n"] {
            let text = format!("It began well: {}", unit.repeat(2000));
            let (out, beyond) = measured(&limits, &[&text]);
            assert_eq!(beyond, Some(Beyond::Repeats), "{unit}");
            assert!(
                out.len() < 15 + 512.max(unit.len() * 9) + 64,
                "{} {unit}",
                out.len()
            );
        }
    }

    #[test]
    fn an_answer_that_only_looks_alike_goes_on() {
        let limits = limits("max_repeats = 8").unwrap();
        let rows: String = (0..2000)
            .map(|n| format!("| row {n} | 0 | 0 | 0 |\n"))
            .collect();
        let few = "She said it again. ".repeat(7) + "x" + &"-".repeat(400);
        for text in [rows, few] {
            assert_eq!(measured(&limits, &[&text]), (text.clone(), None));
        }
    }

    #[test]
    fn each_bad_key_is_named() {
        for (text, says) in [
            ("", "l: needed is max_request_chars"),
            (
                "max_response_chars = 0",
                "l.max_response_chars: got 0, allowed is 1 or more",
            ),
            (
                "max_repeats = 2",
                "l.max_repeats: got 2, allowed is 3 to 5461",
            ),
            (
                "max_repeats = 9\nmin_repeated_bytes = 99999",
                "l.min_repeated_bytes: got 99999",
            ),
        ] {
            let message = limits(text).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            units in proptest::collection::vec(("[ab é]{1,40}", 1..60_usize), 1..6),
            cuts in proptest::collection::vec(0..4000_usize, 0..60),
            max_response_chars in 500..4000_usize,
        ) {
            let text: String = units.iter().map(|(unit, times)| unit.repeat(*times)).collect();
            let limits = limits(&format!("max_repeats = 6\nmin_repeated_bytes = 300\nmax_response_chars = {max_response_chars}")).unwrap();
            let mut at: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(measured(&limits, &pieces), measured(&limits, &[&text]));
        }
    }
}
