//! `/admin/v1/keys`, `/admin/v1/usage`

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use scalellm_accounts::report::{self, GroupBy};
use scalellm_accounts::{Accounts, AccountsError, NewKey, admin, store};
use serde::Deserialize;
use serde_json::Value;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;
use crate::respond;
use crate::routes::typed::{self, Asked, Named};

pub async fn create_key(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    let made = async {
        let accounts = accounts(&app).await?;
        let new: NewKey = typed::object(&app, &record, request).await?;
        let (key, secret) = accounts.create_key(&new).await.map_err(|e| refused(&e))?;
        Ok(admin::created(&key, &secret))
    };
    answer(made.await)
}

pub async fn list_keys(State(app): State<Arc<App>>) -> Response {
    let listed = async {
        let keys = store::list(accounts(&app).await?.database()).await;
        Ok(admin::keys(&keys.map_err(|e| refused(&e))?))
    };
    answer(listed.await)
}

pub async fn revoke_key(State(app): State<Arc<App>>, id: Named) -> Response {
    let revoked = async {
        let id = typed::name(id)?;
        let key = accounts(&app).await?.revoke_key(&id).await;
        Ok(serde_json::json!(key.map_err(|e| refused(&e))?))
    };
    answer(revoked.await)
}

/// The query string of `/admin/v1/usage`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsageQuery {
    /// Comma-separated.
    #[serde(default)]
    group_by: String,
    key: Option<String>,
    tenant: Option<String>,
    model: Option<String>,
    since_ms: Option<i64>,
    until_ms: Option<i64>,
}

pub async fn usage(State(app): State<Arc<App>>, asked: Asked<UsageQuery>) -> Response {
    let summed = async {
        let asked = typed::query(asked)?;
        let query = report::Query {
            group_by: groups(&asked.group_by)?,
            key: asked.key,
            tenant: asked.tenant,
            model: asked.model,
            since_ms: asked.since_ms,
            until_ms: asked.until_ms,
        };
        let sums = report::usage(accounts(&app).await?.database(), &query).await;
        Ok(admin::usage(&sums.map_err(|e| refused(&e))?))
    };
    answer(summed.await)
}

fn groups(text: &str) -> ApiResult<Vec<GroupBy>> {
    text.split(',')
        .filter(|name| !name.is_empty())
        .map(|name| {
            GroupBy::from_name(name).ok_or_else(|| {
                let message = format!(
                    "group_by: got {}, allowed are key, tenant, model, day, outcome, safety",
                    crate::error::shown(name)
                );
                ApiError::field("group_by", message)
            })
        })
        .collect()
}

/// The accounts, with their tables.
async fn accounts(app: &App) -> ApiResult<&Accounts> {
    let accounts = app.accounts.as_deref().ok_or_else(|| {
        ApiError::not_found(
            "no_database",
            "this gateway keeps no keys and no usage: it was started without database_url",
        )
    })?;
    let migrated = accounts.database().migrate().await;
    migrated.map(|()| accounts).map_err(|e| refused(&e))
}

fn refused(error: &AccountsError) -> Box<ApiError> {
    match error {
        AccountsError::Invalid(message) => {
            let field = message.split(':').next().unwrap_or_default();
            ApiError::field(field, message.clone())
        }
        AccountsError::Unknown(_) => ApiError::not_found("key_not_found", error.to_string()),
        AccountsError::Unavailable(_) => {
            ApiError::busy("accounts_unavailable", error.to_string(), 1)
        }
    }
}

fn answer(result: ApiResult<Value>) -> Response {
    match result {
        Ok(value) => respond::json(&value),
        Err(error) => error.into_response(),
    }
}
