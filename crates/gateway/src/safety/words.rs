//! The word and regex policy: what an operator's lists become.

use regex_syntax::hir::Hir;

use super::look_back::{Rule, bounded};
use crate::config::safety::WordsConfig;
use crate::error::GatewayError;

const MAX_WORD_BYTES: usize = 256;
const MAX_WORDS: usize = 10_000;
const MAX_PATTERNS: usize = 1000;

/// What the hook looks for; `path` is its place in the configuration.
///
/// # Errors
/// `GatewayError::Config` names the key, what it got and what is allowed.
pub fn rule(config: &WordsConfig, path: &str) -> Result<Rule, GatewayError> {
    let bad = |key: &str, what: String| GatewayError::Config(format!("{path}.{key}: {what}"));
    for (key, count, most) in [
        ("words", config.words.len(), MAX_WORDS),
        ("patterns", config.patterns.len(), MAX_PATTERNS),
    ] {
        if count > most {
            return Err(bad(key, format!("got {count}, allowed are at most {most}")));
        }
    }
    if config.words.is_empty() && config.patterns.is_empty() {
        return Err(bad(
            "words",
            "missing, needed are words or patterns".to_owned(),
        ));
    }
    let words = config.words.iter().enumerate().map(|(index, word)| {
        let key = format!("words[{index}]");
        if word.trim().is_empty() || word.len() > MAX_WORD_BYTES {
            let what =
                format!("got {word:?}, allowed are 1 to {MAX_WORD_BYTES} bytes, not only spaces");
            return Err(bad(&key, what));
        }
        bounded(&whole_word(word)).map_err(|reason| bad(&key, format!("got {word:?}: {reason}")))
    });
    let patterns = config.patterns.iter().enumerate().map(|(index, pattern)| {
        bounded(pattern).map_err(|reason| {
            bad(
                &format!("patterns[{index}]"),
                format!("got {pattern:?}: {reason}"),
            )
        })
    });
    let all: Vec<Hir> = words.chain(patterns).collect::<Result<_, _>>()?;
    check_mask(&config.mask).map_err(|what| bad("mask", what))?;
    Rule::new(all, |text| Some(text.len()), config.mask.clone())
        .map_err(|what| bad("patterns", what))
}

/// The word as a pattern: in any case, with any white space for a space, and not as a part of a longer word.
fn whole_word(word: &str) -> String {
    let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let parts: Vec<String> = word.split_whitespace().map(regex_syntax::escape).collect();
    let text = parts.join(r"\s{1,8}");
    let edge = |at: Option<char>| if is_word(at) { r"\b" } else { "" };
    let (first, last) = (word.trim().chars().next(), word.trim().chars().next_back());
    format!("(?i){}{text}{}", edge(first), edge(last))
}

/// What is masked may stand in JSON of a tool's arguments, where a quote would end a string.
fn check_mask(mask: &str) -> Result<(), String> {
    let fits = mask
        .chars()
        .all(|c| !c.is_control() && !matches!(c, '"' | '\\'));
    if mask.len() <= 64 && fits {
        Ok(())
    } else {
        Err(format!(
            "got {mask:?}, allowed are at most 64 bytes without quotes, backslashes and control characters"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safety::look_back::LookBack;

    fn config(text: &str) -> WordsConfig {
        toml::from_str(text).unwrap()
    }

    fn masked(config: &WordsConfig, text: &str) -> String {
        let mut out = String::new();
        LookBack::default().push(&rule(config, "w").unwrap(), text, true, &mut out, |_| true);
        out
    }

    #[test]
    fn words_are_whole_ones_in_any_case() {
        let config = config("words = ['ass', 'C++', 'New York', 'größe']\nmask = '#'");
        for (text, out) in [
            ("Ass, pass, assess ASS", "#, pass, assess #"),
            ("c++ and C++11", "# and #11"),
            ("new\n york NewYork", "# NewYork"),
            ("GRÖSSE GRÖßE", "GRÖSSE #"),
        ] {
            assert_eq!(masked(&config, text), out);
        }
    }

    #[test]
    fn each_bad_key_is_named() {
        for (text, says) in [
            (
                "words = []",
                "w.words: missing, needed are words or patterns",
            ),
            ("words = ['a', ' ']", "w.words[1]: got \" \""),
            (
                "patterns = ['a', '(b']",
                "w.patterns[1]: got \"(b\": unclosed group",
            ),
            (
                "patterns = ['a*']",
                "w.patterns[0]: got \"a*\": it matches nothing, or the empty text",
            ),
            (
                "patterns = ['ab+']",
                "w.patterns[0]: got \"ab+\": its matches have no longest length",
            ),
            ("patterns = ['(?P<x>a)', '(?P<x>b)']", "w.patterns: "),
            (
                "patterns = ['[\\w\\s]{1,1000}[\\w\\s]{1,20}']",
                "w.patterns: too large",
            ),
            ("words = ['a']\nmask = '\"'", "w.mask: got \"\\\"\""),
        ] {
            let message = rule(&config(text), "w").unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }
}
