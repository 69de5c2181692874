//! What the level's clients say: prompts in turn, each one request or the beginning of a
//! conversation whose every further request carries all that was said before.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::body::Bodies;
use crate::plan::{Endpoint, Plan, Prompt, PromptContent, Turn};

/// All prompts of a run; first requests are serialised once, so that a send costs no JSON work.
pub(crate) struct Conversations {
    endpoint: Endpoint,
    bodies: Bodies,
    first_bodies: Vec<Bytes>,
    /// The prompts that have turns, by the index of `first_bodies`; None for the others.
    scripts: Vec<Option<Prompt>>,
    taken: AtomicUsize,
}

/// One prompt on its way; `body` is the request that is to be sent now.
pub(crate) struct Conversation {
    pub prompt: u32,
    pub turn: u32,
    pub body: Bytes,
    /// What was said so far and what is left to say; None where there is one request only.
    rest: Option<Rest>,
}

struct Rest {
    history: PromptContent,
    turns: std::vec::IntoIter<Turn>,
}

impl Conversations {
    pub fn new(plan: &Plan) -> Conversations {
        let bodies = Bodies::new(plan);
        let prompts = plan.prompts.iter();
        Conversations {
            endpoint: plan.endpoint,
            first_bodies: prompts
                .clone()
                .map(|prompt| bodies.make(&prompt.content, prompt.max_tokens))
                .collect(),
            scripts: prompts
                .map(|prompt| (!prompt.turns.is_empty()).then(|| prompt.clone()))
                .collect(),
            bodies,
            taken: AtomicUsize::new(0),
        }
    }

    /// How many were begun so far, and how many different ones there are.
    pub fn taken_of(&self) -> (usize, usize) {
        (self.taken.load(Ordering::Relaxed), self.first_bodies.len())
    }

    pub fn begin_next(&self) -> Conversation {
        let index = self.taken.fetch_add(1, Ordering::Relaxed) % self.first_bodies.len();
        Conversation {
            prompt: u32::try_from(index).unwrap_or(u32::MAX),
            turn: 0,
            body: self.first_bodies[index].clone(),
            rest: self.scripts[index].clone().map(|script| Rest {
                history: script.content,
                turns: script.turns.into_iter(),
            }),
        }
    }

    /// Readies the next request, which follows `answer`; how long its user thinks before. None
    /// when all was said.
    pub fn go_on(&self, conversation: &mut Conversation, answer: &str) -> Option<Duration> {
        let rest = conversation.rest.as_mut()?;
        let turn = rest.turns.next()?;
        rest.history.add(self.endpoint, answer, &turn.text);
        conversation.turn += 1;
        conversation.body = self.bodies.make(&rest.history, turn.max_tokens);
        Some(Duration::from_secs_f64(turn.after_s))
    }
}

impl Conversation {
    /// Whether a request follows this one, and needs its answer.
    pub fn goes_on(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| rest.turns.len() > 0)
    }
}

impl PromptContent {
    fn add(&mut self, endpoint: Endpoint, answer: &str, user: &str) {
        if let (Endpoint::Chat, PromptContent::Text(text)) = (endpoint, &*self) {
            *self = PromptContent::Messages(vec![message("user", text)]);
        }
        match self {
            PromptContent::Messages(messages) => {
                messages.extend([message("assistant", answer), message("user", user)]);
            }
            PromptContent::Text(text) => {
                text.push_str(answer);
                text.push_str(user);
            }
            // The plan refuses conversations that begin with ids.
            PromptContent::TokenIds(_) => {}
        }
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversations(endpoint: &str, prompts: Value) -> Conversations {
        let plan = json!({
            "url": "http://h", "endpoint": endpoint, "model": "m", "max_tokens": 4,
            "prompts": prompts, "levels": [{"concurrency": 1, "requests": 1}],
        });
        Conversations::new(&Plan::from_json(&plan.to_string()).expect("plan"))
    }

    fn body(conversation: &Conversation) -> Value {
        serde_json::from_slice(&conversation.body).expect("JSON")
    }

    #[test]
    fn prompts_come_in_turn_and_again() {
        let all = conversations("chat", json!([{"text": "a"}, {"text": "b"}]));
        let mut one = all.begin_next();
        assert!(!one.goes_on() && all.go_on(&mut one, "answer").is_none());
        assert_eq!(all.begin_next().prompt, 1);
        assert_eq!(all.begin_next().prompt, 0);
        assert_eq!(all.taken_of(), (3, 2));
    }

    #[test]
    fn a_chat_carries_answers_and_turns_after_its_system_prompt() {
        let system = message("system", "s");
        let all = conversations(
            "chat",
            json!([{"messages": [system, message("user", "a")], "turns": [
                {"text": "b", "max_tokens": 9, "after_s": 0.5}, {"text": "c"}]}]),
        );
        let mut conversation = all.begin_next();
        assert!(conversation.goes_on());
        let thinking = all.go_on(&mut conversation, "A");
        assert_eq!(thinking, Some(Duration::from_millis(500)));
        let said = [
            system,
            message("user", "a"),
            message("assistant", "A"),
            message("user", "b"),
        ];
        assert_eq!(body(&conversation)["messages"], json!(said));
        assert_eq!(body(&conversation)["max_tokens"], 9);
        assert!(all.go_on(&mut conversation, "B").is_some());
        assert_eq!((conversation.turn, conversation.goes_on()), (2, false));
        assert_eq!(body(&conversation)["max_tokens"], 4);
        assert_eq!(body(&conversation)["messages"][5], message("user", "c"));
    }

    #[test]
    fn completions_carry_one_growing_text() {
        let all = conversations(
            "completions",
            json!([{"text": "a", "turns": [{"text": " b"}]}]),
        );
        let mut conversation = all.begin_next();
        all.go_on(&mut conversation, " A");
        assert_eq!(body(&conversation)["prompt"], "a A b");
    }
}
