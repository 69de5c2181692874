//! What operators ask of the database, as JSON: the same through `/admin/v1` and from the command line.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::database::Database;
use crate::error::{AccountsError, Result};
use crate::key::{Key, NewKey};
use crate::{report, store};

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    CreateKey { key: NewKey },
    ListKeys,
    RevokeKey { id: String },
    Usage { query: report::Query },
}

/// Does what is asked, on a database whose tables are there.
///
/// # Errors
/// As the work itself.
pub async fn answer(database: &Database, request: &Request) -> Result<Value> {
    Ok(match request {
        Request::CreateKey { key } => {
            let (key, secret) = store::create(database, key).await?;
            created(&key, &secret)
        }
        Request::ListKeys => keys(&store::list(database).await?),
        Request::RevokeKey { id } => json!(store::revoke(database, id).await?),
        Request::Usage { query } => usage(&report::usage(database, query).await?),
    })
}

/// A new key with its secret, which is shown this once.
#[must_use]
pub fn created(key: &Key, secret: &str) -> Value {
    let mut value = json!(key);
    value["secret"] = secret.into();
    value
}

#[must_use]
pub fn keys(keys: &[Key]) -> Value {
    json!({"object": "list", "data": keys})
}

#[must_use]
pub fn usage(sums: &[report::Sum]) -> Value {
    json!({"object": "list", "data": sums})
}

/// `answer` on a database of its own, for a process that does nothing else: JSON in, JSON out. Blocks.
///
/// # Errors
/// `Invalid` for JSON that is no request; as [`answer`].
pub fn answer_once(database_url: &str, request: &str) -> Result<String> {
    let request: Request = serde_json::from_str(request)
        .map_err(|error| AccountsError::Invalid(format!("request: {error}")))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| AccountsError::Unavailable(error.to_string()))?;
    runtime.block_on(async {
        let timeout = std::time::Duration::from_secs(10);
        let database = Database::open(database_url, timeout)?;
        database.migrate().await?;
        let value = answer(&database, &request).await;
        database.close().await;
        Ok(value?.to_string())
    })
}
