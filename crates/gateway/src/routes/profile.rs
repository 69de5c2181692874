//! `GET /admin/v1/profile`: where the time of the last requests and steps went.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use scalellm_engine_link::proto;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::recent::phases_json;
use crate::respond::json as json_response;
use crate::routes::typed::{self, Asked};

#[derive(Deserialize)]
pub struct Wanted {
    /// Requests with this number and later ones; without it, only the next number is told.
    from: Option<u64>,
    /// Steps that began after this Unix time; without it, none.
    steps_after_us: Option<u64>,
}

pub async fn profile(State(app): State<Arc<App>>, asked: Asked<Wanted>) -> Response {
    let wanted = match typed::query(asked) {
        Ok(wanted) => wanted,
        Err(error) => return error.into_response(),
    };
    let (next, requests) = app.recent.since(wanted.from.unwrap_or(u64::MAX));
    let steps = match wanted.steps_after_us {
        Some(after_us) => steps(&app, after_us).await,
        None => Vec::new(),
    };
    let body = json!({
        "schema": 1,
        "next": next,
        "kept_requests": crate::recent::KEPT_REQUESTS,
        "requests": requests,
        "replicas": steps,
    });
    json_response(&body).into_response()
}

/// Of every replica of every model, or why it did not tell.
async fn steps(app: &App, after_us: u64) -> Vec<Value> {
    let live = app.live();
    let replicas = live.fleet.models.iter().flat_map(|model| {
        model
            .replicas
            .iter()
            .map(move |replica| (&model.name, replica))
    });
    join_all(replicas.map(|(model, replica)| async move {
        let (steps, problem) = match replica.steps(after_us).await {
            Ok(steps) => (steps, None),
            Err(problem) => (Vec::new(), Some(problem)),
        };
        json!({
            "model": **model,
            "replica": replica.address().to_string(),
            "steps": steps.iter().map(step_json).collect::<Vec<_>>(),
            "problem": problem,
        })
    }))
    .await
}

fn step_json(step: &proto::StepTimes) -> Value {
    let mut told = json!({
        "number": step.number,
        "started_us": step.started_us,
        "requests": step.requests,
        "tokens": step.tokens,
        "phases_us": phases_json(&step.phases),
    });
    if let Some(used) = &step.expert_use {
        told["experts"] = json!({
            "layers": used.layers,
            "read": used.read,
            "busiest": used.busiest,
            "choices": used.choices,
            "ranks": used.ranks,
        });
    }
    told
}
