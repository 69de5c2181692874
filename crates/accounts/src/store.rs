//! Keys in the database.

use sqlx::Row as _;
use sqlx::any::AnyRow;

use crate::database::Database;
use crate::error::{AccountsError, Result};
use crate::key::{Class, Key, Limits, NewKey};
use crate::secret::{SecretHash, new_secret};

const MAX_LISTED: i64 = 100_000;

/// Stores a new key; its secret is in the answer and nowhere else.
///
/// # Errors
/// `Invalid`, `Unavailable`.
pub async fn create(database: &Database, new: &NewKey) -> Result<(Key, String)> {
    new.validate()?;
    let (secret, shown) = new_secret();
    let hash = SecretHash::of(&secret)
        .ok_or_else(|| AccountsError::Invalid("a new key is no key".to_owned()))?;
    database
        .limited(async {
            let mut tx = database.begin().await?;
            let now_ms = database.now_ms(&mut tx).await?;
            let key = Key {
                id: format!("key-{:016x}", rand::random::<u64>()),
                shown,
                name: new.name.clone(),
                tenant: new.tenant.clone(),
                class: new.class,
                weight: new.weight,
                models: new.models.clone(),
                limits: new.limits,
                created_at_ms: now_ms,
                expires_at_ms: new.expires_in_s.map(|life_s| now_ms + life_s * 1000),
                revoked_at_ms: None,
            };
            let models = key
                .models
                .as_ref()
                .map(|models| serde_json::json!(models).to_string());
            sqlx::query(
                "INSERT INTO api_keys (id, secret_sha256, shown, name, tenant, class, weight, models, concurrency, \
                 requests_per_minute, tokens_per_minute, tokens_per_day, tokens_per_month, created_at, expires_at) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
            )
            .bind(key.id.clone())
            .bind(hash.hex())
            .bind(key.shown.clone())
            .bind(key.name.clone())
            .bind(key.tenant.clone())
            .bind(key.class.name())
            .bind(key.weight)
            .bind(models)
            .bind(key.limits.concurrency)
            .bind(key.limits.requests_per_minute)
            .bind(key.limits.tokens_per_minute)
            .bind(key.limits.tokens_per_day)
            .bind(key.limits.tokens_per_month)
            .bind(key.created_at_ms)
            .bind(key.expires_at_ms)
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok(key)
        })
        .await
        .map(|key| (key, secret))
}

/// All keys, the newest first.
///
/// # Errors
/// `Unavailable`.
pub async fn list(database: &Database) -> Result<Vec<Key>> {
    let query = sqlx::query("SELECT * FROM api_keys ORDER BY created_at DESC, id LIMIT $1")
        .bind(MAX_LISTED)
        .fetch_all(database.pool());
    let rows = database.limited(async { Ok(query.await?) }).await?;
    rows.iter().map(key_of).collect()
}

/// Ends a key's life; to revoke it again changes nothing.
///
/// # Errors
/// `Unknown`, `Unavailable`.
pub async fn revoke(database: &Database, id: &str) -> Result<Key> {
    database
        .limited(async {
            let mut tx = database.begin().await?;
            let now_ms = database.now_ms(&mut tx).await?;
            sqlx::query("UPDATE api_keys SET revoked_at = $1 WHERE id = $2 AND revoked_at IS NULL")
                .bind(now_ms)
                .bind(id)
                .execute(&mut *tx)
                .await?;
            let row = sqlx::query("SELECT * FROM api_keys WHERE id = $1")
                .bind(id)
                .fetch_optional(&mut *tx)
                .await?;
            tx.commit().await?;
            row.as_ref()
                .map(key_of)
                .transpose()?
                .ok_or_else(|| AccountsError::Unknown(id.to_owned()))
        })
        .await
}

/// What the database says to a secret.
#[derive(Debug)]
pub enum Found {
    /// With the time until it expires by itself.
    Valid(Box<Key>, Option<std::time::Duration>),
    Revoked,
    Expired,
    Missing,
}

/// The key of a secret.
///
/// # Errors
/// `Unavailable`.
pub async fn find(database: &Database, hash: &SecretHash) -> Result<Found> {
    database
        .limited(async {
            let mut tx = database.begin_reading().await?;
            let now_ms = database.now_ms(&mut tx).await?;
            let row = sqlx::query("SELECT * FROM api_keys WHERE secret_sha256 = $1")
                .bind(hash.hex())
                .fetch_optional(&mut *tx)
                .await?;
            tx.commit().await?;
            let Some(key) = row.as_ref().map(key_of).transpose()? else {
                return Ok(Found::Missing);
            };
            let left_ms = key.expires_at_ms.map(|at_ms| at_ms - now_ms);
            Ok(match left_ms {
                _ if key.revoked_at_ms.is_some() => Found::Revoked,
                Some(left_ms) if left_ms <= 0 => Found::Expired,
                left_ms => Found::Valid(
                    Box::new(key),
                    left_ms
                        .and_then(|ms| u64::try_from(ms).ok())
                        .map(std::time::Duration::from_millis),
                ),
            })
        })
        .await
}

/// Whether there ever was a key: from then on nobody comes in without.
///
/// # Errors
/// `Unavailable`.
pub async fn any(database: &Database) -> Result<bool> {
    let query = sqlx::query("SELECT id FROM api_keys LIMIT 1").fetch_optional(database.pool());
    database.limited(async { Ok(query.await?.is_some()) }).await
}

fn key_of(row: &AnyRow) -> Result<Key> {
    let class: String = row.try_get("class")?;
    let models: Option<String> = row.try_get("models")?;
    let corrupt =
        |what: &str| AccountsError::Unavailable(format!("the table api_keys has a bad {what}"));
    Ok(Key {
        id: row.try_get("id")?,
        shown: row.try_get("shown")?,
        name: row.try_get("name")?,
        tenant: row.try_get("tenant")?,
        class: Class::from_name(&class).ok_or_else(|| corrupt("class"))?,
        weight: row.try_get("weight")?,
        models: models
            .map(|text| serde_json::from_str(&text))
            .transpose()
            .map_err(|_| corrupt("list of models"))?,
        limits: Limits {
            concurrency: row.try_get("concurrency")?,
            requests_per_minute: row.try_get("requests_per_minute")?,
            tokens_per_minute: row.try_get("tokens_per_minute")?,
            tokens_per_day: row.try_get("tokens_per_day")?,
            tokens_per_month: row.try_get("tokens_per_month")?,
        },
        created_at_ms: row.try_get("created_at")?,
        expires_at_ms: row.try_get("expires_at")?,
        revoked_at_ms: row.try_get("revoked_at")?,
    })
}
