//! Usage as the database holds it: what requests have in common is stored once, each request is a row of numbers.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use sqlx::AssertSqlSafe;

use crate::database::{Database, Tx};
use crate::error::Result;
use crate::usage::{RUNNING, Usage};

/// Rows of one statement. All but a batch's last one have as many, so that it is compiled once.
const ROWS: usize = 100;
/// Kinds that are remembered to be stored: far more than keys, models and outcomes make.
const MAX_STORED_KINDS: usize = 65_536;

/// One gateway's way to write usage.
pub(crate) struct UsageTable {
    database: Database,
    /// Names this gateway's life: with it and their numbers, no two requests have the same row.
    gateway: i64,
    stored_kinds: HashSet<i64>,
    /// Inserts [`ROWS`] rows.
    insertion: String,
}

/// What many requests have in common.
#[derive(Hash)]
struct Kind<'a> {
    key_id: &'a str,
    tenant: &'a str,
    model: &'a str,
    route: &'a str,
    outcome: &'a str,
    safety: &'a str,
}

impl<'a> Kind<'a> {
    fn of(usage: &'a Usage) -> Kind<'a> {
        let key = usage.key.as_deref();
        Kind {
            key_id: key.map_or("", |key| &key.id),
            tenant: key.map_or("", |key| &key.tenant),
            model: &usage.model,
            route: usage.route,
            outcome: usage.outcome,
            safety: &usage.safety,
        }
    }

    /// A hash, so that gateways need not agree on numbers. It may differ between builds of this program: then a kind is
    /// there twice, which no sum shows.
    fn id(&self) -> i64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish().cast_signed()
    }
}

impl UsageTable {
    pub fn new(database: Database) -> UsageTable {
        let gateway = (rand::random::<u64>() >> 1).cast_signed();
        UsageTable {
            insertion: insertion(&database, gateway, ROWS),
            database,
            gateway,
            stored_kinds: HashSet::new(),
        }
    }

    /// Writes all rows, each by its request's number, or none. What is not `running` in the database stays as it is.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn write(&mut self, rows: &[(u64, Usage)]) -> Result<()> {
        let kinds: Vec<i64> = rows.iter().map(|(_, u)| Kind::of(u).id()).collect();
        // In order: gateways that store the same ones at once must not wait for each other.
        let new: BTreeMap<i64, &Usage> = kinds
            .iter()
            .zip(rows)
            .filter(|(kind, _)| !self.stored_kinds.contains(kind))
            .map(|(kind, (_, usage))| (*kind, usage))
            .collect();
        let work = async {
            let mut tx = self.database.begin().await?;
            for (kind, usage) in &new {
                store_kind(&mut tx, *kind, &Kind::of(usage)).await?;
            }
            for (rows, kinds) in rows.chunks(ROWS).zip(kinds.chunks(ROWS)) {
                self.insert(&mut tx, rows, kinds).await?;
            }
            Ok(tx.commit().await?)
        };
        self.database.limited(work).await?;
        if self.stored_kinds.len() + new.len() > MAX_STORED_KINDS {
            self.stored_kinds.clear();
        }
        self.stored_kinds.extend(new.into_keys());
        Ok(())
    }

    async fn insert(&self, tx: &mut Tx, rows: &[(u64, Usage)], kinds: &[i64]) -> Result<()> {
        let is_usual = rows.len() == ROWS;
        let statement = match is_usual {
            true => self.insertion.clone(),
            false => insertion(&self.database, self.gateway, rows.len()),
        };
        let mut query = sqlx::query(AssertSqlSafe(statement)).persistent(is_usual);
        for ((number, usage), kind) in rows.iter().zip(kinds) {
            let status = match usage.outcome {
                RUNNING => 0,
                _ => usage.status.max(1),
            };
            query = query
                .bind(usage.started_at_ms)
                .bind(number.cast_signed())
                .bind(kind)
                .bind(&*usage.request_id)
                .bind(status)
                .bind(usage.duration_us)
                .bind(usage.first_token_us)
                .bind(usage.prompt_tokens)
                .bind(usage.cached_tokens)
                .bind(usage.output_tokens)
                .bind(usage.replays);
        }
        query.execute(&mut **tx).await?;
        Ok(())
    }

    /// Forgets some of what began before a time, in Unix milliseconds.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn forget(&self, before_ms: i64, at_most: i64) -> Result<()> {
        for (table, id) in [
            ("usage_rows", "started_at, gateway, number"),
            ("requests", "id"),
        ] {
            let statement = format!(
                "DELETE FROM {table} WHERE ({id}) IN (SELECT {id} FROM {table} WHERE started_at < $1 LIMIT $2)"
            );
            let query = sqlx::query(AssertSqlSafe(statement))
                .bind(before_ms)
                .bind(at_most)
                .execute(self.database.pool());
            self.database.limited(async { Ok(query.await?) }).await?;
        }
        Ok(())
    }
}

async fn store_kind(tx: &mut Tx, id: i64, kind: &Kind<'_>) -> Result<()> {
    sqlx::query(
        "INSERT INTO usage_kinds (id, key_id, tenant, model, route, outcome, safety) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO NOTHING",
    )
    .bind(id)
    .bind(kind.key_id)
    .bind(kind.tenant)
    .bind(kind.model)
    .bind(kind.route)
    .bind(kind.outcome)
    .bind(kind.safety)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Beside `gateway`, which is in the statement itself.
const COLUMNS: [&str; 11] = [
    "started_at",
    "number",
    "kind",
    "request_id",
    "status",
    "duration_us",
    "first_token_us",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "replays",
];

/// Inserts so many rows of a gateway's, whose values are bound in the order of [`COLUMNS`].
fn insertion(database: &Database, gateway: i64, rows: usize) -> String {
    let columns = COLUMNS.join(", ");
    let mut statement = format!("INSERT INTO usage_rows (gateway, {columns}) VALUES ");
    for row in 0..rows {
        statement.push_str(if row == 0 { "(" } else { ", (" });
        statement.push_str(&gateway.to_string());
        for column in 0..COLUMNS.len() {
            statement.push_str(", ");
            database.push_place(&mut statement, row * COLUMNS.len() + column + 1);
        }
        statement.push(')');
    }
    statement.push_str(
        " ON CONFLICT (started_at, gateway, number) DO UPDATE SET kind = excluded.kind, status = excluded.status, \
         duration_us = excluded.duration_us, first_token_us = excluded.first_token_us, \
         prompt_tokens = excluded.prompt_tokens, cached_tokens = excluded.cached_tokens, \
         output_tokens = excluded.output_tokens, replays = excluded.replays WHERE usage_rows.status = 0",
    );
    statement
}
