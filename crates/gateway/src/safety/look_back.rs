//! Matches in a text that comes in pieces. Of the text only that is held back which could yet become a match, so none
//! of a match is let out before it is known to be one; and whether it comes in one piece or in many, what comes out is
//! the same.
//!
//! ```text
//! pattern \bsecret-\d{4}\b      ...the sec | ret-12 | 34 is
//!                    let out ^       held: "sec", "secret-12", "secret-1234"; at " " it is a match
//! ```
//!
//! That no match begins at a place is settled as soon as the text from there is not the beginning of one. Matches have
//! a longest length, and so has what is held back.

use std::ops::Range;

use regex::{Regex, RegexBuilder};
use regex_syntax::hir::Hir;

use super::beginnings::beginnings;

/// Of a compiled pattern.
const MAX_COMPILED_BYTES: usize = 16 << 20;
/// Longest match of any pattern, and so the most that is held back.
pub const MAX_MATCH_BYTES: usize = 4096;

/// What is looked for.
#[derive(Debug)]
pub struct Rule {
    whole: Regex,
    /// What the text ends with that begins a match.
    begun: Regex,
    /// How much of a match, from its start, really is one.
    judge: fn(&str) -> Option<usize>,
    /// What stands in its place, if it is masked.
    pub mask: String,
}

impl Rule {
    /// Looks for any of `patterns`; of several at one place for the first.
    ///
    /// # Errors
    /// They are too large together.
    pub fn new(
        patterns: Vec<Hir>,
        judge: fn(&str) -> Option<usize>,
        mask: String,
    ) -> Result<Rule, String> {
        let any = Hir::alternation(patterns);
        let compile = |pattern: String| {
            RegexBuilder::new(&pattern)
                .size_limit(MAX_COMPILED_BYTES)
                .build()
                .map_err(|error| match error {
                    regex::Error::CompiledTooBig(_) => {
                        "too large when compiled, allowed are fewer or shorter ones".to_owned()
                    }
                    other => other
                        .to_string()
                        .lines()
                        .last()
                        .unwrap_or_default()
                        .to_owned(),
                })
        };
        Ok(Rule {
            whole: compile(any.to_string())?,
            begun: compile(format!(r"(?:{})\z", beginnings(&any)))?,
            judge,
            mask,
        })
    }

    /// The first match that begins in `range` of `text`.
    fn find(&self, text: &str, range: Range<usize>) -> Option<Range<usize>> {
        let mut from = range.start;
        loop {
            let found = self.whole.find_at(text, from)?;
            let start = found.start();
            if start >= range.end {
                return None;
            }
            if let Some(length) = (self.judge)(found.as_str()) {
                return Some(start..start + length);
            }
            from = start + text[start..].chars().next().map_or(1, char::len_utf8);
        }
    }
}

/// A pattern that may be looked for in a text that comes in pieces.
///
/// # Errors
/// Why not.
pub fn bounded(pattern: &str) -> Result<Hir, String> {
    let hir = regex_syntax::parse(pattern).map_err(|error| match error {
        regex_syntax::Error::Parse(error) => error.kind().to_string(),
        regex_syntax::Error::Translate(error) => error.kind().to_string(),
        other => other.to_string(),
    })?;
    let properties = hir.properties();
    if properties.minimum_len().is_none_or(|length| length == 0) {
        return Err("it matches nothing, or the empty text".to_owned());
    }
    match properties.maximum_len() {
        None => {
            Err("its matches have no longest length: write {1,100} for +, {0,100} for *".to_owned())
        }
        Some(bytes) if bytes > MAX_MATCH_BYTES => Err(format!(
            "its longest match has {bytes} bytes, allowed are at most {MAX_MATCH_BYTES}"
        )),
        Some(_) => Ok(hir),
    }
}

/// One text, as far as it is held back.
#[derive(Debug, Default)]
pub struct LookBack {
    /// The last character that was let out, then what is held back.
    text: String,
    /// Where the latter begins.
    at: usize,
}

