//! What fuzzers call (`fuzz/`), and tests over the fuzzers' seeds. Each takes any bytes and panics if something is wrong.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use scalellm_engine_link::listener::{EngineInfo, validate};
use scalellm_engine_link::proto;
use serde_json::{Map, Value, json};

use crate::foreign::{Answers, Asked, Events};
use crate::request::Params;
use crate::request::chat::ChatRequest;
use crate::request::completions::CompletionRequest;
use crate::submit;
use crate::text::{OutputText, TextModel};

/// A chat's body: it is refused with a reason, or an engine takes what it asks for.
///
/// # Panics
/// If the engine's listener refuses it.
pub fn chat(data: &[u8]) {
    match ChatRequest::parse(data) {
        Ok(request) => taken_by_an_engine(&request.params),
        Err(error) => assert!(!error.message.is_empty()),
    }
}

/// The same of a completion's body.
///
/// # Panics
/// If the engine's listener refuses it.
pub fn completions(data: &[u8]) {
    match CompletionRequest::parse(data) {
        Ok(request) => {
            assert!(!request.prompts.is_empty());
            taken_by_an_engine(&request.params);
        }
        Err(error) => assert!(!error.message.is_empty()),
    }
}

fn taken_by_an_engine(params: &Params) {
    // What the model decides is checked with the model: its vocabulary and its length.
    let info = EngineInfo {
        vocab_size: u32::MAX,
        max_model_len: u32::MAX,
        ..EngineInfo::default()
    };
    let mut submit = proto::Submit {
        request: Some(proto::RequestRef { id: 1, attempt: 0 }),
        prompt_tokens: 1,
        max_tokens: params.max_tokens.unwrap_or(u32::MAX - 1).max(1),
        deadline_ms: params.deadline_ms,
        ..submit::of_params(params, 7)
    };
    submit.stop_token_ids.retain(|id| *id < info.vocab_size);
    if let Some(sampling) = &mut submit.sampling {
        sampling
            .logit_bias
            .retain(|bias| bias.token_id < info.vocab_size);
    }
    assert_eq!(validate(&submit, &info), Ok(()));
}

/// A body that goes on to a server elsewhere: only what has to change does.
///
/// # Panics
/// If anything else of it changes.
pub fn upstream_request(data: &[u8]) {
    const MODEL: &str = "another \"model\"";
    let Ok(asked) = Asked::read(data) else {
        return;
    };
    let sent = asked.parts(&Bytes::copy_from_slice(data), MODEL).concat();
    // What the gateway does not read it does not check: a number that is too large, a depth.
    let Ok(Value::Object(mut before)) = serde_json::from_slice(data) else {
        return;
    };
    let Value::Object(mut after) = serde_json::from_slice(&sent).expect("JSON stays JSON") else {
        panic!("an object became another thing");
    };
    assert_eq!(after.remove("model"), Some(MODEL.into()));
    assert_eq!(after.get("deadline_ms"), None);
    before.remove("model");
    before.remove("deadline_ms");
    if asked.stream {
        let (had, has) = (
            before.remove("stream_options"),
            after.remove("stream_options"),
        );
        match has {
            Some(Value::Object(options)) => assert_eq!(options["include_usage"], true),
            other => assert_eq!(had, other),
        }
    }
    assert_eq!(before, after);
}

/// A foreign engine's stream: however its bytes are cut, the same comes out. The first bytes say where they are cut.
///
/// # Panics
/// If a cut changes anything.
pub fn upstream_events(data: &[u8]) {
    let Some((&[flags, first, second], stream)) = data.split_first_chunk::<3>() else {
        return;
    };
    let events = || {
        let model = (flags & 1 != 0).then_some("mine");
        Events::new(Answers::new(model), flags & 2 != 0)
    };
    let stream = Bytes::copy_from_slice(stream);
    let (mut whole, mut cut) = (events(), events());
    let Ok(expected) = whole.push(stream.clone()) else {
        return;
    };
    let mut out = Vec::new();
    let mut rest = stream;
    for length in [usize::from(first), usize::from(second)] {
        let part = rest.split_to(length.min(rest.len()));
        out.extend_from_slice(&cut.push(part).expect("the whole was no longer"));
    }
    out.extend_from_slice(&cut.push(rest).expect("the whole was no longer"));
    assert_eq!(out, expected);
    assert_eq!(
        (cut.count, cut.usage, cut.done, cut.failed),
        (whole.count, whole.usage, whole.done, whole.failed)
    );
}

