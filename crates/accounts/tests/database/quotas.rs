//! What keys may spend, here and at other gateways.

use std::sync::Arc;
use std::time::Duration;

use scalellm_accounts::{Accounts, Denied, Limits, Quota, Settings, WhenDown, slice};

use crate::support::{fresh, key, settings, started};

#[tokio::test]
async fn requests_beyond_the_minutes_are_refused_with_a_time() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    let limits = Limits {
        requests_per_minute: Some(3),
        ..Limits::default()
    };
    let (_, _, state) = key(&accounts, limits).await;
    // Up to three windows may be touched if the minute ends meanwhile.
    let mut let_in = 0;
    let denied = loop {
        match accounts.enter(&state).await {
            Ok(_) => let_in += 1,
            Err(denied) => break denied,
        }
    };
    assert!((3..=6).contains(&let_in), "{let_in}");
    let Denied::Quota {
        quota,
        limit,
        retry_after,
        ..
    } = denied
    else {
        panic!("{denied:?}");
    };
    assert_eq!((quota, limit), (Quota::RequestsPerMinute, 3));
    assert!((1..=60).contains(&retry_after.as_secs()));
}

#[tokio::test]
async fn tokens_that_were_not_used_come_back() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    let limits = Limits {
        tokens_per_month: Some(1000),
        ..Limits::default()
    };
    let (_, _, state) = key(&accounts, limits).await;
    for _ in 0..10 {
        let mut reservation = accounts.enter(&state).await.unwrap();
        accounts
            .reserve_tokens(&mut reservation, 550)
            .await
            .unwrap();
        reservation.used(50);
    }
    let mut reservation = accounts.enter(&state).await.unwrap();
    let denied = accounts
        .reserve_tokens(&mut reservation, 501)
        .await
        .unwrap_err();
    assert!(
        matches!(
            denied,
            Denied::Quota {
                quota: Quota::TokensPerMonth,
                ..
            }
        ),
        "{denied:?}"
    );
    assert!(matches!(
        accounts.reserve_tokens(&mut reservation, 1001).await,
        Err(Denied::TooMuch { .. })
    ));
    accounts
        .reserve_tokens(&mut reservation, 500)
        .await
        .unwrap();
}

#[tokio::test]
async fn concurrent_requests_are_counted_while_they_last() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    let limits = Limits {
        concurrency: Some(2),
        ..Limits::default()
    };
    let (_, _, state) = key(&accounts, limits).await;
    let first = accounts.enter(&state).await.unwrap();
    let second = accounts.enter(&state).await.unwrap();
    assert!(matches!(
        accounts.enter(&state).await,
        Err(Denied::Quota {
            quota: Quota::Concurrency,
            ..
        })
    ));
    drop(first);
    let third = accounts.enter(&state).await.unwrap();
    drop((second, third));
    for _ in 0..50 {
        drop(accounts.enter(&state).await.unwrap());
    }
}

/// Both gateways let in what they can at once; nothing that was reserved is given back.
#[tokio::test(flavor = "multi_thread")]
async fn two_gateways_share_one_budget_within_the_bound() {
    const LIMIT: i64 = 6400;
    let fresh = fresh().await;
    let gateways = [
        Arc::new(started(&fresh.url).await),
        Arc::new(started(&fresh.url).await),
    ];
    let limits = Limits {
        tokens_per_month: Some(LIMIT),
        ..Limits::default()
    };
    let (_, secret, _) = key(&gateways[0], limits).await;
    let mut clients = Vec::new();
    for client in 0..8 {
        let accounts = Arc::clone(&gateways[client % 2]);
        let secret = secret.clone();
        clients.push(tokio::spawn(async move {
            let state = accounts.authenticate(&secret).await.unwrap();
            let mut let_in = 0;
            loop {
                let mut reservation = accounts.enter(&state).await.unwrap();
                match accounts.reserve_tokens(&mut reservation, 17).await {
                    Ok(()) => let_in += 17,
                    Err(Denied::Quota { .. }) => return let_in,
                    Err(other) => panic!("{other:?}"),
                }
                reservation.used(17);
            }
        }));
    }
    let mut total = 0;
    for client in clients {
        total += client.await.unwrap();
    }
    let bound = LIMIT + 2 * slice(Quota::TokensPerMonth, LIMIT);
    assert!(total <= bound, "{total} tokens, {bound} allowed");
    // What one gateway still leases when the other is refused is at most its slice.
    let least = LIMIT - 2 * slice(Quota::TokensPerMonth, LIMIT) - 17;
    assert!(total >= least, "{total} tokens of {LIMIT}");
}

#[tokio::test]
async fn leases_go_back_when_a_gateway_ends() {
    let fresh = fresh().await;
    let limits = Limits {
        tokens_per_month: Some(6400),
        ..Limits::default()
    };
    let first = started(&fresh.url).await;
    let (_, secret, state) = key(&first, limits).await;
    let mut reservation = first.enter(&state).await.unwrap();
    first.reserve_tokens(&mut reservation, 1000).await.unwrap();
    reservation.used(400);
    drop(reservation);
    first.shutdown().await;
    let second = started(&fresh.url).await;
    let state = second.authenticate(&secret).await.unwrap();
    let mut reservation = second.enter(&state).await.unwrap();
    second.reserve_tokens(&mut reservation, 6000).await.unwrap();
}

#[tokio::test]
async fn without_its_database_a_gateway_does_as_it_was_told() {
    for when_down in [WhenDown::Open, WhenDown::Closed] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none").join("accounts.db");
        let accounts = Accounts::start(Settings {
            when_down,
            timeout: Duration::from_millis(300),
            ..settings(&format!("sqlite:{}", path.display()))
        })
        .unwrap();
        let fresh = fresh().await;
        let (_, secret, state) = key(
            &started(&fresh.url).await,
            Limits {
                tokens_per_day: Some(100),
                ..Limits::default()
            },
        )
        .await;
        // A key that was never seen is refused either way.
        assert_eq!(
            accounts.authenticate(&secret).await.unwrap_err(),
            Denied::Unavailable
        );
        assert_eq!(accounts.anonymous(), Err(Denied::Unavailable));
        let mut reservation = accounts.enter(&state).await.unwrap();
        let reserved = accounts.reserve_tokens(&mut reservation, 50).await;
        match when_down {
            WhenDown::Open => assert_eq!(reserved, Ok(())),
            WhenDown::Closed => assert_eq!(reserved, Err(Denied::Unavailable)),
        }
    }
}
