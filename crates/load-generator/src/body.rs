use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::plan::{Endpoint, Plan, Prompt, PromptContent};

/// Serialises every prompt's request body once, so that a send costs no JSON work.
pub(crate) fn request_bodies(plan: &Plan) -> Vec<Bytes> {
    plan.prompts
        .iter()
        .map(|prompt| Bytes::from(request_body(plan, prompt).to_string()))
        .collect()
}

fn request_body(plan: &Plan, prompt: &Prompt) -> Value {
    let mut body = Map::new();
    body.insert("model".into(), json!(plan.model));
    match (plan.endpoint, &prompt.content) {
        (Endpoint::Chat, PromptContent::Text(text)) => {
            body.insert(
                "messages".into(),
                json!([{"role": "user", "content": text}]),
            );
        }
        (_, PromptContent::Text(text)) => {
            body.insert("prompt".into(), json!(text));
        }
        (_, PromptContent::TokenIds(ids)) => {
            body.insert("prompt".into(), json!(ids));
        }
    }
    body.insert("max_tokens".into(), json!(plan.max_tokens));
    body.insert("temperature".into(), json!(plan.temperature));
    body.insert("stream".into(), json!(plan.stream));
    if plan.stream && plan.include_usage {
        body.insert("stream_options".into(), json!({"include_usage": true}));
    }
    if plan.ignore_eos {
        body.insert("ignore_eos".into(), json!(true));
    }
    if plan.return_token_ids {
        body.insert("return_token_ids".into(), json!(true));
    }
    for (name, value) in &plan.extra_body {
        body.insert(name.clone(), value.clone());
    }
    Value::Object(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bodies(fields: Value) -> Vec<Value> {
        let mut plan = json!({
            "url": "http://h", "endpoint": "completions", "model": "m", "max_tokens": 4,
            "prompts": [{"text": "a"}, {"token_ids": [1, 2]}],
            "levels": [{"concurrency": 1, "requests": 1}],
        });
        for (name, value) in fields.as_object().expect("fields") {
            plan[name] = value.clone();
        }
        let plan = Plan::from_json(&plan.to_string()).expect("plan");
        request_bodies(&plan)
            .iter()
            .map(|body| serde_json::from_slice(body).expect("JSON"))
            .collect()
    }

    #[test]
    fn prompts_go_out_as_text_or_as_ids() {
        let bodies = bodies(json!({}));
        assert_eq!(bodies[0]["prompt"], "a");
        assert_eq!(bodies[1]["prompt"], json!([1, 2]));
        assert_eq!(bodies[0]["stream_options"], json!({"include_usage": true}));
        assert!(
            bodies[0].get("ignore_eos").is_none(),
            "only sent when asked for"
        );
    }

    #[test]
    fn chat_wraps_the_text_in_a_user_message_and_extra_fields_win() {
        let body = &bodies(json!({
            "endpoint": "chat", "prompts": [{"text": "a"}], "stream": false,
            "ignore_eos": true, "extra_body": {"temperature": 0.5, "top_k": 3},
        }))[0];
        assert_eq!(body["messages"], json!([{"role": "user", "content": "a"}]));
        assert_eq!(body["temperature"], 0.5);
        assert_eq!(body["top_k"], 3);
        assert_eq!(body["ignore_eos"], true);
        assert!(body.get("stream_options").is_none());
    }
}
