//! `GET /admin/v1/blueprint`: the deployment's shape, as its controller last wrote it down.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::respond;

pub async fn blueprint(State(app): State<Arc<App>>) -> Response {
    match read(&app).await {
        Ok(state) => respond::json(&state).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn read(app: &App) -> ApiResult<Value> {
    let live = app.live();
    let path = live.config.blueprint_file.as_ref().ok_or_else(|| {
        ApiError::not_found(
            "no_blueprint",
            "this gateway has no controller: it was started without blueprint_file",
        )
    })?;
    let busy = |what: String| ApiError::busy("no_blueprint", what, 1);
    let text = tokio::fs::read(path)
        .await
        .map_err(|error| busy(format!("the controller's state cannot be read: {error}")))?;
    serde_json::from_slice(&text)
        .map_err(|error| busy(format!("the controller's state is no JSON: {error}")))
}
