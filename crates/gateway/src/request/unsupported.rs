//! Fields that are known and cannot be honoured: accepted only with the value that asks for nothing.

use serde_json::Value;

use super::fields::Fields;
use crate::error::ApiResult;

/// What "nothing asked for" looks like, apart from null.
#[derive(Clone, Copy)]
enum Default {
    Null,
    False,
    Empty,
    Is(&'static str),
    One,
}

impl Default {
    fn words(self) -> String {
        match self {
            Default::Null => "null".to_owned(),
            Default::False => "false or null".to_owned(),
            Default::Empty => "an empty list or null".to_owned(),
            Default::Is(text) => format!("{text:?} or null"),
            Default::One => "1 or null".to_owned(),
        }
    }

    fn matches(self, value: &Value) -> bool {
        match self {
            Default::Null => false,
            Default::False => value == false,
            Default::Empty => value.as_array().is_some_and(Vec::is_empty),
            Default::Is(text) => value == text,
            Default::One => value.as_f64() == Some(1.0),
        }
    }
}

const BOTH: [(&str, Default); 25] = [
    ("best_of", Default::One),
    ("use_beam_search", Default::False),
    ("length_penalty", Default::One),
    ("early_stopping", Default::False),
    ("guided_json", Default::Null),
    ("guided_regex", Default::Null),
    ("guided_choice", Default::Null),
    ("guided_grammar", Default::Null),
    ("guided_decoding_backend", Default::Null),
    ("guided_whitespace_pattern", Default::Null),
    ("structured_outputs", Default::Null),
    ("structural_tag", Default::Null),
    ("grammar", Default::Null),
    ("json_schema", Default::Null),
    ("regex", Default::Null),
    ("allowed_token_ids", Default::Empty),
    ("bad_words", Default::Empty),
    ("logits_processors", Default::Empty),
    ("truncate_prompt_tokens", Default::Null),
    ("prompt_embeds", Default::Null),
    ("kv_transfer_params", Default::Null),
    ("vllm_xargs", Default::Null),
    ("mm_processor_kwargs", Default::Null),
    ("thinking_token_budget", Default::Null),
    ("repetition_detection", Default::Null),
];

const CHAT: [(&str, Default); 10] = [
    ("audio", Default::Null),
    ("prediction", Default::Null),
    ("web_search_options", Default::Null),
    ("functions", Default::Empty),
    ("function_call", Default::Is("none")),
    ("echo", Default::False),
    ("media_io_kwargs", Default::Null),
    ("documents", Default::Empty),
    ("verbosity", Default::Is("medium")),
    ("suffix", Default::Null),
];

/// Refuses what neither endpoint can do.
pub fn refuse_common(fields: &mut Fields) -> ApiResult<()> {
    refuse_all(fields, &BOTH)?;
    let is_text = |value: &Value| value.get("type").is_some_and(|kind| kind == "text");
    fields.refuse("response_format", "{\"type\": \"text\"} or null", is_text)?;
    // The whole text is decoded in one way: this switch of slow tokenizers has nothing to act on.
    fields.refuse("spaces_between_special_tokens", "true or null", |value| {
        value == true
    })
}

/// Refuses what chat completions cannot do.
pub fn refuse_chat(fields: &mut Fields) -> ApiResult<()> {
    refuse_all(fields, &CHAT)?;
    fields.refuse("modalities", "[\"text\"] or null", |value| {
        value
            .as_array()
            .is_some_and(|items| items.iter().all(|item| item == "text"))
    })?;
    let choice = fields.take("tool_choice");
    let switched_off = choice.as_ref().is_some_and(|choice| choice == "none");
    fields.refuse(
        "tools",
        "an empty list, null, or any tools with tool_choice \"none\"",
        |value| switched_off || value.as_array().is_some_and(Vec::is_empty),
    )?;
    match choice {
        Some(choice) if choice != "none" && choice != "auto" => {
            let message = format!(
                "tool_choice: not supported by this server; got {}, allowed is \"none\", \"auto\" without tools, or null",
                super::fields::got(&choice)
            );
            Err(crate::error::ApiError::unsupported("tool_choice", message))
        }
        _ => Ok(()),
    }
}

/// Refuses what completions cannot do.
pub fn refuse_completions(fields: &mut Fields) -> ApiResult<()> {
    fields.refuse("suffix", "an empty string or null", |value| value == "")
}

fn refuse_all(fields: &mut Fields, table: &[(&str, Default)]) -> ApiResult<()> {
    table.iter().try_for_each(|(name, default)| {
        fields.refuse(name, &default.words(), |value| default.matches(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(text: &str) -> ApiResult<()> {
        let mut fields = Fields::parse(text.as_bytes())?;
        refuse_common(&mut fields)?;
        refuse_chat(&mut fields)
    }

    #[test]
    fn values_that_ask_for_nothing_pass() {
        for text in [
            r#"{"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}"#,
            r#"{"tools": null, "tool_choice": null, "best_of": 1, "use_beam_search": false}"#,
            r#"{"tools": [{"type": "function"}], "tool_choice": "none", "modalities": ["text"]}"#,
            r#"{"functions": [], "function_call": "none", "guided_json": null, "logits_processors": []}"#,
        ] {
            chat(text).unwrap();
        }
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for (name, value) in [
            ("tools", r#"[{"type": "function"}]"#),
            ("tool_choice", r#""required""#),
            ("response_format", r#"{"type": "json_object"}"#),
            ("best_of", "2"),
            ("use_beam_search", "true"),
            ("guided_json", "{}"),
            ("structured_outputs", "{}"),
            ("audio", "{}"),
            ("modalities", r#"["text", "audio"]"#),
            ("functions", "[{}]"),
            ("function_call", r#""auto""#),
        ] {
            let error = chat(&format!("{{\"{name}\": {value}}}")).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name));
            assert_eq!(error.code, Some("unsupported_field"));
            assert!(
                error.message.starts_with(&format!("{name}: not supported")),
                "{}",
                error.message
            );
        }
    }
}
