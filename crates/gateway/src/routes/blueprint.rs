//! `/admin/v1/blueprint`: each model's shape, as its controller last wrote it down, and which one an operator wants.
//!
//! The wish is a file beside the controller's, which reads it; what cannot be is refused here, before it is written.

use std::path::Path;
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{operations, typed};
use crate::app::App;
use crate::config::Config;
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;
use crate::respond;

/// Of `blueprint_file`'s name, for the wish.
const WISH_EXTENSION: &str = "wish.json";

#[derive(Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Group {
    tp: u32,
    count: u32,
}

/// A blueprint to have and keep; `null` hands the choice back to the policy.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Wish {
    /// Whose; needed where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    blueprint: Option<Vec<Group>>,
}

pub async fn blueprint(State(app): State<Arc<App>>) -> Response {
    match read(&app.live().config).await {
        Ok(state) => respond::json(&state).into_response(),
        Err(error) => error.into_response(),
    }
}

pub async fn wish(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    let wished = async {
        let wish: Wish = typed::object(&app, &record, request).await?;
        let live = app.live();
        let path = whose(&live.config, wish.model.as_deref())?;
        check(&wish, &state_of(path).await?)?;
        write(path, &wish).await?;
        Ok(json!(wish))
    };
    operations::answer(wished.await)
}

/// The controller's file of the model, or of the only one that has a controller.
fn whose<'a>(config: &'a Config, model: Option<&str>) -> ApiResult<&'a Path> {
    let steered = config
        .models
        .iter()
        .filter_map(|found| Some((found.name.as_str(), found.blueprint_file.as_deref()?)));
    let steered: Vec<_> = steered.collect();
    let is_asked = |name: &str| model.map_or(steered.len() == 1, |model| model == name);
    if let Some((_, path)) = steered.iter().find(|(name, _)| is_asked(name)) {
        return Ok(path);
    }
    let names: Vec<_> = steered.iter().map(|(name, _)| *name).collect();
    Err(ApiError::field(
        "model",
        format!("model: got {}, allowed: one of {names:?}", json!(model)),
    ))
}

fn check(wish: &Wish, state: &Map<String, Value>) -> ApiResult<()> {
    let refused = |message: String| Err(ApiError::field("blueprint", message));
    let Some(candidates) = state.get("candidates") else {
        return refused(
            "blueprint: this deployment's is static, --blueprint auto changes it".into(),
        );
    };
    let allowed = Vec::<Vec<Group>>::deserialize(candidates).unwrap_or_default();
    match &wish.blueprint {
        Some(wished) if !allowed.contains(wished) => refused(format!(
            "blueprint: got {}, allowed: null, or one of {candidates}",
            json!(wished)
        )),
        _ => Ok(()),
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

/// Whole or not at all: the controller may read at any time.
async fn write(state: &Path, wish: &Wish) -> ApiResult<()> {
    let file = state.with_extension(WISH_EXTENSION);
    let part = file.with_extension("part");
    let text = json!(wish).to_string();
    let written = async {
        tokio::fs::write(&part, text).await?;
        tokio::fs::rename(&part, &file).await
    };
    written.await.map_err(|error| {
        let message = format!("the controller cannot be told: {error}");
        ApiError::busy("no_blueprint", message, 1)
    })
}
