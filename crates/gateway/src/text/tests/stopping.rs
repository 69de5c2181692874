use proptest::prelude::*;

use crate::text::StopMatcher;

/// Text of few letters, so that stop strings are met and nearly met often; some of two bytes with a shared first.
fn text(most: usize) -> impl Strategy<Value = String> {
    proptest::collection::vec(
        proptest::sample::select(vec!['a', 'b', 'é', 'è', '\n']),
        0..most,
    )
    .prop_map(|chars| chars.into_iter().collect())
}

/// What a whole text gives: the shown part, and the stop string.
fn oracle(text: &str, stops: &[String], include: bool) -> (String, Option<String>) {
    let ends = stops
        .iter()
        .filter(|stop| !stop.is_empty())
        .filter_map(|stop| Some((text.find(stop.as_str())? + stop.len(), stop)));
    match ends.min_by_key(|(end, stop)| (*end, usize::MAX - stop.len())) {
        Some((end, stop)) => {
            let kept = if include { end } else { end - stop.len() };
            (text[..kept].to_owned(), Some(stop.clone()))
        }
        None => (text.to_owned(), None),
    }
}

/// The bytes that have to be held back after `text`.
fn held(text: &str, stops: &[String]) -> usize {
    let begins = |length: &usize| {
        let end = &text.as_bytes()[text.len() - length..];
        stops
            .iter()
            .any(|stop| stop.len() > *length && stop.as_bytes().starts_with(end))
    };
    (0..=text.len()).rev().find(begins).unwrap_or(0)
}

fn run(pieces: &[&str], stops: &[String], include: bool) -> (String, Option<String>) {
    let mut matcher = StopMatcher::new(stops.to_vec(), include);
    let mut shown = String::new();
    for piece in pieces {
        if let Some(stop) = matcher.push(piece, &mut shown) {
            return (shown, Some(stop));
        }
    }
    matcher.finish(&mut shown);
    (shown, None)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_split_gives_what_find_gives(
        text in text(14),
        stops in proptest::collection::vec(text(5), 0..4),
        include in any::<bool>(),
    ) {
        let expected = oracle(&text, &stops, include);
        let bounds: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        for &first in &bounds {
            for &second in bounds.iter().filter(|&&at| at >= first) {
                let pieces = [&text[..first], &text[first..second], &text[second..]];
                prop_assert_eq!(&run(&pieces, &stops, include), &expected, "split {:?}", pieces);
            }
        }
        let letters: Vec<&str> = bounds.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        prop_assert_eq!(&run(&letters, &stops, include), &expected);
    }

    #[test]
    fn no_more_is_held_back_than_may_become_a_stop(text in text(14), stops in proptest::collection::vec(text(5), 1..4)) {
        let mut matcher = StopMatcher::new(stops.clone(), false);
        let mut shown = String::new();
        for (at, c) in text.char_indices() {
            if matcher.push(c.encode_utf8(&mut [0; 4]), &mut shown).is_some() {
                break;
            }
            let seen = &text[..at + c.len_utf8()];
            prop_assert_eq!(shown.len() + held(seen, &stops), seen.len());
            prop_assert_eq!(matcher.held_bytes(), held(seen, &stops));
        }
    }
}

#[test]
fn a_long_stop_string_is_found_in_linear_time() {
    let stop = format!("{}b", "a".repeat(100_000));
    let mut matcher = StopMatcher::new(vec![stop.clone()], false);
    let mut shown = String::new();
    for _ in 0..300 {
        assert_eq!(matcher.push(&"a".repeat(1000), &mut shown), None);
    }
    assert_eq!(shown.len(), 200_000);
    assert_eq!(matcher.push("b", &mut shown), Some(stop));
    assert_eq!(shown.len(), 200_000);
}
