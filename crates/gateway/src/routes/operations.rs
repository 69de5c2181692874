//! `/admin/v1/replicas`, `/admin/v1/reload`, `/admin/v1/log`: what an operator changes while requests run.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::config::{Config, LogLevel, ModelConfig, UpstreamConfig};
use crate::error::{ApiError, ApiResult};
use crate::fleet::{Fleet, replica_name, state_name};
use crate::record::RequestRecord;
use crate::reload::Applied;
use crate::respond;
use crate::routes::typed::{self, Asked};

pub async fn list(State(app): State<Arc<App>>) -> Response {
    respond::json(&listed(&app.live().fleet))
}

fn listed(fleet: &Fleet) -> Value {
    let models = fleet.served.iter().map(|served| {
        let own = fleet.own(served).into_iter().flat_map(|model| {
            model.replicas.iter().map(|replica| {
                json!({
                    "name": replica_name(replica),
                    "address": replica.address().to_string(),
                    "state": state_name(replica.state()),
                    "drained": model.is_drained(replica),
                    "in_flight_requests": replica.in_flight(),
                })
            })
        });
        let elsewhere = fleet
            .elsewhere(served)
            .into_iter()
            .flat_map(|model| model.listed());
        json!({
            "model": &*served.name,
            "replicas": own.collect::<Vec<_>>(),
            "upstreams": elsewhere.collect::<Vec<_>>(),
        })
    });
    json!({"models": models.collect::<Vec<_>>()})
}

/// A replica of our own by its address, or an upstream by its keys in the configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Added {
    model: String,
    address: Option<String>,
    upstream: Option<UpstreamConfig>,
}

pub async fn add(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    let added = async {
        let asked: Added = typed::object(&app, &record, request).await?;
        let is_guarded = !app.live().config.admin_keys.is_empty();
        change(&app, &asked.model, |model| {
            match (&asked.address, &asked.upstream) {
                (Some(address), None) => model.replicas.push(address.clone()),
                (None, Some(upstream)) => {
                    check_secrets(upstream, is_guarded)?;
                    model.upstreams.push(upstream.clone());
                }
                _ => {
                    let message = "address: needed is it or upstream, one of them";
                    return Err(ApiError::field("address", message));
                }
            }
            Ok(())
        })
        .await
    };
    answer(added.await)
}

/// Without an admin key every user of this host is an operator, who must not have files and variables that the gateway
/// alone may read sent to a URL.
fn check_secrets(upstream: &UpstreamConfig, is_guarded: bool) -> ApiResult<()> {
    let named = [
        ("api_key_env", upstream.api_key_env.is_some()),
        ("api_key_file", upstream.api_key_file.is_some()),
        ("ca_file", upstream.ca_file.is_some()),
    ];
    match named.iter().find(|(_, is_named)| *is_named) {
        Some((key, _)) if !is_guarded => Err(ApiError::forbidden(
            "admin_key_needed",
            format!(
                "upstream.{key}: allowed here only where the gateway has admin_keys; without, it belongs into the \
                 configuration file"
            ),
        )),
        _ => Ok(()),
    }
}

/// One engine: a replica's address, or an upstream's URL.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    model: String,
    address: String,
}

impl Named {
    fn check(&self, model: &ModelConfig) -> ApiResult<()> {
        let mut known = model
            .replicas
            .iter()
            .chain(model.upstreams.iter().map(|upstream| &upstream.url));
        if known.any(|known| *known == self.address) {
            return Ok(());
        }
        let message = format!(
            "address: got {:?}, which is none of {:?}'s",
            self.address, self.model
        );
        Err(ApiError::not_found("replica_not_found", message))
    }
}

pub async fn drain(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    let drained = async {
        let named: Named = typed::object(&app, &record, request).await?;
        change(&app, &named.model, |model| {
            named.check(model)?;
            if !model.drained.contains(&named.address) {
                model.drained.push(named.address.clone());
            }
            Ok(())
        })
        .await
    };
    answer(drained.await)
}

pub async fn remove(State(app): State<Arc<App>>, named: Asked<Named>) -> Response {
    let removed = async {
        let named = typed::query(named)?;
        change(&app, &named.model, |model| {
            named.check(model)?;
            model.replicas.retain(|address| *address != named.address);
            model
                .upstreams
                .retain(|upstream| upstream.url != named.address);
            model.drained.retain(|address| *address != named.address);
            Ok(())
        })
        .await
    };
    answer(removed.await)
}

pub async fn reload(State(app): State<Arc<App>>) -> Response {
    let applied = app.changes.reload(&app).await;
    answer(applied.map(|applied| json!(applied)).map_err(Into::into))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Level {
    level: LogLevel,
}

pub async fn log_level(State(app): State<Arc<App>>) -> Response {
    respond::json(&json!({"level": app.live().config.log_level}))
}

pub async fn set_log_level(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    let set = async {
        let Level { level } = typed::object(&app, &record, request).await?;
        let edit = |config: &Config| {
            Ok::<_, Box<ApiError>>(Config {
                log_level: level,
                ..config.clone()
            })
        };
        app.changes.change(&app, edit).await?;
        Ok(json!({"level": level}))
    };
    answer(set.await)
}

/// Changes one model, and tells what there is now.
async fn change(
    app: &App,
    name: &str,
    edit: impl FnOnce(&mut ModelConfig) -> ApiResult<()>,
) -> ApiResult<Value> {
    let edit = |config: &Config| {
        let mut config = config.clone();
        let names: Vec<String> = config
            .models
            .iter()
            .map(|model| model.name.clone())
            .collect();
        let model = config.models.iter_mut().find(|model| model.name == name);
        let model = model.ok_or_else(|| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            ApiError::unknown_model(name, &names)
        })?;
        edit(model)?;
        Ok::<_, Box<ApiError>>(config)
    };
    let Applied { .. } = app.changes.change(app, edit).await?;
    Ok(listed(&app.live().fleet))
}

pub(super) fn answer(result: ApiResult<Value>) -> Response {
    match result {
        Ok(value) => respond::json(&value),
        Err(error) => error.into_response(),
    }
}
