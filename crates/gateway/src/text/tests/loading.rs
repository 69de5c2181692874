use std::path::Path;

use serde_json::json;

use super::{Folder, TRAINED, byte_level_bpe};
use crate::text::{MAX_TEXT_BYTES, TextError, TextModel, tokenizer_digest};

fn load_error(files: &[(&str, &str)]) -> TextError {
    TextModel::load(Folder::new(files).path()).err().unwrap()
}

#[test]
fn a_missing_folder_or_file_is_named() {
    let error = TextModel::load(Path::new("/nowhere/at-all")).err().unwrap();
    assert!(matches!(error, TextError::Missing { .. }));
    assert!(error.to_string().contains("/nowhere/at-all"));
    let error = load_error(&[]);
    assert!(matches!(error, TextError::Missing { .. }));
    assert!(error.to_string().contains("tokenizer.json"));
}

#[test]
fn a_slow_tokenizer_says_how_to_convert() {
    let error = load_error(&[("tokenizer.model", "x")]);
    assert!(matches!(
        error,
        TextError::SlowTokenizer {
            found: "tokenizer.model",
            ..
        }
    ));
    assert!(error.to_string().contains("save_pretrained"));
}

#[test]
fn damage_is_named_with_its_file() {
    let good = byte_level_bpe().to_string();
    for (name, content) in [
        ("tokenizer.json", &good[..good.len() / 2]),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{\"chat_template\": 3}"),
        (
            "tokenizer_config.json",
            "{\"chat_template\": [{\"name\": \"default\"}]}",
        ),
        ("generation_config.json", "{\"eos_token_id\": \"x\"}"),
        ("config.json", "{\"eos_token_id\": [1, -2]}"),
    ] {
        let error = load_error(&[("tokenizer.json", good.as_str()), (name, content)]);
        assert!(
            matches!(error, TextError::Damaged { .. }),
            "{name}: {error}"
        );
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn a_decoder_without_a_streaming_form_is_refused() {
    let mut tokenizer = byte_level_bpe();
    tokenizer["decoder"] =
        json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true});
    let error = load_error(&[("tokenizer.json", &tokenizer.to_string())]);
    assert!(matches!(error, TextError::Unsupported(_)));
    assert!(error.to_string().contains("CTC"));
}

#[test]
fn ends_of_sequence_come_from_the_first_file_that_names_them() {
    let tokenizer = byte_level_bpe().to_string();
    let load = |files: &[(&str, &str)]| {
        let mut all = vec![("tokenizer.json", tokenizer.as_str())];
        all.extend_from_slice(files);
        TextModel::load(Folder::new(&all).path())
            .unwrap()
            .eos_token_ids()
            .to_vec()
    };
    let end = TRAINED[0].model.token_id("</s>").unwrap();
    let config = ("config.json", "{\"eos_token_id\": 7}");
    let tokens = (
        "tokenizer_config.json",
        "{\"eos_token\": {\"content\": \"</s>\"}}",
    );
    assert_eq!(load(&[]), Vec::<u32>::new());
    assert_eq!(load(&[tokens]), [end]);
    assert_eq!(load(&[tokens, config]), [7]);
    assert_eq!(
        load(&[
            tokens,
            config,
            ("generation_config.json", "{\"eos_token_id\": [5, 6]}")
        ]),
        [5, 6]
    );
    assert_eq!(load(&[config, ("generation_config.json", "{}")]), [7]);
    assert_eq!(
        load(&[("config.json", "{\"text_config\": {\"eos_token_id\": 9}}")]),
        [9]
    );
}

#[test]
fn the_digest_is_of_the_file_that_decides_the_ids() {
    let tokenizer = byte_level_bpe().to_string();
    let folder = Folder::new(&[("tokenizer.json", &tokenizer)]);
    let other = Folder::new(&[
        ("tokenizer.json", &tokenizer),
        ("tokenizer_config.json", "{}"),
    ]);
    let digest = tokenizer_digest(folder.path()).unwrap();
    assert_eq!(digest.len(), 64);
    assert_eq!(digest, tokenizer_digest(other.path()).unwrap());
    assert_eq!(digest, TextModel::load(folder.path()).unwrap().digest());
    let abc = Folder::new(&[("tokenizer.json", "abc")]);
    let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(tokenizer_digest(abc.path()).unwrap(), known);
}

#[test]
fn text_above_the_limit_is_refused() {
    let text = "a".repeat(MAX_TEXT_BYTES + 1);
    let error = TRAINED[0].model.encode(&text, false).unwrap_err();
    assert!(matches!(error, TextError::TooLong { .. }));
}
