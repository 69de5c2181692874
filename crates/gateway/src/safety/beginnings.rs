//! From a pattern to the pattern of its beginnings: what a text may end with that could yet become a match.
//!
//! ```text
//! B(class) = class?    B(r s) = B(r) | r B(s)    B(r | s) = B(r) | B(s)    B(r{m,n}) = r{0,n-1} B(r)
//! ```
//!
//! Look-around counts as met, so the beginnings are those of all matches, and perhaps of some more.

use regex_syntax::hir::{Hir, HirKind, Repetition};

/// Beginnings of what `pattern` matches, the empty one and whole matches with them. Its repetitions have to be bounded.
pub fn beginnings(pattern: &Hir) -> Hir {
    match pattern.kind() {
        HirKind::Empty | HirKind::Look(_) => Hir::empty(),
        HirKind::Class(_) => optional(pattern.clone()),
        HirKind::Literal(literal) => of_sequence(&characters(&literal.0)),
        HirKind::Repetition(repeated) => of_repetition(repeated),
        HirKind::Capture(capture) => beginnings(&capture.sub),
        HirKind::Concat(parts) => of_sequence(parts),
        HirKind::Alternation(parts) => Hir::alternation(parts.iter().map(beginnings).collect()),
    }
}

/// Halved again and again, so that neither its depth nor its size grows much faster than the pattern.
fn of_sequence(parts: &[Hir]) -> Hir {
    match parts {
        [] => Hir::empty(),
        // A whole literal is a sequence too: of its characters.
        [one] if is_character(one) => optional(one.clone()),
        [one] => beginnings(one),
        _ => {
            let (head, tail) = parts.split_at(parts.len() / 2);
            let mut past_head: Vec<Hir> = head.iter().map(without_look).collect();
            past_head.push(of_sequence(tail));
            Hir::alternation(vec![Hir::concat(past_head), of_sequence(head)])
        }
    }
}

fn of_repetition(repeated: &Repetition) -> Hir {
    let last = beginnings(&repeated.sub);
    match repeated.max {
        Some(0) => Hir::empty(),
        max => {
            let before = Hir::repetition(Repetition {
                min: 0,
                max: max.map(|max| max - 1),
                greedy: true,
                sub: Box::new(without_look(&repeated.sub)),
            });
            Hir::concat(vec![before, last])
        }
    }
}

fn without_look(pattern: &Hir) -> Hir {
    match pattern.kind() {
        HirKind::Look(_) => Hir::empty(),
        HirKind::Empty | HirKind::Class(_) | HirKind::Literal(_) => pattern.clone(),
        HirKind::Repetition(repeated) => Hir::repetition(Repetition {
            sub: Box::new(without_look(&repeated.sub)),
            ..repeated.clone()
        }),
        HirKind::Capture(capture) => without_look(&capture.sub),
        HirKind::Concat(parts) => Hir::concat(parts.iter().map(without_look).collect()),
        HirKind::Alternation(parts) => Hir::alternation(parts.iter().map(without_look).collect()),
    }
}

fn optional(pattern: Hir) -> Hir {
    Hir::repetition(Repetition {
        min: 0,
        max: Some(1),
        greedy: true,
        sub: Box::new(pattern),
    })
}

fn is_character(pattern: &Hir) -> bool {
    match pattern.kind() {
        HirKind::Literal(literal) => characters(&literal.0).len() == 1,
        _ => false,
    }
}

/// Text comes in whole characters: no beginning ends within one.
fn characters(literal: &[u8]) -> Vec<Hir> {
    literal
        .utf8_chunks()
        .flat_map(|chunk| {
            let valid = chunk
                .valid()
                .chars()
                .map(|c| Hir::literal(c.to_string().into_bytes()));
            valid.chain(chunk.invalid().iter().map(|byte| Hir::literal([*byte])))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use regex::Regex;

    use super::*;

    fn begun(pattern: &str) -> Regex {
        let hir = beginnings(&regex_syntax::parse(pattern).unwrap());
        Regex::new(&format!("^(?:{hir})$")).unwrap()
    }

    #[test]
    fn every_beginning_of_a_match_is_one() {
        for (pattern, text) in [
            ("abc", "abc"),
            (r"\bfoo(?:bar|baz){2}\b", "foobazbar"),
            ("(?i)straße", "STRAßE"),
            ("日本(?:語|人)?", "日本語"),
            ("[a-c]{2,4}@x", "abca@x"),
            ("(a|b)(c{1,2}d){0,2}e", "acdccde"),
        ] {
            let begun = begun(pattern);
            let ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
            for end in ends {
                assert!(
                    begun.is_match(&text[..end]),
                    "{pattern}: {:?}",
                    &text[..end]
                );
            }
        }
    }

    #[test]
    fn nothing_else_is() {
        for (pattern, other) in [
            ("abc", "ac"),
            ("ab{1,3}", "abbbb"),
            ("a|bc", "c"),
            ("日本", "本"),
        ] {
            assert!(!begun(pattern).is_match(other), "{pattern} {other}");
        }
    }

    proptest! {
        /// Cut anywhere, what the pattern generates is a beginning.
        #[test]
        fn generated_matches_can_be_cut_anywhere(
            text in "(?:ab|cé){1,3}[x-z]{0,4}(?:@[a-b]{1,2}){1,2}",
            cut in 0_usize..40,
        ) {
            let begun = begun("(?:ab|cé){1,3}[x-z]{0,4}(?:@[a-b]{1,2}){1,2}");
            let end = text.char_indices().map(|(at, _)| at).nth(cut).unwrap_or(text.len());
            prop_assert!(begun.is_match(&text[..end]));
        }
    }
}
