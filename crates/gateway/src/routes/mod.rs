//! The endpoints. Each handler only names the stages that its request passes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};

use crate::app::App;
use crate::error::ApiError;
use crate::observe::observe;

mod admin;
mod blueprint;
mod chat;
mod completions;
mod health;
mod index;
mod metrics;
mod models;
mod openapi;
mod operations;
mod profile;
mod text;
mod typed;

/// Every route's pattern, as metrics and the log name it.
const ROUTES: [&str; 21] = [
    "/",
    "/health",
    "/ready",
    "/version",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/models/{*id}",
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/admin/v1/profile",
    "/admin/v1/blueprint",
    "/admin/v1/keys",
    "/admin/v1/keys/{id}",
    "/admin/v1/usage",
    "/admin/v1/replicas",
    "/admin/v1/replicas/drain",
    "/admin/v1/reload",
    "/admin/v1/log",
];

/// Open to everybody, and answered while draining.
const OPEN: [&str; 6] = [
    "/",
    "/health",
    "/ready",
    "/version",
    "/metrics",
    "/openapi.json",
];

#[must_use]
pub fn label(pattern: &str) -> &'static str {
    ROUTES
        .into_iter()
        .find(|route| *route == pattern)
        .unwrap_or("other")
}

#[must_use]
pub fn is_open(route: &str) -> bool {
    OPEN.contains(&route)
}

/// For operators: asks for the admin key in place of a client's.
#[must_use]
pub fn is_admin(route: &str) -> bool {
    route.starts_with("/admin/")
}

pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(index::index))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/version", get(health::version))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::openapi))
        .route("/v1/models", get(models::list))
        // Names may be hub ids: they hold slashes.
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/admin/v1/profile", get(profile::profile))
        .route(
            "/admin/v1/blueprint",
            get(blueprint::blueprint).put(blueprint::wish),
        )
        .route(
            "/admin/v1/keys",
            get(admin::list_keys).post(admin::create_key),
        )
        .route("/admin/v1/keys/{id}", delete(admin::revoke_key))
        .route("/admin/v1/usage", get(admin::usage))
        .route(
            "/admin/v1/replicas",
            get(operations::list)
                .post(operations::add)
                .delete(operations::remove),
        )
        .route("/admin/v1/replicas/drain", post(operations::drain))
        .route("/admin/v1/reload", post(operations::reload))
        .route(
            "/admin/v1/log",
            get(operations::log_level).put(operations::set_log_level),
        )
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_route)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), observe))
        .with_state(app)
}

async fn unknown_route(request: Request) -> Response {
    ApiError::unknown_route(request.method().as_str(), request.uri().path()).into_response()
}

async fn method_not_allowed(State(_): State<Arc<App>>, request: Request) -> Response {
    ApiError::method_not_allowed(request.method().as_str(), request.uri().path()).into_response()
}
