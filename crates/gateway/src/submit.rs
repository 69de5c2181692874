//! What an engine is told of one choice.

use scalellm_engine_link::proto;

use crate::app::App;
use crate::auth;
use crate::generation::PreparedPrompt;
use crate::record::RequestRecord;
use crate::request::Params;

/// The Submit of choice `choice` of a prompt, without the prompt's ids, and without the time that is left: an attempt
/// fills those in each time it sends it.
#[must_use]
pub fn submit(
    record: &RequestRecord,
    app: &App,
    prompt: &PreparedPrompt,
    params: &Params,
    seed: u64,
    choice: u32,
) -> proto::Submit {
    proto::Submit {
        trace_id: record.id.to_string(),
        prompt_tokens: u32::try_from(prompt.ids.len()).unwrap_or(u32::MAX),
        // A step is needed to see the prompt's logprobs, even if no token is wanted.
        max_tokens: prompt.max_tokens.max(1),
        priority: auth::engine_priority(record, params.priority),
        arrival_us: app.clock.unix_us(record.started),
        choice,
        ..of_params(params, seed)
    }
}

/// What of a Submit the request's own fields say.
#[must_use]
pub fn of_params(params: &Params, seed: u64) -> proto::Submit {
    let bias = |(token_id, bias): &(u32, f32)| proto::LogitBias {
        token_id: *token_id,
        bias: *bias,
    };
    proto::Submit {
        sampling: Some(proto::Sampling {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.iter().map(bias).collect(),
            seed,
            logprobs: params.logprobs,
        }),
        min_tokens: params.min_tokens,
        stop_token_ids: params.stop_token_ids.clone(),
        ignore_eos: params.ignore_eos,
        priority: params.priority,
        cache_salt: params.cache_salt.clone(),
        prompt_logprobs: params.prompt_logprobs,
        ..proto::Submit::default()
    }
}