/// Ids of a model's output, a few at a time, with a stop string: the text is that of all ids up to it.
///
/// # Panics
/// If the text is another one, or tokens are settled twice or never.
pub fn detokeniser(data: &[u8]) {
    let Some((&[flags, prompt, step], ids)) = data.split_first_chunk::<3>() else {
        return;
    };
    let model = &models()[usize::from(flags) % models().len()];
    let stop = match flags / 4 % 4 {
        0 => Vec::new(),
        1 => vec!["a".to_owned()],
        2 => vec!["ab".to_owned(), " the".to_owned()],
        _ => vec!["\u{fffd}".to_owned(), "bab".to_owned()],
    };
    let (skip, include) = (flags & 64 != 0, flags & 128 != 0);
    // Of the bytes that text has least of, other tokens' ids are made, and ids of none.
    let id = |byte: &u8| u32::from(*byte) + if *byte < 12 { 256 } else { 0 };
    let ids: Vec<u32> = ids.iter().map(id).collect();
    let (prompt, ids) = ids.split_at(usize::from(prompt).min(ids.len()));
    let mut output = OutputText::new(model, prompt, stop.clone(), skip, include);
    let (mut text, mut settled) = (String::new(), 0);
    for part in ids.chunks(usize::from(step).max(1)) {
        let piece = output.push(part);
        assert_eq!(piece.tokens.start, settled);
        settled = piece.tokens.end;
        text += &piece.text;
    }
    let met = output.is_stopped();
    let last = output.finish();
    text += &last.text;
    if !met && last.stopped.is_none() {
        assert_eq!(last.tokens.end, ids.len());
    }
    if prompt.is_empty() {
        let all = model
            .library()
            .decode(ids, skip)
            .expect("any ids have a text");
        // The first stop string to be complete, and of several the longest.
        let found = stop
            .iter()
            .filter_map(|s| all.find(s).map(|at| (at + s.len(), at)));
        let end = found.min().map(|(end, at)| if include { end } else { at });
        assert_eq!(text, all[..end.unwrap_or(all.len())]);
    }
}

/// Text to ids, in pieces and from the cache: always what the tokenizer says of the whole, in this order or another.
///
/// # Panics
/// If any ids differ.
pub fn tokeniser(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let model = demo();
    let whole = model
        .library()
        .encode_fast(&*text, false)
        .expect("any text has ids");
    let whole = whole.get_ids();
    for _ in 0..2 {
        let ids = model.encode(&text, false).expect("any text has ids");
        assert_eq!(ids, whole);
    }
    assert_eq!(model.decode(whole, false), text);
}

/// The model that the Python package has with it.
fn demo() -> &'static TextModel {
    static MODEL: OnceLock<TextModel> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python/scalellm/demo/model");
        TextModel::load(&folder).expect("the demo model")
    })
}

/// One whose tokens are bytes, and one that falls back to bytes: ids below 256 are bytes, what follows are words and
/// added tokens.
fn models() -> &'static [Arc<TextModel>; 2] {
    static MODELS: OnceLock<[Arc<TextModel>; 2]> = OnceLock::new();
    MODELS.get_or_init(|| [byte_level(), byte_fallback()].map(|json| Arc::new(load(&json))))
}

fn load(tokenizer: &Value) -> TextModel {
    let folder = std::env::temp_dir().join(format!("scalellm-fuzz-{:016x}", rand::random::<u64>()));
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("a file");
    let model = TextModel::load(&folder).expect("a model");
    std::fs::remove_dir_all(&folder).expect("a folder");
    model
}

const ADDED: [(&str, bool); 4] = [
    ("<s>", true),
    ("</s>", true),
    ("<tool>", false),
    ("n\u{e9}", false),
];

fn tokenizer(vocabulary: Map<String, Value>, model: Value, decoder: Value) -> Value {
    let first = vocabulary.len();
    let added = |(index, (content, special)): (usize, &(&str, bool))| {
        json!({"id": first + index, "content": content, "special": special, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    };
    let mut model = model;
    model["type"] = "BPE".into();
    model["vocab"] = vocabulary.into();
    model["merges"] = json!([]);
    json!({"version": "1.0", "added_tokens": ADDED.iter().enumerate().map(added).collect::<Vec<_>>(),
           "model": model, "decoder": decoder})
}

fn byte_level() -> Value {
    // GPT-2's printable stand-in for each byte.
    let mut spare = 256_u32;
    let name = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => {
            spare += 1;
            char::from_u32(spare - 1).expect("a character")
        }
    };
    let names = (0..=255).map(name).map(String::from);
    let vocabulary = names.chain(["the".to_owned()]).zip((0..).map(Value::from));
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    tokenizer(vocabulary.collect(), json!({}), decoder)
}

fn byte_fallback() -> Value {
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let words = ["\u{2581}the", "a", "\u{2581}", "\u{65e5}"].map(str::to_owned);
    let vocabulary = bytes.chain(words).zip((0..).map(Value::from));
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    tokenizer(
        vocabulary.collect(),
        json!({"byte_fallback": true}),
        decoder,
    )
}

#[cfg(test)]
mod tests {
    use scalellm_engine_link::fuzzing::pass_seeds;

    use super::*;

    #[test]
    fn the_seeds_of_every_target_pass() {
        pass_seeds(&[
            ("chat", chat),
            ("completions", completions),
            ("upstream_request", upstream_request),
            ("upstream_events", upstream_events),
            ("detokeniser", detokeniser),
            ("tokeniser", tokeniser),
        ]);
    }
}
