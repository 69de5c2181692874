//! `POST /v1/completions`

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use crate::app::App;
use crate::error::ApiResult;
use crate::generation::{Generation, PreparedPrompt};
use crate::record::RequestRecord;
use crate::request::completions::CompletionRequest;
use crate::respond::completions::{CompletionStream, EchoedPrompt, whole};
use crate::respond::{Head, sse, warn};
use crate::stages::Stage;
use crate::{body, prompt};

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
    let bytes = record
        .timed_async(
            Stage::Body,
            body::read(&parts.headers, payload, &app.config),
        )
        .await?;
    let completion = record.timed(Stage::Parse, || CompletionRequest::parse(&bytes))?;
    drop(bytes);
    let CompletionRequest {
        model: model_name,
        prompts,
        add_special_tokens,
        echo,
        params,
        warning,
    } = completion;
    let model = Arc::clone(app.fleet.find(&model_name)?);
    record.update(|progress| progress.model = Some(Arc::clone(&model)));
    let permit = record
        .timed(Stage::Admission, || app.admission.enter())
        .inspect_err(|_| {
            app.metrics.rejected("max_in_flight");
        })?;
    let limits = model.require_limits()?;
    let ids = prompt::of_prompts(app, record, &model, prompts, add_special_tokens).await?;
    let prepared: Vec<PreparedPrompt> = ids
        .into_iter()
        .map(|ids| {
            Ok(PreparedPrompt {
                max_tokens: prompt::check("prompt", &ids, &params, limits)?,
                ids,
            })
        })
        .collect::<ApiResult<_>>()?;
    let generation = Generation::start(app, record, &model, &prepared, &params, permit)?;
    let stream = params.stream;
    let head = Head::new("cmpl", &record.id, model_name, model, Arc::new(params));
    let prompts = prepared
        .into_iter()
        .map(|prompt| EchoedPrompt::new(prompt, echo, &head))
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
