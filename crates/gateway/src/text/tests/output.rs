use proptest::prelude::*;

use super::{CORPUS, RARE, TRAINED};
use crate::text::OutputText;

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn text_up_to_the_stop_string_and_every_token_once(
        line in 0_usize..CORPUS.len(),
        from in any::<proptest::sample::Index>(),
        length in 1_usize..6,
        step in 1_usize..5,
        include in any::<bool>(),
    ) {
        let text = format!("{} {RARE}", CORPUS[line]);
        for trained in TRAINED.iter() {
            let ids = trained.model.encode(&text, false).unwrap();
            let whole = trained.model.decode(&ids, true);
            let chars: Vec<char> = whole.chars().collect();
            let start = from.index(chars.len());
            let stop: String = chars[start..(start + length).min(chars.len())].iter().collect();
            let found = whole.find(&stop).unwrap();
            let expected = &whole[..if include { found + stop.len() } else { found }];

            let mut output = OutputText::new(&trained.model, &[], vec![stop.clone()], true, include);
            let (mut shown, mut settled, mut stopped) = (String::new(), 0, None);
            for chunk in ids.chunks(step) {
                let piece = output.push(chunk);
                prop_assert_eq!(piece.tokens.start, settled);
                settled = piece.tokens.end;
                // All text of the settled tokens is out, or cut.
                let alone = trained.model.decode(&ids[..settled], true);
                shown.push_str(&piece.text);
                if piece.stopped.is_some() {
                    stopped = piece.stopped;
                    break;
                }
                prop_assert!(shown.len() >= alone.trim_end_matches('\u{fffd}').len(), "{}", trained.name);
            }
            let piece = output.finish();
            shown.push_str(&piece.text);
            stopped = stopped.or(piece.stopped);
            prop_assert_eq!(shown, expected, "{}", trained.name);
            prop_assert_eq!(stopped, Some(stop), "{}", trained.name);
            prop_assert!(output.push(&ids).text.is_empty());
        }
    }
}

#[test]
fn tokens_behind_a_possible_stop_string_are_not_settled() {
    let model = &TRAINED[0].model;
    let ids: Vec<u32> = ["a", "b", "c"]
        .iter()
        .map(|token| model.token_id(token).unwrap())
        .collect();
    let mut output = OutputText::new(model, &[], vec!["abx".to_owned()], true, false);
    let mut push = |id: u32| output.push(&[id]);
    assert_eq!(push(ids[2]).tokens, 0..1);
    assert_eq!(push(ids[0]).tokens, 1..1);
    assert_eq!(push(ids[1]).tokens, 1..1);
    let piece = push(ids[2]);
    assert_eq!((piece.text.as_str(), piece.tokens), ("abc", 1..4));
    push(ids[0]);
    let piece = output.finish();
    assert_eq!((piece.text.as_str(), piece.tokens), ("a", 4..5));
}

#[test]
fn a_stop_string_does_not_stop_within_min_tokens() {
    let model = &TRAINED[0].model;
    let ids: Vec<u32> = "abab"
        .chars()
        .map(|c| model.token_id(&c.to_string()).unwrap())
        .collect();
    let run = |min_tokens| {
        let mut output = OutputText::new(model, &[], vec!["ab".to_owned()], true, true)
            .with_min_tokens(min_tokens);
        let piece = output.push(&ids);
        (piece.text, piece.tokens.end, output.is_stopped())
    };
    assert_eq!(run(0), ("ab".to_owned(), 2, true));
    assert_eq!(run(1), ("ab".to_owned(), 2, true));
    assert_eq!(run(2), ("abab".to_owned(), 4, true));
    assert_eq!(run(4), ("abab".to_owned(), 4, false));
}
