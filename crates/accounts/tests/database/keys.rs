//! From a key's creation to its revocation.

use std::time::Duration;

use scalellm_accounts::{AccountsError, Database, Denied, Limits, NewKey, Refused, store};
use tokio::task::JoinSet;

use crate::support::{fresh, key, started};

#[tokio::test]
async fn a_key_lives_from_creation_to_revocation() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    assert_eq!(accounts.anonymous(), Ok(()));
    let new = NewKey {
        name: "laptop".to_owned(),
        tenant: "acme".to_owned(),
        models: Some(vec!["demo".to_owned()]),
        limits: Limits {
            tokens_per_day: Some(1 << 40),
            ..Limits::default()
        },
        ..NewKey::default()
    };
    let (key, secret) = accounts.create_key(&new).await.unwrap();
    assert_eq!(accounts.anonymous(), Err(Denied::NoKey));
    let state = accounts.authenticate(&secret).await.unwrap();
    assert_eq!(*state.key(), key);
    assert_eq!(
        store::list(accounts.database()).await.unwrap(),
        std::slice::from_ref(&key)
    );
    let revoked = accounts.revoke_key(&key.id).await.unwrap();
    assert!(revoked.revoked_at_ms.is_some());
    let refused = accounts.authenticate(&secret).await.unwrap_err();
    assert_eq!(refused, Denied::Key(Refused::Revoked));
    assert_eq!(
        accounts.revoke_key(&key.id).await.unwrap().revoked_at_ms,
        revoked.revoked_at_ms
    );
    assert!(matches!(
        accounts.revoke_key("key-none").await,
        Err(AccountsError::Unknown(_))
    ));
    // A revoked key was a key: the door stays shut, here and at a gateway that starts now.
    assert_eq!(started(&fresh.url).await.anonymous(), Err(Denied::NoKey));
}

#[tokio::test]
async fn strangers_are_refused() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    let other = crate::support::fresh().await;
    let (_, stranger, _) = key(&started(&other.url).await, Limits::default()).await;
    for secret in ["", "alpha", &stranger, &stranger] {
        let refused = accounts.authenticate(secret).await.unwrap_err();
        assert_eq!(refused, Denied::Key(Refused::Unknown), "{secret}");
    }
}

#[tokio::test]
async fn those_who_open_a_new_database_at_once_make_its_tables_once() {
    for _ in 0..8 {
        let fresh = fresh().await;
        let mut opening = JoinSet::new();
        for _ in 0..4 {
            let database = Database::open(&fresh.url, Duration::from_secs(30)).unwrap();
            opening.spawn(async move { database.migrate().await });
        }
        for outcome in opening.join_all().await {
            outcome.unwrap();
        }
    }
}
