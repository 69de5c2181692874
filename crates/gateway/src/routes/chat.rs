//! `POST /v1/chat/completions`

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
use crate::request::chat::{ChatPrompt, ChatRequest};
use crate::respond::chat::{ChatStream, whole};
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
    let (endpoint, take) = (Endpoint::Chat, ChatRequest::parse);
    let (mut chat, turn) = match way(app, record, endpoint, &parts.headers, &body, take).await? {
        Way::Elsewhere(response) => return Ok(response),
        Way::Here(chat, turn) => (chat, turn),
    };
    drop(body);
    let Admitted {
        model,
        limits,
        permit,
    } = admit(app, record, chat.model.as_deref(), &chat.params, 1, turn).await?;
    safety::request::chat(app, record, &model.served, &mut chat).await?;
    let field = if matches!(chat.prompt, ChatPrompt::Ids(_)) {
        "prompt_token_ids"
    } else {
        "messages"
    };
    let ids = prompt::of_chat(app, record, &model, chat.prompt).await?;
    let max_tokens = prompt::check(field, &ids, &chat.params, limits)?;
    let ids = ids.into();
    let prompt = PreparedPrompt { ids, max_tokens };
    quota::reserve_tokens(app, record, std::slice::from_ref(&prompt), &chat.params).await?;
    let generation = Generation::start(
        app,
        record,
        &model,
        std::slice::from_ref(&prompt),
        &chat.params,
        permit,
    )?;
    let stream = chat.params.stream;
    let name = chat.model.unwrap_or_else(|| model.name.to_string());
    let head = Head::new("chatcmpl", &record.id, name, model, Arc::new(chat.params));
    let mut response = if stream {
        sse::respond(
            generation,
            ChatStream::new(head, prompt),
            Arc::clone(record),
        )
        .await?
    } else {
        whole(generation, &head, &prompt, record).await?
    };
    warn(&mut response, chat.warning);
    Ok(response)
}
