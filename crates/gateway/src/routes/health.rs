//! `GET /health`, `/ready`, `/version`

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::app::{App, Phase};
use crate::error::ApiError;
use crate::fleet::state_name;
use crate::foreign::Upstream;
use crate::respond;

/// The process answers.
pub async fn health() -> Response {
    respond::json(&json!({"status": "ok"}))
}

/// Every model has a replica that takes requests.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.phase() != Phase::Serving {
        return ApiError::draining(app.drain_retry_after_s()).into_response();
    }
    let live = app.live();
    if let Some(waiting) = live.fleet.waiting() {
        return waiting.into_response();
    }
    let models: Vec<Value> = live
        .fleet
        .models
        .iter()
        .map(|model| {
            let replica = |r: &Arc<scalellm_engine_link::Replica>| {
                json!({"address": r.address().to_string(), "state": state_name(r.state())})
            };
            json!({"name": &*model.name, "replicas": model.replicas.iter().map(replica).collect::<Vec<_>>()})
        })
        .chain(live.fleet.foreign.iter().map(|model| {
            let upstream = |u: &Arc<Upstream>| {
                json!({"url": u.name, "state": u.state()})
            };
            json!({"name": &*model.served.name, "upstreams": model.upstreams.iter().map(upstream).collect::<Vec<_>>()})
        }))
        .collect();
    respond::json(&json!({"status": "ready", "models": models}))
}

pub async fn version() -> Response {
    respond::json(&json!({"version": env!("CARGO_PKG_VERSION")}))
}
