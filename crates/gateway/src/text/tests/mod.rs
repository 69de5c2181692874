//! Text against the tokenizers library's own whole-text decoding, with tokenizers trained here.

mod encoding;
mod loading;
mod output;
mod stopping;
mod streaming;
mod templates;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};
use tokenizers::Tokenizer;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

use super::TextModel;

const CORPUS: [&str; 8] = [
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "Grüße aus München: schöne Straßen, süße Äpfel, heiße Öfen.",
    "Καλημέρα κόσμε, τι κάνεις σήμερα; Όλα καλά!",
    "東京は今日も雨です。明日は晴れるでしょう。",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))\n",
    "She said: \"it's fine\"... don't worry, we're all here -- aren't we?",
    "  spaces   between    words     and\ttabs\tand\r\nlines  ",
];

/// Text that the corpus does not cover: emoji, joined emoji, rare scripts, combining marks.
const RARE: &str = " 👩‍👩‍👧‍👦 ok 🇩🇪, e\u{301}! አማርኛ \u{10348} naïve\u{200b}\u{fffd} <0x41> ▁ <unk> ";

/// A folder that is gone with its value.
struct Folder(PathBuf);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("scalellm-text-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        for (name, content) in files {
            std::fs::write(path.join(name), content).unwrap();
        }
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A trained tokenizer, as the library has it and as the gateway has it.
struct Trained {
    name: &'static str,
    library: Tokenizer,
    model: Arc<TextModel>,
}

impl Trained {
    fn new(name: &'static str, tokenizer_json: &Value) -> Self {
        let text = tokenizer_json.to_string();
        let folder = Folder::new(&[("tokenizer.json", &text)]);
        let library = Tokenizer::from_bytes(&text).unwrap();
        Self {
            name,
            library,
            model: Arc::new(TextModel::load(folder.path()).unwrap()),
        }
    }
}

/// Byte-level BPE; SentencePiece-style BPE with byte fallback; Unigram with Metaspace, and with byte fallback;
/// and the remaining decoders on the BPE's vocabulary.
static TRAINED: LazyLock<Vec<Trained>> = LazyLock::new(|| {
    let byte_level = byte_level_bpe();
    let sentencepiece = sentencepiece_bpe();
    let unigram = unigram();
    let mut fallback = with_byte_tokens(&unigram);
    fallback["model"]["byte_fallback"] = json!(true);
    let llama_steps = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let decoder = |base: &Value, decoder: Value| {
        let mut changed = base.clone();
        changed["decoder"] = decoder;
        changed
    };
    vec![
        Trained::new("byte-level BPE", &byte_level),
        Trained::new(
            "SentencePiece BPE",
            &decoder(&sentencepiece, llama_steps.clone()),
        ),
        Trained::new(
            "SentencePiece BPE, Gemma's steps",
            &decoder(
                &sentencepiece,
                json!({
            "type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]}),
            ),
        ),
        Trained::new("Unigram, Metaspace", &unigram),
        Trained::new("Unigram, byte fallback", &decoder(&fallback, llama_steps)),
        Trained::new(
            "Unigram, byte fallback then Metaspace",
            &decoder(
                &fallback,
                json!({
            "type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]}),
            ),
        ),
        Trained::new("no decoder", &decoder(&sentencepiece, Value::Null)),
        Trained::new(
            "end-of-word suffix",
            &decoder(&sentencepiece, json!({"type": "BPEDecoder", "suffix": "e"})),
        ),
        Trained::new(
            "WordPiece steps",
            &decoder(
                &sentencepiece,
                json!({
            "type": "WordPiece", "prefix": "a", "cleanup": true}),
            ),
        ),
        Trained::new(
            "bytes, then stripped",
            &decoder(
                &byte_level,
                json!({
            "type": "Sequence", "decoders": [
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 2, "stop": 0}]}),
            ),
        ),
    ]
});

fn corpus() -> impl Iterator<Item = String> + Send {
    CORPUS
        .iter()
        .cycle()
        .take(200)
        .enumerate()
        .map(|(i, line)| line.split_at(line.floor_char_boundary(i % 7)).1.to_owned())
}

/// Special and ordinary added tokens, some with characters that the byte-level table knows.
fn add_tokens(tokenizer: &mut Value, first_id: usize) {
    let added: Vec<Value> = [
        ("<s>", true),
        ("</s>", true),
        ("<unk>", true),
        ("<tool>", false),
        ("né", false),
        ("日", false),
    ]
    .iter()
    .enumerate()
    .map(|(i, (content, special))| {
        json!({"id": first_id + i, "content": content, "special": special, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
    })
    .collect();
    tokenizer["added_tokens"] = added.into();
}

fn to_json(tokenizer: &Tokenizer) -> Value {
    serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap()
}

fn byte_level_bpe() -> Value {
    let bytes = ByteLevel::new(false, false, true);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(bytes))
        .with_decoder(Some(bytes));
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(600)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer
        .train(&mut TrainerWrapper::BpeTrainer(trainer), corpus())
        .unwrap();
    let mut json = to_json(&tokenizer);
    add_tokens(&mut json, 700);
    json
}

fn sentencepiece_bpe() -> Value {
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(500)
        .build();
    tokenizer
        .train(&mut TrainerWrapper::BpeTrainer(trainer), corpus())
        .unwrap();
    let mut json = with_byte_tokens(&to_json(&tokenizer));
    json["model"]["byte_fallback"] = json!(true);
    json["model"]["unk_token"] = json!("<unk>");
    json["model"]["fuse_unk"] = json!(true);
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    json["pre_tokenizer"] = Value::Null;
    json
}

fn unigram() -> Value {
    let metaspace = Metaspace::new('▁', PrependScheme::Always, true);
    let mut tokenizer = Tokenizer::new(Unigram::default());
    tokenizer
        .with_pre_tokenizer(Some(metaspace.clone()))
        .with_decoder(Some(metaspace));
    let trainer = UnigramTrainer::builder()
        .show_progress(false)
        .vocab_size(300)
        .unk_token(Some("<unk>".to_owned()))
        .special_tokens(vec![tokenizers::AddedToken::from("<unk>", true)])
        .build()
        .unwrap();
    tokenizer
        .train(&mut TrainerWrapper::UnigramTrainer(trainer), corpus())
        .unwrap();
    let mut json = to_json(&tokenizer);
    let first_id = json["model"]["vocab"].as_array().unwrap().len();
    add_tokens(&mut json, first_id);
    json["added_tokens"][2]["id"] = json!(0);
    json
}

/// `<0x00>` to `<0xFF>` at the end of the model's vocabulary, and the added tokens after them.
fn with_byte_tokens(tokenizer: &Value) -> Value {
    let mut json = tokenizer.clone();
    let names = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let count = match &mut json["model"]["vocab"] {
        Value::Object(vocabulary) => {
            for name in names {
                let id = vocabulary.len();
                vocabulary.insert(name, id.into());
            }
            let id = vocabulary.len();
            vocabulary.insert("<unk>".to_owned(), id.into());
            vocabulary.len()
        }
        Value::Array(vocabulary) => {
            vocabulary.extend(names.map(|name| json!([name, -20.0])));
            vocabulary.len()
        }
        other => panic!("unexpected vocabulary {other}"),
    };
    add_tokens(&mut json, count);
    let unk = json["model"]["unk_id"].as_u64().unwrap_or(count as u64 - 1);
    json["added_tokens"][2]["id"] = unk.into();
    json
}
