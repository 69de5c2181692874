//! A conversation, checked and brought to the form that chat templates expect.

use serde_json::{Map, Value};

use super::fields::{missing, wrong};
use crate::error::{ApiError, ApiResult};

const ROLES: [&str; 6] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
];
const MAX_MESSAGES: usize = 16_384;

/// Checks `messages`; content parts become one string, `developer` becomes `system`, whose name templates know.
pub fn check(messages: Value) -> ApiResult<Value> {
    let Value::Array(messages) = messages else {
        return Err(wrong("messages", &messages, "a list of messages"));
    };
    if messages.is_empty() {
        return Err(missing("messages", "at least one message"));
    }
    if messages.len() > MAX_MESSAGES {
        let message = format!(
            "messages: got {}, allowed are at most {MAX_MESSAGES}",
            messages.len()
        );
        return Err(ApiError::field("messages", message));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| one(index, message).map(Value::Object))
        .collect()
}

fn one(index: usize, message: Value) -> ApiResult<Map<String, Value>> {
    let place = format!("messages[{index}]");
    let Value::Object(mut message) = message else {
        return Err(wrong(&place, &message, "an object with role and content"));
    };
    let role_field = format!("{place}.role");
    let role = match message.get("role") {
        None | Some(Value::Null) => return Err(missing(&role_field, &format!("one of {ROLES:?}"))),
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(other) => return Err(wrong(&role_field, other, &format!("one of {ROLES:?}"))),
    };
    if role == "developer" {
        message.insert("role".to_owned(), "system".into());
    }
    if let Some(name) = message
        .get("name")
        .filter(|name| !name.is_null() && !name.is_string())
    {
        return Err(wrong(&format!("{place}.name"), name, "a string"));
    }
    let content_field = format!("{place}.content");
    let content = match message.remove("content") {
        None | Some(Value::Null) if role == "assistant" => Value::Null,
        None | Some(Value::Null) => {
            return Err(missing(&content_field, "a string or a list of text parts"));
        }
        Some(Value::Array(parts)) => join_parts(&content_field, parts)?.into(),
        Some(text @ Value::String(_)) => text,
        Some(other) => {
            return Err(wrong(
                &content_field,
                &other,
                "a string or a list of text parts",
            ));
        }
    };
    if content.is_null() && !message.contains_key("tool_calls") {
        // Templates concatenate content: an absent one is the empty string.
        message.insert("content".to_owned(), "".into());
    } else {
        message.insert("content".to_owned(), content);
    }
    Ok(message)
}

fn join_parts(field: &str, parts: Vec<Value>) -> ApiResult<String> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let place = format!("{field}[{index}]");
        match part {
            Value::String(text) => texts.push(text),
            Value::Object(mut part) => {
                let kind = part
                    .get("type")
                    .and_then(Value::as_str)
                    .unwrap_or("")
                    .to_owned();
                if !matches!(
                    kind.as_str(),
                    "text" | "input_text" | "output_text" | "refusal"
                ) {
                    let message = format!(
                        "{place}.type: not supported by this server; got {}, allowed is \"text\"",
                        crate::error::shown(&kind)
                    );
                    return Err(ApiError::unsupported(&format!("{place}.type"), message));
                }
                let key = if kind == "refusal" { "refusal" } else { "text" };
                match part.swap_remove(key) {
                    Some(Value::String(text)) => texts.push(text),
                    None => return Err(missing(&format!("{place}.{key}"), "a string")),
                    Some(other) => {
                        return Err(wrong(&format!("{place}.{key}"), &other, "a string"));
                    }
                }
            }
            other => return Err(wrong(&place, &other, "an object with type and text")),
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parts_and_roles_take_the_templates_form() {
        let given = json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
            {"role": "assistant", "content": null},
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
        ]);
        let checked = check(given).unwrap();
        assert_eq!(checked[0]["role"], "system");
        assert_eq!(checked[1]["content"], "a\nb");
        assert_eq!(checked[2]["content"], "");
        assert_eq!(checked[3]["content"], Value::Null);
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        for (given, field) in [
            (json!("hi"), "messages"),
            (json!([]), "messages"),
            (json!(["hi"]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (
                json!([{"role": "king", "content": "x"}]),
                "messages[0].role",
            ),
            (json!([{"role": 3, "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (
                json!([{"role": "user", "content": 3}]),
                "messages[0].content",
            ),
            (
                json!([{"role": "user", "content": "x", "name": 1}]),
                "messages[0].name",
            ),
            (
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
                "messages[0].content[0].type",
            ),
            (
                json!([{"role": "user", "content": [{"type": "text"}]}]),
                "messages[0].content[0].text",
            ),
            (
                json!([{"role": "user", "content": [7]}]),
                "messages[0].content[0]",
            ),
        ] {
            let error = check(given.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(field), "{given}");
        }
    }
}
