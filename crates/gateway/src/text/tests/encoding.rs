//! Encoding in pieces, with and without what was seen before, against the tokenizers library's whole-text encoding.

use proptest::prelude::*;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper, SplitDelimiterBehavior,
};

use super::*;
use crate::text::encoder::Encoder;
use crate::text::pieces::{Cuts, LOCAL_PATTERNS, Piece};
use crate::text::words::Words;

fn ids_of(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Vec<u32> {
    let encoding = tokenizer.encode_fast(text, add_special).unwrap();
    encoding.get_ids().to_vec()
}

fn pieces<'a>(tokenizer: &Tokenizer, text: &'a str) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let take = |piece| {
        pieces.push(piece);
        Ok::<(), ()>(())
    };
    Cuts::new(tokenizer).unwrap().each(text, take).unwrap();
    pieces
}

/// The byte-level tokenizer with each of the patterns, its tokens and NFC.
static PATTERNS: LazyLock<Vec<Encoder>> = LazyLock::new(|| {
    LOCAL_PATTERNS
        .iter()
        .map(|pattern| {
            let mut tokenizer = Tokenizer::from_bytes(byte_level_bpe().to_string()).unwrap();
            let split = Split::new(
                SplitPattern::Regex((*pattern).to_owned()),
                SplitDelimiterBehavior::Isolated,
                false,
            );
            let parts: Vec<PreTokenizerWrapper> = vec![
                split.unwrap().into(),
                ByteLevel::new(false, true, false).into(),
            ];
            let id = |token| tokenizer.token_to_id(token).unwrap();
            let template = TemplateProcessing::builder()
                .try_single("<s> $A </s>")
                .unwrap()
                .special_tokens(["<s>", "</s>"].map(|token| (token, id(token))).to_vec())
                .build();
            tokenizer
                .with_pre_tokenizer(Some(Sequence::new(parts)))
                .with_post_processor(Some(template.unwrap()))
                .with_normalizer(Some(NormalizerWrapper::from(NFC)))
                .unwrap();
            Encoder::new(tokenizer)
        })
        .collect()
});

