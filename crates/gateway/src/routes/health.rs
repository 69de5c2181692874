//! `GET /health`, `/ready`, `/version`

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::{App, Phase};
use crate::error::ApiError;
use crate::fleet::{replica_name, state_name};
use crate::foreign::Upstream;
use crate::respond;

/// The process answers.
pub async fn health() -> Response {
    respond::json(&json!({"status": "ok"}))
}

#[derive(Deserialize)]
pub struct Wanted {
    #[serde(default)]
    models: Models,
}

/// Of how many models a replica has to take requests.
#[derive(Deserialize, Default, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Models {
    #[default]
    All,
    Any,
}

/// Every model has a replica that takes requests, or with `?models=any` one of them has.
pub async fn ready(
    State(app): State<Arc<App>>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Response {
    let Query(Wanted { models }) = match wanted {
        Ok(wanted) => wanted,
        Err(error) => return ApiError::body(error.body_text()).into_response(),
    };
    if app.phase() != Phase::Serving {
        return ApiError::draining(app.drain_retry_after_s()).into_response();
    }
    let live = app.live();
    let is_enough = models == Models::Any && live.fleet.is_any_ready();
    if !is_enough && let Some(waiting) = live.fleet.waiting() {
        return waiting.into_response();
    }
    let models: Vec<Value> = live
        .fleet
        .models
        .iter()
        .map(|model| {
            let replica = |r: &Arc<scalellm_engine_link::Replica>| {
                json!({"name": replica_name(r), "state": state_name(r.state())})
            };
            json!({"name": &*model.name, "replicas": model.replicas.iter().map(replica).collect::<Vec<_>>()})
        })
        .chain(live.fleet.foreign.iter().map(|model| {
            let upstream = |u: &Arc<Upstream>| {
                json!({"name": u.told_as, "state": u.state()})
            };
            json!({"name": &*model.served.name, "upstreams": model.upstreams.iter().map(upstream).collect::<Vec<_>>()})
        }))
        .collect();
    respond::json(&json!({"status": "ready", "models": models}))
}

pub async fn version() -> Response {
    respond::json(&json!({"version": env!("CARGO_PKG_VERSION")}))
}
