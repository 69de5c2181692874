use std::sync::Arc;

use proptest::prelude::*;

use super::{CORPUS, RARE, TRAINED, Trained};
use crate::text::Detokenizer;

/// Ids of every kind: any, the first ones (bytes), the last ones (byte and added tokens), outside the vocabulary.
fn ids() -> impl Strategy<Value = Vec<(u8, u32)>> {
    proptest::collection::vec((0_u8..4, any::<u32>()), 0..60)
}

fn resolve(trained: &Trained, drawn: &[(u8, u32)]) -> Vec<u32> {
    let size = u32::try_from(trained.model.vocab_size()).unwrap();
    let last = size.min(280);
    drawn
        .iter()
        .map(|&(kind, number)| match kind {
            0 => number % (size + 2),
            1 => number % 256,
            _ => size - 1 - number % last,
        })
        .collect()
}

fn stream(
    trained: &Trained,
    prompt: &[u32],
    ids: &[u32],
    cuts: &[usize],
    skip_special: bool,
) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(&trained.model), prompt, skip_special);
    let mut text = String::new();
    let mut rest = ids;
    for cut in cuts {
        let (now, later) = rest.split_at((*cut).min(rest.len()));
        text.push_str(&detokenizer.push(now));
        rest = later;
    }
    text.push_str(&detokenizer.push(rest));
    text.push_str(&detokenizer.finish());
    text
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_ids_in_any_split_give_the_whole_text(
        drawn in ids(),
        cuts in proptest::collection::vec(0_usize..6, 0..40),
        skip_special in any::<bool>(),
    ) {
        for trained in TRAINED.iter() {
            let ids = resolve(trained, &drawn);
            // The library's BPEDecoder panics on no tokens at all.
            let added = trained.library.get_added_vocabulary();
            let visible = ids.iter().filter_map(|&id| trained.library.id_to_token(id));
            let none = visible.filter(|token| !skip_special || !added.is_special_token(token)).count() == 0;
            let whole = if none { String::new() } else { trained.library.decode(&ids, skip_special).unwrap() };
            prop_assert_eq!(stream(trained, &[], &ids, &cuts, skip_special), whole.as_str(), "{}", trained.name);
            prop_assert_eq!(trained.model.decode(&ids, skip_special), whole.as_str(), "{}", trained.name);
        }
    }

    #[test]
    fn text_after_any_prompt_continues_it(line in 0_usize..CORPUS.len(), at in any::<proptest::sample::Index>()) {
        let text = format!("{} {RARE}", CORPUS[line]);
        for trained in TRAINED.iter() {
            let ids = trained.model.encode(&text, false).unwrap();
            if trained.name == "end-of-word suffix" {
                continue; // Its suffix stands inside tokens here, where the space for it is the output's.
            }
            let (prompt, output) = ids.split_at(at.index(ids.len() + 1));
            let whole = trained.library.decode(&ids, true).unwrap();
            let output = stream(trained, prompt, output, &[1; 200], true);
            prop_assert!(whole.ends_with(&output), "{}: {output:?} of {whole:?}", trained.name);
            // What is left is the prompt's text, up to a character that the output completes. Joining
            // spaces belong to either side.
            let before = &whole[..whole.len() - output.len()];
            let (mut before, mut shown) = (before.trim_start().to_owned(), shown(trained, prompt).trim_start().to_owned());
            if ["no decoder", "WordPiece steps"].contains(&trained.name) {
                before.retain(|c| c != ' ');
                shown.retain(|c| c != ' ');
            }
            prop_assert_eq!(shown, before, "{}", trained.name);
        }
    }
}

/// The whole characters of `prompt`'s bytes, without special tokens.
fn shown(trained: &Trained, prompt: &[u32]) -> String {
    let added = trained.library.get_added_vocabulary();
    let special = |id: &u32| {
        trained
            .library
            .id_to_token(*id)
            .is_some_and(|token| added.is_special_token(&token))
    };
    let bytes = prompt
        .iter()
        .filter(|id| !special(id))
        .flat_map(|&id| trained.model.token_text(id).1)
        .collect();
    match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            assert_eq!(error.utf8_error().error_len(), None);
            String::from_utf8_lossy(&error.as_bytes()[..error.utf8_error().valid_up_to()])
                .into_owned()
        }
    }
}

#[test]
fn encoding_equals_the_library() {
    for trained in TRAINED.iter() {
        for text in CORPUS
            .iter()
            .copied()
            .chain([RARE, "", " ", "<s>a</s><tool>né日"])
        {
            let expected = trained.library.encode(text, true).unwrap();
            assert_eq!(
                trained.model.encode(text, true).unwrap(),
                expected.get_ids(),
                "{}: {text:?}",
                trained.name
            );
        }
    }
}

#[test]
fn half_a_character_is_held_back() {
    let trained = &TRAINED[0];
    let ids = trained.model.encode("👩", false).unwrap();
    assert!(ids.len() > 1);
    let mut detokenizer = Detokenizer::new(Arc::clone(&trained.model), &[], true);
    for id in &ids[..ids.len() - 1] {
        assert_eq!(detokenizer.push(&[*id]), "");
        assert!(!detokenizer.is_settled());
    }
    assert_eq!(detokenizer.push(&ids[ids.len() - 1..]), "👩");
    assert!(detokenizer.is_settled());
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn first_token_keeps_its_space_after_a_prompt() {
    let trained = &TRAINED[1];
    let ids = trained.model.encode("again and", false).unwrap();
    let start =
        |prompt: &[u32]| Detokenizer::new(Arc::clone(&trained.model), prompt, true).push(&ids);
    assert_eq!(start(&[]), "again and");
    assert_eq!(start(&ids), " again and");
    let special = trained.model.token_id("<s>").unwrap();
    assert_eq!(start(&[special]), "again and");
}

#[test]
fn a_long_stream_costs_the_same_for_each_token() {
    let trained = &TRAINED[0];
    let ids = trained.model.encode(CORPUS[0], false).unwrap();
    let mut detokenizer = Detokenizer::new(Arc::clone(&trained.model), &[], true);
    let mut bytes = 0;
    for _ in 0..20_000 {
        bytes += detokenizer.push(&ids).len();
    }
    assert_eq!(bytes, 20_000 * CORPUS[0].len());
}

#[test]
fn a_token_has_its_true_bytes() {
    let byte_level = &TRAINED[0].model;
    for (id, text) in [("Ġ", " "), ("A", "A"), ("<s>", "<s>")] {
        let id = byte_level.token_id(id).unwrap();
        assert_eq!(
            byte_level.token_text(id),
            (text.to_owned(), text.as_bytes().to_vec())
        );
    }
    let ids = byte_level.encode("🇩", false).unwrap();
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|&id| byte_level.token_text(id).1)
        .collect();
    assert_eq!(bytes, "🇩".as_bytes());
    assert!(byte_level.token_text(ids[0]).0.contains('\u{fffd}'));
    assert_eq!(byte_level.token_text(u32::MAX), (String::new(), Vec::new()));

    let sentencepiece = &TRAINED[1].model;
    let byte = sentencepiece.token_id("<0xE5>").unwrap();
    assert_eq!(
        sentencepiece.token_text(byte),
        ("\u{fffd}".to_owned(), vec![0xe5])
    );
    let word = sentencepiece.encode("again", false).unwrap()[0];
    assert!(sentencepiece.token_text(word).0.starts_with(' '));
}
