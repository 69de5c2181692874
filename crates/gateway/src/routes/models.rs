//! `GET /v1/models`, `/v1/models/{*id}`

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::app::App;
use crate::fleet::Fleet;
use crate::respond;
use crate::routes::typed::{self, Named};
use crate::served::Served;

pub async fn list(State(app): State<Arc<App>>) -> Response {
    let live = app.live();
    let fleet = &live.fleet;
    let names = fleet.served.iter().flat_map(|served| {
        std::iter::once(&*served.name)
            .chain(served.aliases.iter().map(String::as_str))
            .map(|name| card(name, fleet, served))
    });
    respond::json(&json!({"object": "list", "data": names.collect::<Vec<_>>()}))
}

pub async fn one(State(app): State<Arc<App>>, id: Named) -> Response {
    let live = app.live();
    let card = typed::name(id).and_then(|id| Ok(card(&id, &live.fleet, live.fleet.find(&id)?)));
    match card {
        Ok(card) => respond::json(&card),
        Err(error) => error.into_response(),
    }
}

fn card(name: &str, fleet: &Fleet, served: &Arc<Served>) -> Value {
    let limits = fleet.own(served).and_then(|model| model.limits());
    json!({
        "id": name,
        "object": "model",
        "created": served.created_unix_s,
        "owned_by": "scalellm",
        "root": &*served.name,
        "parent": null,
        "max_model_len": limits.map(|limits| limits.max_model_len),
    })
}