impl LookBack {
    /// Takes `new` text, the `last` of it or not, and lets out what is settled. Tells `found` of each match; if that
    /// says so the match is masked, else nothing is let out from it on and the result is true.
    pub fn push(
        &mut self,
        rule: &Rule,
        new: &str,
        last: bool,
        out: &mut String,
        mut found: impl FnMut(&str) -> bool,
    ) -> bool {
        self.text.push_str(new);
        loop {
            let held = &self.text[self.at..];
            let open = match rule.begun.find(held) {
                Some(begun) if !last => self.at + begun.start(),
                _ => self.text.len(),
            };
            let Some(at) = rule.find(&self.text, self.at..open) else {
                out.push_str(&self.text[self.at..open]);
                self.at = open;
                break;
            };
            out.push_str(&self.text[self.at..at.start]);
            if !found(&self.text[at.clone()]) {
                return true;
            }
            out.push_str(&rule.mask);
            self.at = at.end;
        }
        // What stands before the text decides where words begin.
        let before = self.text[..self.at].chars().next_back();
        let context = before.map_or(0, char::len_utf8);
        self.text.drain(..self.at - context);
        self.at = context;
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(patterns: &[&str]) -> Rule {
        let patterns = patterns.iter().map(|p| bounded(p).unwrap()).collect();
        Rule::new(patterns, |text| Some(text.len()), "#".to_owned()).unwrap()
    }

    /// What each piece lets out.
    fn masked(rule: &Rule, pieces: &[&str]) -> Vec<String> {
        let mut held = LookBack::default();
        let last = pieces.len() - 1;
        pieces
            .iter()
            .enumerate()
            .map(|(index, piece)| {
                let mut out = String::new();
                assert!(!held.push(rule, piece, index == last, &mut out, |_| true));
                out
            })
            .collect()
    }

    #[test]
    fn nothing_of_a_match_gets_out_before_it_is_one() {
        let rule = rule(&[r"\bsecret-\d{4}\b"]);
        let pieces = ["the sec", "ret-12", "34", " on", ""];
        assert_eq!(masked(&rule, &pieces), ["the ", "", "", "# on", ""]);
        let none = ["the sec", "ret-12", "345", " on", ""];
        assert_eq!(
            masked(&rule, &none),
            ["the ", "", "secret-12345", " on", ""]
        );
    }

    #[test]
    fn text_that_begins_no_match_is_not_held_back() {
        assert_eq!(
            masked(&rule(&["foo"]), &["a", "b", "f", "x", ""]),
            ["a", "b", "", "fx", ""]
        );
    }

    #[test]
    fn a_match_ends_the_text_where_it_is_not_masked() {
        let mut out = String::new();
        let mut seen = Vec::new();
        let ended = LookBack::default().push(
            &rule(&["b{1,3}?c{1,2}"]),
            "abbcd",
            false,
            &mut out,
            |text| {
                seen.push(text.to_owned());
                false
            },
        );
        assert!(ended);
        assert_eq!((out.as_str(), seen), ("a", vec!["bbc".to_owned()]));
    }

    #[test]
    fn a_candidate_that_is_none_does_not_hide_the_next_one() {
        let patterns = vec![bounded(r"\d{1,3}").unwrap()];
        let even = |text: &str| {
            text.ends_with(['0', '2', '4', '6', '8'])
                .then_some(text.len())
        };
        let rule = Rule::new(patterns, even, "#".to_owned()).unwrap();
        assert_eq!(masked(&rule, &["1112 31"]).concat(), "1# 31");
    }

    #[test]
    fn patterns_without_a_longest_match_are_refused() {
        for (pattern, says) in [
            ("a+", "no longest length"),
            ("a{0,3}", "empty text"),
            ("(a", "unclosed group"),
            ("(?:a{64}){65}", "4160 bytes"),
            (r"[^\x00-\x{10FFFF}]", "nothing"),
        ] {
            let reason = bounded(pattern).unwrap_err();
            assert!(reason.contains(says), "{pattern}: {reason}");
        }
    }

    const PATTERNS: [&[&str]; 8] = [
        &["ab", "abc{1,3}"],
        &["abc{1,3}", "ab"],
        &[r"\bab\b"],
        &[r"(?m)^a{1,3}b?$"],
        &["^a", "b$"],
        &["[ab]{1,4}c", "é{2}"],
        &["a{2,5}?b{0,2}", r"\Bc"],
        &["(?i)é ?A", "a(?:b|c ){1,2}a"],
    ];

    proptest! {
        /// However a text is cut, what comes out is what the whole pattern makes of the whole text.
        #[test]
        fn cuts_do_not_matter(
            text in "[abcé \n]{0,40}",
            cuts in proptest::collection::vec(0..60_usize, 0..20),
            which in 0..PATTERNS.len(),
        ) {
            let rule = rule(PATTERNS[which]);
            let mut at: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let expected = rule.whole.replace_all(&text, "#");
            prop_assert_eq!(masked(&rule, &pieces).concat(), expected.as_ref());
            let one_by_one: Vec<String> = text.chars().map(String::from).chain([String::new()]).collect();
            let pieces: Vec<&str> = one_by_one.iter().map(String::as_str).collect();
            prop_assert_eq!(masked(&rule, &pieces).concat(), expected.as_ref());
        }
    }
}
