//! Fresh databases, and gateways' accounts on them.

use std::sync::Arc;
use std::time::Duration;

use scalellm_accounts::{Accounts, Denied, Key, KeyState, Limits, NewKey, Settings};

/// A fresh database: the tables are made by whoever opens it first.
pub struct Fresh {
    pub url: String,
    _folder: tempfile::TempDir,
}

pub async fn fresh() -> Fresh {
    let folder = tempfile::tempdir().unwrap();
    let url = match std::env::var("SCALELLM_TEST_POSTGRES") {
        Err(_) => format!("sqlite:{}", folder.path().join("accounts.db").display()),
        Ok(server) => {
            let name = format!("test_{:016x}", rand::random::<u64>());
            sqlx::any::install_default_drivers();
            let pool = sqlx::AnyPool::connect(&format!("{server}/postgres"))
                .await
                .unwrap();
            let create = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
            sqlx::query(create).execute(&pool).await.unwrap();
            format!("{server}/{name}")
        }
    };
    Fresh {
        url,
        _folder: folder,
    }
}

pub fn settings(url: &str) -> Settings {
    Settings {
        database_url: url.to_owned(),
        // A busy machine must not look like a database that is down.
        timeout: Duration::from_secs(30),
        usage_interval: Duration::from_millis(20),
        // Some of what is written here is old.
        usage_kept: Duration::from_secs(100 * 366 * 24 * 3600),
        ..Settings::default()
    }
}

pub async fn started(url: &str) -> Accounts {
    let accounts = Accounts::start(settings(url)).unwrap();
    while accounts.anonymous() == Err(Denied::Unavailable) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    accounts
}

pub async fn key(accounts: &Accounts, limits: Limits) -> (Key, String, Arc<KeyState>) {
    let new = NewKey {
        name: "test".to_owned(),
        limits,
        ..NewKey::default()
    };
    let (key, secret) = accounts.create_key(&new).await.unwrap();
    let state = accounts.authenticate(&secret).await.unwrap();
    (key, secret, state)
}
