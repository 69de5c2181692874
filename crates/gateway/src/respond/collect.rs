//! A whole generation, for answers that are not streamed.

use scalellm_engine_link::proto::TokenLogprobs;

use crate::choice::{ChoiceEvent, Finish};
use crate::error::ApiResult;
use crate::generation::Generation;

/// One choice from its first token to its last.
#[derive(Debug, Default)]
pub struct Collected {
    pub prompt: usize,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Vec<TokenLogprobs>,
    pub finish: Option<Finish>,
}

/// Waits for the end of every choice.
///
/// # Errors
/// The first choice's error; the others are cancelled.
pub async fn collect(generation: &mut Generation) -> ApiResult<Vec<Collected>> {
    let mut choices: Vec<Collected> = (0..generation.choice_count())
        .map(|index| Collected {
            prompt: generation.prompt_of(index),
            ..Collected::default()
        })
        .collect();
    while let Some(events) = generation.next().await {
        for event in events? {
            add(&mut choices[event.choice], event);
        }
    }
    Ok(choices)
}

fn add(choice: &mut Collected, event: ChoiceEvent) {
    choice.text.push_str(&event.text);
    choice.token_ids.extend(event.token_ids);
    choice.logprobs.extend(event.logprobs);
    choice.prompt_logprobs.extend(event.prompt_logprobs);
    choice.finish = event.finish.or(choice.finish.take());
}
