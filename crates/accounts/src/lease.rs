//! Leases on budgets, in the database.
//!
//! Every statement below runs in one transaction that begins by locking the budget's row, so gateways take turns. A
//! lease ends by the database's clock: what its gateway had reported as held stays charged, the rest goes back.

use std::time::Duration;

use sqlx::Row as _;

use crate::database::{Database, Tx};
use crate::error::Result;
use crate::key::Quota;
use crate::ledger::{Answer, Report};
use crate::window;

/// Reports what a gateway holds of a key's budgets, and takes what it asks for as far as there is any.
///
/// # Errors
/// `Unavailable`; then nothing has changed, or all of it has and the next sync finds it.
pub async fn sync(
    database: &Database,
    gateway: &str,
    key_id: &str,
    reports: &[Report],
    lease: Duration,
) -> Result<Vec<Answer>> {
    database
        .limited(async {
            let mut tx = database.begin().await?;
            let now_ms = database.now_ms(&mut tx).await?;
            let expires_ms = now_ms + i64::try_from(lease.as_millis()).unwrap_or(i64::MAX / 2);
            let mut answers = Vec::with_capacity(reports.len());
            for report in reports {
                let row = Lease {
                    key_id,
                    gateway,
                    quota: report.quota,
                    start_ms: window::of(report.quota, now_ms).0,
                };
                answers.push(row.sync(&mut tx, report, now_ms, expires_ms).await?);
            }
            tx.commit().await?;
            Ok(answers)
        })
        .await
}

/// Budgets of windows that are long over, with their leases.
///
/// # Errors
/// `Unavailable`.
pub async fn forget_old(database: &Database, older_than_ms: i64) -> Result<()> {
    database
        .limited(async {
            let mut tx = database.begin().await?;
            let before_ms = database.now_ms(&mut tx).await? - older_than_ms;
            for statement in [
                "DELETE FROM budgets WHERE window_start > 0 AND window_start < $1",
                "DELETE FROM leases WHERE window_start > 0 AND window_start < $1",
            ] {
                sqlx::query(statement)
                    .bind(before_ms)
                    .execute(&mut *tx)
                    .await?;
            }
            Ok(tx.commit().await?)
        })
        .await
}

struct Lease<'a> {
    key_id: &'a str,
    gateway: &'a str,
    quota: Quota,
    start_ms: i64,
}

impl Lease<'_> {
    async fn sync(
        &self,
        tx: &mut Tx,
        report: &Report,
        now_ms: i64,
        expires_ms: i64,
    ) -> Result<Answer> {
        let charged = self.lock(tx).await? - self.end_expired(tx, now_ms).await?;
        let known = self.granted(tx).await?;
        let held = match (report.window_start_ms, known) {
            // A budget without windows has one lease, whatever the gateway has heard of it.
            (None, _) if self.quota == Quota::Concurrency => report.held,
            // The gateway starts anew in a window in which the database has a lease of its: it came too early.
            (None, Some((_, held))) => held + report.held,
            (None, None) => report.held,
            // The window that the gateway means is over.
            (Some(start_ms), _) if start_ms != self.start_ms => 0,
            (Some(_), Some(_)) => report.held,
            // The lease had ended. Requests that run still run; of tokens, what was reported is charged for good.
            (Some(_), None) if self.quota == Quota::Concurrency => report.held,
            (Some(_), None) => report.held - report.reported,
        };
        let granted_before = known.map_or(0, |(granted, _)| granted);
        let room = report.limit - (charged - granted_before);
        let wanted = held + report.wanted + report.free;
        let granted = wanted.min(room).max(held);
        let reported = granted.min(held + report.wanted);
        let charged = charged - granted_before + granted;
        self.charge(tx, charged).await?;
        if report.close {
            self.end(tx).await?;
        } else {
            self.renew(tx, granted, reported, expires_ms).await?;
        }
        Ok(Answer {
            window_start_ms: self.start_ms,
            window_left: window::of(self.quota, now_ms).1,
            granted,
            held,
            reported,
            exhausted: granted < wanted,
            left: report.limit - charged,
        })
    }

    /// Locks the budget for this transaction and reads what is charged to it.
    async fn lock(&self, tx: &mut Tx) -> Result<i64> {
        let row = sqlx::query(
            "INSERT INTO budgets (key_id, quota, window_start, charged) VALUES ($1, $2, $3, 0) \
             ON CONFLICT (key_id, quota, window_start) DO UPDATE SET charged = budgets.charged RETURNING charged",
        )
        .bind(self.key_id.to_owned())
        .bind(self.quota.name())
        .bind(self.start_ms)
        .fetch_one(&mut **tx)
        .await?;
        Ok(row.try_get(0)?)
    }

    /// Ends the leases whose gateways have not been heard of; returns what goes back to the budget.
    async fn end_expired(&self, tx: &mut Tx, now_ms: i64) -> Result<i64> {
        let rows = sqlx::query(
            "DELETE FROM leases WHERE key_id = $1 AND quota = $2 AND window_start = $3 AND expires_at < $4 \
             RETURNING granted, held",
        )
        .bind(self.key_id.to_owned())
        .bind(self.quota.name())
        .bind(self.start_ms)
        .bind(now_ms)
        .fetch_all(&mut **tx)
        .await?;
        let mut back = 0;
        for row in rows {
            let granted: i64 = row.try_get(0)?;
            // The requests of a gateway that is gone are gone with it; the tokens they were held for may be used.
            let kept: i64 = match self.quota {
                Quota::Concurrency => 0,
                _ => row.try_get(1)?,
            };
            back += granted - kept;
        }
        Ok(back)
    }

    async fn granted(&self, tx: &mut Tx) -> Result<Option<(i64, i64)>> {
        let row = sqlx::query(
            "SELECT granted, held FROM leases \
             WHERE key_id = $1 AND quota = $2 AND window_start = $3 AND gateway = $4",
        )
        .bind(self.key_id.to_owned())
        .bind(self.quota.name())
        .bind(self.start_ms)
        .bind(self.gateway.to_owned())
        .fetch_optional(&mut **tx)
        .await?;
        row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .transpose()
    }

    async fn charge(&self, tx: &mut Tx, charged: i64) -> Result<()> {
        sqlx::query(
            "UPDATE budgets SET charged = $4 WHERE key_id = $1 AND quota = $2 AND window_start = $3",
        )
        .bind(self.key_id.to_owned())
        .bind(self.quota.name())
        .bind(self.start_ms)
        .bind(charged)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    async fn renew(&self, tx: &mut Tx, granted: i64, held: i64, expires_ms: i64) -> Result<()> {
        sqlx::query(
            "INSERT INTO leases (key_id, quota, window_start, gateway, granted, held, expires_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (key_id, quota, window_start, gateway) \
             DO UPDATE SET granted = excluded.granted, held = excluded.held, expires_at = excluded.expires_at",
        )
        .bind(self.key_id.to_owned())
        .bind(self.quota.name())
        .bind(self.start_ms)
        .bind(self.gateway.to_owned())
        .bind(granted)
        .bind(held)
        .bind(expires_ms)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    async fn end(&self, tx: &mut Tx) -> Result<()> {
        sqlx::query(
            "DELETE FROM leases WHERE key_id = $1 AND quota = $2 AND window_start = $3 AND gateway = $4",
        )
        .bind(self.key_id.to_owned())
        .bind(self.quota.name())
        .bind(self.start_ms)
        .bind(self.gateway.to_owned())
        .execute(&mut **tx)
        .await?;
        Ok(())
    }
}
