//! SQLite or PostgreSQL behind one pool. Every statement is written in what both understand.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sqlx::any::{AnyPoolOptions, install_default_drivers};
use sqlx::migrate::Migrator;
use sqlx::{Any, AnyPool, Connection as _, Executor as _, Row as _, Transaction};
use tokio::sync::OnceCell;

use crate::error::{AccountsError, Result};

static MIGRATIONS: Migrator = sqlx::migrate!();

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

/// A pool that connects when it is first used.
#[derive(Debug, Clone)]
pub struct Database {
    pool: AnyPool,
    dialect: Dialect,
    timeout: Duration,
    migrated: Arc<OnceCell<()>>,
}

pub type Tx = Transaction<'static, Any>;

impl Database {
    /// `url` is `postgres://...`, `sqlite:PATH`, or `sqlite` for a file in the user's data folder. Nothing waits longer
    /// than `timeout`.
    ///
    /// # Errors
    /// `Invalid` for any other URL.
    pub fn open(url: &str, timeout: Duration) -> Result<Database> {
        let invalid = |reason: &dyn std::fmt::Display| {
            AccountsError::Invalid(format!(
                "database_url: {reason}; allowed is postgres://..., sqlite:PATH, or sqlite for the user's data folder"
            ))
        };
        install_default_drivers();
        let (url, dialect) = if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            (url.to_owned(), Dialect::Postgres)
        } else if url == "sqlite" {
            let file =
                default_file().ok_or_else(|| invalid(&"neither XDG_DATA_HOME nor HOME is set"))?;
            if let Some(folder) = file.parent() {
                std::fs::create_dir_all(folder)
                    .map_err(|e| invalid(&format!("{}: {e}", folder.display())))?;
            }
            (sqlite_url(&file.display().to_string()), Dialect::Sqlite)
        } else if let Some(path) = url.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() || path.contains([':', '?']) {
                return Err(invalid(&"got sqlite: without the path of a file"));
            }
            (sqlite_url(path), Dialect::Sqlite)
        } else {
            // The URL may hold a password: only its scheme is repeated.
            let scheme = url.split(':').next().unwrap_or_default();
            return Err(invalid(&format!("got the scheme {scheme:?}")));
        };
        let options = AnyPoolOptions::new()
            .max_connections(match dialect {
                // SQLite has one writer; more would only wait for each other.
                Dialect::Sqlite => 2,
                Dialect::Postgres => 4,
            })
            .acquire_timeout(timeout)
            .idle_timeout(Duration::from_secs(600))
            .before_acquire(|connection, _| {
                // After an error of the disk SQLite rolls back by itself, which sqlx does not notice: it would refuse
                // every further transaction on that connection.
                let is_usable = !connection.is_in_transaction();
                Box::pin(async move { Ok(is_usable) })
            })
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    if dialect == Dialect::Sqlite {
                        // A commit survives the process, though perhaps not the machine's power.
                        connection
                            .execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")
                            .await?;
                    }
                    Ok(())
                })
            });
        let pool = options
            .connect_lazy(&url)
            .map_err(|error| invalid(&error))?;
        Ok(Database {
            pool,
            dialect,
            timeout,
            migrated: Arc::default(),
        })
    }

    /// Brings the tables up to date, once; whoever comes meanwhile waits.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn migrate(&self) -> Result<()> {
        let run = async {
            match self.dialect {
                Dialect::Postgres => MIGRATIONS.run(&self.pool).await?,
                // Nothing locks here by itself: of two processes that begin at once, both would make the same table.
                Dialect::Sqlite => {
                    let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
                    // `run` cannot be in a future that another thread goes on with: its lifetimes are too narrow.
                    MIGRATIONS.run_direct(None, &mut *tx, false).await?;
                    tx.commit().await?;
                }
            }
            Ok(())
        };
        // A migration may take longer than a statement.
        let migrating = self
            .migrated
            .get_or_try_init(|| within(self.timeout * 15, run));
        migrating.await.copied()
    }

    /// Runs `work` within the time limit.
    ///
    /// # Errors
    /// As `work`; `Unavailable` when it takes too long.
    pub async fn limited<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        within(self.timeout, work).await
    }

    #[must_use]
    pub fn pool(&self) -> &AnyPool {
        &self.pool
    }

    /// Adds the place of a statement's value `number`, from 1 on. SQLite's have no numbers, which would be names: sqlx
    /// asks for each place's, and SQLite looks through all of them for it.
    pub(crate) fn push_place(&self, statement: &mut String, number: usize) {
        match self.dialect {
            Dialect::Sqlite => statement.push('?'),
            Dialect::Postgres => {
                // Writing to a String cannot fail.
                let _ = write!(statement, "${number}");
            }
        }
    }

    /// A transaction that may write from its first statement on.
    pub(crate) async fn begin(&self) -> Result<Tx> {
        Ok(self
            .pool
            .begin_with(match self.dialect {
                // Without it two readers that become writers at once would refuse each other.
                Dialect::Sqlite => "BEGIN IMMEDIATE",
                Dialect::Postgres => "BEGIN",
            })
            .await?)
    }

    /// A transaction that only reads.
    pub(crate) async fn begin_reading(&self) -> Result<Tx> {
        Ok(self.pool.begin().await?)
    }

    /// Unix milliseconds by the database's clock, the one clock that all gateways share.
    pub(crate) async fn now_ms(&self, tx: &mut Tx) -> Result<i64> {
        let row = sqlx::query(match self.dialect {
            Dialect::Sqlite => {
                "SELECT CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS BIGINT)"
            }
            Dialect::Postgres => {
                "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"
            }
        })
        .fetch_one(&mut **tx)
        .await?;
        Ok(row.try_get(0)?)
    }

    pub async fn close(&self) {
        let _ = tokio::time::timeout(self.timeout, self.pool.close()).await;
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(AccountsError::Unavailable(format!(
            "no answer within {} s",
            limit.as_secs_f64()
        )))
    })
}

fn sqlite_url(path: &str) -> String {
    format!("sqlite:{path}?mode=rwc")
}

fn default_file() -> Option<PathBuf> {
    let folder = match std::env::var_os("XDG_DATA_HOME") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder),
        _ => PathBuf::from(std::env::var_os("HOME")?).join(".local/share"),
    };
    Some(folder.join("scalellm").join("accounts.db"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_url_that_cannot_be_is_refused_without_its_password() {
        for bad in ["mysql://me:secret@host/x", "sqlite:", "", "secret"] {
            let message = Database::open(bad, Duration::from_secs(1))
                .unwrap_err()
                .to_string();
            assert!(message.starts_with("database_url"), "{message}");
            assert!(!message.contains("me:secret"), "{message}");
        }
    }
}