/// Words, white space, marks and tokens in any order, each up to hundreds of times over.
fn long_text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        prop::sample::select(CORPUS.to_vec()).prop_map(str::to_owned),
        prop::sample::select(vec![
            RARE, "<s>", "</s>", "<tool>", "né", "日", "a", "Z's", " ", "\n", "\n\n", "\r\n", "\t",
            "a \n", " \u{301}", "e\u{301}", "1234", "!", "/", "'", "don't ",
        ])
        .prop_map(str::to_owned),
        "\\PC{0,8}",
    ];
    prop::collection::vec((part, 1..200_usize), 0..12).prop_map(|parts| {
        parts
            .iter()
            .map(|(text, times)| text.repeat(*times))
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn ids_are_the_librarys_own_the_first_time_and_the_second(text in long_text(), add_special: bool) {
        for trained in TRAINED.iter() {
            let whole = ids_of(&trained.library, &text, add_special);
            for _ in 0..2 {
                let ids = trained.model.encode(&text, add_special).unwrap();
                prop_assert_eq!(&ids, &whole, "{}", trained.name);
            }
        }
        for encoder in PATTERNS.iter() {
            let whole = ids_of(encoder.tokenizer(), &text, add_special);
            for _ in 0..2 {
                let ids = encoder.encode(&text, add_special, &mut || ()).unwrap();
                prop_assert_eq!(&ids, &whole);
            }
        }
    }
}

/// Every assigned character, but of the ideographs that have planes to themselves one in 16.
fn characters() -> impl Iterator<Item = char> {
    let ideographs = (0x2_0000..0x4_0000).step_by(16);
    let all = (0..0x2_0000).chain(ideographs).chain(0xe_0000..0xe_1000);
    all.filter_map(char::from_u32)
}

#[test]
fn every_character_ends_a_word_where_the_library_says() {
    let all: Vec<char> = characters().collect();
    for (pattern, encoder) in LOCAL_PATTERNS.iter().zip(PATTERNS.iter()) {
        let words = Words::new(pattern, false).unwrap();
        for some in all.chunks(4096) {
            let text: String = some
                .iter()
                .map(|c| format!("a{c}b {c}{c}1{c}\n!{c}  {c}'{c}s"))
                .collect();
            let mut whole = PreTokenizedString::from(text.as_str());
            let PreTokenizerWrapper::Sequence(steps) =
                encoder.tokenizer().get_pre_tokenizer().unwrap()
            else {
                panic!("not as made above");
            };
            steps.as_ref()[0].pre_tokenize(&mut whole).unwrap();
            let splits = whole.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let ends: Vec<usize> = splits.iter().map(|(_, (_, end), _)| *end).collect();
            assert_eq!(words.ends(&text), ends, "{pattern}, from {:?}", some[0]);
        }
    }
}

#[test]
fn a_later_turn_finds_the_earlier_ones() {
    let folder = Folder::new(&[("tokenizer.json", &byte_level_bpe().to_string())]);
    let mut model = TextModel::load(folder.path()).unwrap();
    let first = format!("<s>user\n{}</s>", CORPUS[0].repeat(200));
    let second = format!("{first}assistant\nYes.</s><s>user\nWhy?</s>");
    model.encode(&first, false).unwrap();
    let before = model.cache_counts();
    assert_eq!(before.found_bytes, 0);
    let mut pauses = 0;
    model
        .encode_with_pauses(&second, false, &mut || pauses += 1)
        .unwrap();
    let text_bytes = (first.len() - "<s></s>".len()) as u64;
    assert_eq!(model.cache_counts().found_bytes, text_bytes);
    assert_eq!(pauses, 2);
    model.limit_cache(0);
    model.encode(&first, false).unwrap();
    model.encode(&first, false).unwrap();
    assert_eq!(model.cache_counts().found_bytes, 0);
}

#[test]
fn a_long_text_is_cut_between_words() {
    let encoder = &PATTERNS[0];
    let text = format!("<s>{}", "word ".repeat(2000));
    let pieces = pieces(encoder.tokenizer(), &text);
    let id = encoder.tokenizer().token_to_id("<s>");
    assert_eq!(pieces[0], Piece::Token(id.unwrap()));
    assert_eq!(pieces.len(), 4);
    for piece in &pieces[2..] {
        assert!(matches!(piece, Piece::Text(text) if text.starts_with(" word")));
    }
    // Words are never cut, however long.
    let one = "word".repeat(5000);
    assert_eq!(self::pieces(encoder.tokenizer(), &one).len(), 1);
}

#[test]
fn tokenizers_whose_texts_cannot_be_cut_are_left_alone() {
    let plain = byte_level_bpe();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut json = plain.clone();
        change(&mut json);
        Tokenizer::from_bytes(json.to_string()).unwrap()
    };
    assert!(Cuts::new(&changed(&|_| ())).is_some());
    for name in ["lstrip", "rstrip", "single_word"] {
        let tokenizer = changed(&|json| json["added_tokens"][0][name] = true.into());
        assert!(Cuts::new(&tokenizer).is_none(), "{name}");
    }
    let dropout = changed(&|json| json["model"]["dropout"] = json!(0.1));
    assert!(Cuts::new(&dropout).is_none());
    let first = changed(&|json| {
        json["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"});
    });
    assert!(Cuts::new(&first).is_none());
    let long = "word ".repeat(2000);
    for tokenizer in [
        changed(&|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()),
        changed(&|json| json["normalizer"] = json!({"type": "Lowercase"})),
        changed(&|json| json["added_tokens"][3]["normalized"] = true.into()),
    ] {
        assert_eq!(pieces(&tokenizer, &long), [Piece::Text(&long)]);
    }
}
