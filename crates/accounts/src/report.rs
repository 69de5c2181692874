//! Sums over what was used.

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Row as _};

use crate::database::Database;
use crate::error::{AccountsError, Result};

const MAX_ROWS: i64 = 10_000;
const SUMS: [&str; 7] = [
    "COUNT(*)",
    "SUM(CASE WHEN outcome IN ('ok', 'running') THEN 0 ELSE 1 END)",
    "SUM(CASE WHEN outcome = 'running' THEN 1 ELSE 0 END)",
    "SUM(prompt_tokens)",
    "SUM(cached_tokens)",
    "SUM(output_tokens)",
    "SUM(replays)",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupBy {
    Key,
    Tenant,
    Model,
    /// Of the request's start, in UTC.
    Day,
    Outcome,
    /// What safety hooks did, as `ACTION:HOOK`.
    Safety,
}

impl GroupBy {
    const ALL: [GroupBy; 6] = [
        GroupBy::Key,
        GroupBy::Tenant,
        GroupBy::Model,
        GroupBy::Day,
        GroupBy::Outcome,
        GroupBy::Safety,
    ];

    #[must_use]
    pub fn from_name(name: &str) -> Option<GroupBy> {
        GroupBy::ALL.into_iter().find(|group| group.name() == name)
    }

    const fn name(self) -> &'static str {
        match self {
            GroupBy::Key => "key",
            GroupBy::Tenant => "tenant",
            GroupBy::Model => "model",
            GroupBy::Day => "day",
            GroupBy::Outcome => "outcome",
            GroupBy::Safety => "safety",
        }
    }

    /// Text in both dialects.
    const fn column(self) -> &'static str {
        match self {
            GroupBy::Key => "key_id",
            GroupBy::Tenant => "tenant",
            GroupBy::Model => "model",
            GroupBy::Day => "CAST(started_at / 86400000 AS TEXT)",
            GroupBy::Outcome => "outcome",
            GroupBy::Safety => "safety",
        }
    }
}

/// Which requests to sum, and how.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Query {
    pub group_by: Vec<GroupBy>,
    pub key: Option<String>,
    pub tenant: Option<String>,
    pub model: Option<String>,
    /// Unix milliseconds of the requests' start: from, and up to but not with.
    pub since_ms: Option<i64>,
    pub until_ms: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sum {
    /// What `group_by` named, by its names.
    #[serde(flatten)]
    pub group: serde_json::Map<String, serde_json::Value>,
    pub requests: i64,
    pub failed: i64,
    pub running: i64,
    pub prompt_tokens: i64,
    pub cached_tokens: i64,
    pub output_tokens: i64,
    pub replays: i64,
}

/// One row for each group, the most tokens first.
///
/// # Errors
/// `Unavailable`; `Invalid` for a group that is named twice.
pub async fn usage(database: &Database, query: &Query) -> Result<Vec<Sum>> {
    for (index, group) in query.group_by.iter().enumerate() {
        if query.group_by[..index].contains(group) {
            let name = group.name();
            return Err(AccountsError::Invalid(format!(
                "group_by: got {name:?} twice, allowed is each name once"
            )));
        }
    }
    let mut sql = "SELECT ".to_owned();
    for group in &query.group_by {
        sql += group.column();
        sql += ", ";
    }
    // PostgreSQL sums BIGINT to NUMERIC; over no rows a sum is null.
    sql += &SUMS
        .map(|sum| format!("CAST(COALESCE({sum}, 0) AS BIGINT)"))
        .join(", ");
    sql += " FROM all_usage WHERE 1 = 1";
    let mut places = 0;
    let mut condition = |condition: &str, is_set: bool| {
        if is_set {
            places += 1;
            sql += &format!(" AND {condition} ${places}");
        }
    };
    condition("key_id =", query.key.is_some());
    condition("tenant =", query.tenant.is_some());
    condition("model =", query.model.is_some());
    condition("started_at >=", query.since_ms.is_some());
    condition("started_at <", query.until_ms.is_some());
    let groups = query.group_by.len();
    if groups > 0 {
        let columns: Vec<String> = (1..=groups).map(|place| place.to_string()).collect();
        sql += &format!(" GROUP BY {}", columns.join(", "));
    }
    let (prompt, output) = (groups + 4, groups + 6);
    sql += &format!(" ORDER BY {prompt} DESC, {output} DESC LIMIT {MAX_ROWS}");
    let mut rows = sqlx::query(AssertSqlSafe(sql)).persistent(false);
    for text in [&query.key, &query.tenant, &query.model]
        .into_iter()
        .flatten()
    {
        rows = rows.bind(text.as_str());
    }
    for ms in [query.since_ms, query.until_ms].into_iter().flatten() {
        rows = rows.bind(ms);
    }
    let rows = rows.fetch_all(database.pool());
    let rows = database.limited(async { Ok(rows.await?) }).await?;
    rows.iter()
        .map(|row| {
            let mut group = serde_json::Map::new();
            for (index, by) in query.group_by.iter().enumerate() {
                let text: String = row.try_get(index)?;
                let value = if *by == GroupBy::Day {
                    day(&text)
                } else {
                    text
                };
                group.insert(by.name().to_owned(), value.into());
            }
            Ok(Sum {
                group,
                requests: row.try_get(groups)?,
                failed: row.try_get(groups + 1)?,
                running: row.try_get(groups + 2)?,
                prompt_tokens: row.try_get(groups + 3)?,
                cached_tokens: row.try_get(groups + 4)?,
                output_tokens: row.try_get(groups + 5)?,
                replays: row.try_get(groups + 6)?,
            })
        })
        .collect()
}

/// `2026-11-21`, from days since 1970.
fn day(days: &str) -> String {
    days.parse::<i64>()
        .ok()
        .and_then(|days| chrono::DateTime::from_timestamp(days.checked_mul(86_400)?, 0))
        .map_or_else(
            || days.to_owned(),
            |time| time.format("%Y-%m-%d").to_string(),
        )
}
