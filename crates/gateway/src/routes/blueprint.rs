//! `GET /admin/v1/blueprint`: each model's shape, as its controller last wrote it down.

use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::config::Config;
use crate::error::{ApiError, ApiResult};
use crate::respond;

pub async fn blueprint(State(app): State<Arc<App>>) -> Response {
    match read(&app.live().config).await {
        Ok(state) => respond::json(&state).into_response(),
        Err(error) => error.into_response(),
    }
}

/// The state of the only model, or `models` with those of all.
async fn read(config: &Config) -> ApiResult<Value> {
    let mut models = Vec::new();
    for model in &config.models {
        if let Some(path) = &model.blueprint_file {
            let mut state = state_of(path).await?;
            state.insert("model".to_owned(), json!(model.name));
            models.push(Value::Object(state));
        }
    }
    match models.len() {
        0 => Err(ApiError::not_found(
            "no_blueprint",
            "this gateway has no controller: it was started without blueprint_file",
        )),
        1 => Ok(models.remove(0)),
        _ => Ok(json!({ "models": models })),
    }
}

async fn state_of(path: &Path) -> ApiResult<Map<String, Value>> {
    let busy = |what: String| ApiError::busy("no_blueprint", what, 1);
    let text = tokio::fs::read(path)
        .await
        .map_err(|error| busy(format!("the controller's state cannot be read: {error}")))?;
    serde_json::from_slice(&text)
        .map_err(|error| busy(format!("the controller's state is no JSON object: {error}")))
}
