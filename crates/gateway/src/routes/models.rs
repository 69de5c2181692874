//! `GET /v1/models`, `/v1/models/{*id}`

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::app::App;
use crate::fleet::Model;
use crate::respond;

pub async fn list(State(app): State<Arc<App>>) -> Response {
    let names = app.fleet.models.iter().flat_map(|model| {
        std::iter::once(&*model.name)
            .chain(model.aliases.iter().map(String::as_str))
            .map(|name| card(name, model))
    });
    respond::json(&json!({"object": "list", "data": names.collect::<Vec<_>>()}))
}

pub async fn one(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    match app.fleet.find(&id) {
        Ok(model) => respond::json(&card(&id, model)),
        Err(error) => error.into_response(),
    }
}

fn card(name: &str, model: &Model) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "scalellm",
        "root": &*model.name,
        "parent": null,
        "max_model_len": model.limits().map(|limits| limits.max_model_len),
    })
}
