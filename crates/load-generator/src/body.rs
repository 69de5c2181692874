use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::plan::{Endpoint, Plan, PromptContent};

/// Makes request bodies: the fields that all requests of a plan share, and what each says.
pub(crate) struct Bodies {
    model: String,
    endpoint: Endpoint,
    max_tokens: u32,
    shared: Map<String, Value>,
    extra: Map<String, Value>,
}

impl Bodies {
    pub fn new(plan: &Plan) -> Bodies {
        let mut shared = Map::new();
        shared.insert("temperature".into(), json!(plan.temperature));
        shared.insert("stream".into(), json!(plan.stream));
        if plan.stream && plan.include_usage {
            shared.insert("stream_options".into(), json!({"include_usage": true}));
        }
        if plan.ignore_eos {
            shared.insert("ignore_eos".into(), json!(true));
        }
        if plan.return_token_ids {
            shared.insert("return_token_ids".into(), json!(true));
        }
        Bodies {
            model: plan.model.clone(),
            endpoint: plan.endpoint,
            max_tokens: plan.max_tokens,
            shared,
            extra: plan.extra_body.clone(),
        }
    }

    /// `max_tokens`: instead of the plan's.
    pub fn make(&self, content: &PromptContent, max_tokens: Option<u32>) -> Bytes {
        let mut body = Map::new();
        body.insert("model".into(), json!(self.model));
        let (name, said) = match (self.endpoint, content) {
            (_, PromptContent::Messages(messages)) => ("messages", json!(messages)),
            (Endpoint::Chat, PromptContent::Text(text)) => {
                ("messages", json!([{"role": "user", "content": text}]))
            }
            (_, PromptContent::Text(text)) => ("prompt", json!(text)),
            (_, PromptContent::TokenIds(ids)) => ("prompt", json!(ids)),
        };
        body.insert(name.into(), said);
        let max_tokens = max_tokens.unwrap_or(self.max_tokens);
        body.insert("max_tokens".into(), json!(max_tokens));
        for (name, value) in self.shared.iter().chain(&self.extra) {
            body.insert(name.clone(), value.clone());
        }
        Bytes::from(Value::Object(body).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bodies(fields: Value) -> Vec<Value> {
        let mut plan = json!({
            "url": "http://h", "endpoint": "completions", "model": "m", "max_tokens": 4,
            "prompts": [{"text": "a"}, {"token_ids": [1, 2], "max_tokens": 9}],
            "levels": [{"concurrency": 1, "requests": 1}],
        });
        for (name, value) in fields.as_object().expect("fields") {
            plan[name] = value.clone();
        }
        let plan = Plan::from_json(&plan.to_string()).expect("plan");
        let bodies = Bodies::new(&plan);
        plan.prompts
            .iter()
            .map(|prompt| bodies.make(&prompt.content, prompt.max_tokens))
            .map(|body| serde_json::from_slice(&body).expect("JSON"))
            .collect()
    }

    #[test]
    fn prompts_go_out_as_text_or_as_ids_each_with_its_length() {
        let bodies = bodies(json!({}));
        assert_eq!(bodies[0]["prompt"], "a");
        assert_eq!(bodies[1]["prompt"], json!([1, 2]));
        assert_eq!(bodies[0]["stream_options"], json!({"include_usage": true}));
        assert_eq!(
            (&bodies[0]["max_tokens"], &bodies[1]["max_tokens"]),
            (&json!(4), &json!(9))
        );
        assert!(
            bodies[0].get("ignore_eos").is_none(),
            "only sent when asked for"
        );
    }

    #[test]
    fn chat_wraps_the_text_in_a_user_message_and_extra_fields_win() {
        let messages =
            json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]);
        let bodies = bodies(json!({
            "endpoint": "chat", "prompts": [{"text": "a"}, {"messages": messages}], "stream": false,
            "ignore_eos": true, "extra_body": {"temperature": 0.5, "top_k": 3},
        }));
        assert_eq!(bodies[1]["messages"], messages);
        let body = &bodies[0];
        assert_eq!(body["messages"], json!([{"role": "user", "content": "a"}]));
        assert_eq!(body["temperature"], 0.5);
        assert_eq!(body["top_k"], 3);
        assert_eq!(body["ignore_eos"], true);
        assert!(body.get("stream_options").is_none());
    }
}
