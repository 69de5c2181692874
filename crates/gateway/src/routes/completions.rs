//! `POST /v1/completions`

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use crate::admission::{Admitted, admit};
use crate::app::App;
use crate::error::ApiResult;
use crate::foreign::{Endpoint, Way, way};
use crate::generation::{Generation, PreparedPrompt};
use crate::record::RequestRecord;
use crate::request::completions::CompletionRequest;
use crate::respond::completions::{CompletionStream, EchoedPrompt, whole};
use crate::respond::{Head, sse, warn};
use crate::{body, prompt, quota, safety};

pub async fn create(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    answer(&app, &record, request)
        .await
        .unwrap_or_else(|error| error.into_response())
}

async fn answer(
    app: &Arc<App>,
    record: &Arc<RequestRecord>,
    request: Request,
) -> ApiResult<Response> {
    let (parts, payload) = request.into_parts();
    let body = body::whole(app, record, &parts.headers, payload).await?;
    let (endpoint, take) = (Endpoint::Completions, CompletionRequest::parse);
    let (request, turn) = match way(app, record, endpoint, &parts.headers, &body, take).await? {
        Way::Elsewhere(response) => return Ok(response),
        Way::Here(request, turn) => (request, turn),
    };
    drop(body);
    let CompletionRequest {
        model: model_name,
        mut prompts,
        prompt_field,
        add_special_tokens,
        echo,
        mut params,
        mut warning,
    } = request;
    let Admitted {
        model,
        limits,
        permit,
    } = admit(
        app,
        record,
        model_name.as_deref(),
        &params,
        prompts.len(),
        turn,
    )
    .await?;
    let texts = (prompt_field, prompts.as_mut_slice());
    safety::request::completions(app, record, &model.served, texts, &mut params, &mut warning)
        .await?;
    let ids = prompt::of_prompts(app, record, &model, prompts, add_special_tokens).await?;
    let (ids, echoed): (Vec<_>, Vec<_>) = if echo {
        prompt::texts_of(app, record, &model, ids, params.skip_special_tokens)
            .await?
            .into_iter()
            .map(|(ids, text)| (ids, Some(text)))
            .unzip()
    } else {
        ids.into_iter().map(|ids| (ids, None)).unzip()
    };
    let prepared: Vec<PreparedPrompt> = ids
        .into_iter()
        .map(|ids| {
            Ok(PreparedPrompt {
                max_tokens: prompt::check(prompt_field, &ids, &params, limits)?,
                ids: ids.into(),
            })
        })
        .collect::<ApiResult<_>>()?;
    quota::reserve_tokens(app, record, &prepared, &params).await?;
    let generation = Generation::start(app, record, &model, &prepared, &params, permit)?;
    let stream = params.stream;
    let name = model_name.unwrap_or_else(|| model.name.to_string());
    let head = Head::new("cmpl", &record.id, name, model, Arc::new(params));
    let prompts = prepared
        .into_iter()
        .zip(echoed)
        .map(|(prompt, text)| EchoedPrompt {
            ids: prompt.ids,
            text,
        })
        .collect();
    let mut response = if stream {
        sse::respond(
            generation,
            CompletionStream::new(head, prompts),
            Arc::clone(record),
        )
        .await?
    } else {
        whole(generation, &head, &prompts, record).await?
    };
    warn(&mut response, warning);
    Ok(response)
}
