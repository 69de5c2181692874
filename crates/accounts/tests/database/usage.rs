//! What requests used, as the database tells it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use scalellm_accounts::report::{self, GroupBy, Query};
use scalellm_accounts::{Accounts, Class, Key, Limits, Live, RUNNING, Usage};

use crate::support::{fresh, settings, started};

struct Running(Mutex<Usage>);

impl Live for Running {
    fn usage(&self) -> Usage {
        self.0.lock().clone()
    }
}

fn acme() -> Key {
    Key {
        id: "key-1".to_owned(),
        shown: String::new(),
        name: String::new(),
        tenant: "acme".to_owned(),
        class: Class::default(),
        weight: 1,
        models: None,
        limits: Limits::default(),
        created_at_ms: 0,
        expires_at_ms: None,
        revoked_at_ms: None,
    }
}

fn usage(model: &str, output_tokens: i64, outcome: &'static str) -> Usage {
    Usage {
        request_id: "same-for-all".into(),
        key: Some(Arc::new(acme())),
        model: model.into(),
        route: "/v1/completions",
        started_at_ms: 1_709_210_096_789,
        duration_us: 10,
        first_token_us: None,
        prompt_tokens: 5,
        cached_tokens: 2,
        output_tokens,
        replays: i64::from(outcome == "ok"),
        status: 200,
        outcome,
        safety: String::new(),
    }
}

#[tokio::test]
async fn every_request_counts_once_while_it_runs_and_when_it_ended() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    let by_model = Query {
        group_by: vec![GroupBy::Model, GroupBy::Day],
        ..Query::default()
    };
    let running = Arc::new(Running(Mutex::new(usage("a", 1, RUNNING))));
    let number = accounts.meters().begin(running.clone());
    running.0.lock().output_tokens = 3;
    let seen = loop {
        let sums = report::usage(accounts.database(), &by_model).await.unwrap();
        match sums.as_slice() {
            [sum] if sum.output_tokens == 3 => break sums,
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert_eq!((seen[0].requests, seen[0].running), (1, 1));
    assert_eq!(seen[0].group["day"], "2024-02-29");
    accounts.meters().end(number, usage("a", 7, "ok"));
    for n in 0..1200 {
        let number = accounts.meters().begin(running.clone());
        let outcome = if n % 3 == 0 { "client_left" } else { "ok" };
        accounts.meters().end(number, usage("b", 1, outcome));
    }
    accounts.shutdown().await;
    assert_eq!(
        (
            accounts.counts().usage_lost,
            accounts.counts().usage_waiting
        ),
        (0, 0)
    );
    let after = started(&fresh.url).await;
    let sums = report::usage(after.database(), &by_model).await.unwrap();
    let shown: Vec<_> = sums
        .iter()
        .map(|s| {
            (
                s.group["model"].as_str().unwrap(),
                s.requests,
                s.failed,
                s.prompt_tokens,
                s.output_tokens,
                s.replays,
            )
        })
        .collect();
    assert_eq!(
        shown,
        [("b", 1200, 400, 6000, 1200, 800), ("a", 1, 0, 5, 7, 1)]
    );
    let nobody = Query {
        tenant: Some("nobody".to_owned()),
        ..Query::default()
    };
    let none = report::usage(after.database(), &nobody).await.unwrap();
    assert_eq!((none.len(), none[0].requests), (1, 0));
}

async fn written(accounts: &Accounts, rows: u64) {
    while accounts.counts().usage_written < rows {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_is_written_twice_counts_once() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    let running = Arc::new(Running(Mutex::new(usage("a", 1, RUNNING))));
    let number = accounts.meters().begin(running);
    accounts.meters().end(number, usage("a", 7, "ok"));
    written(&accounts, 1).await;
    accounts.meters().end(number, usage("a", 9, "error"));
    written(&accounts, 2).await;
    let sums = report::usage(accounts.database(), &Query::default()).await;
    let sums = sums.unwrap();
    assert_eq!(
        (sums[0].requests, sums[0].failed, sums[0].output_tokens),
        (1, 0, 7)
    );
}

#[tokio::test]
async fn usage_of_an_older_version_counts_and_is_forgotten_in_time() {
    let fresh = fresh().await;
    let accounts = started(&fresh.url).await;
    sqlx::query(
        "INSERT INTO requests (id, request_id, key_id, tenant, model, route, started_at, duration_us, prompt_tokens, \
         cached_tokens, output_tokens, status, outcome) \
         VALUES ('00-1', 'r', 'key-1', 'acme', 'a', '/v1/completions', 1709210096789, 1, 5, 0, 4, 200, 'ok')",
    )
    .execute(accounts.database().pool())
    .await
    .unwrap();
    let running = Arc::new(Running(Mutex::new(usage("a", 1, RUNNING))));
    let number = accounts.meters().begin(running.clone());
    accounts.meters().end(number, usage("a", 7, "ok"));
    written(&accounts, 1).await;
    let acmes = Query {
        group_by: vec![GroupBy::Key, GroupBy::Tenant],
        key: Some("key-1".to_owned()),
        since_ms: Some(1_709_210_096_789),
        ..Query::default()
    };
    let sums = report::usage(accounts.database(), &acmes).await.unwrap();
    assert_eq!(
        (sums.len(), sums[0].requests, sums[0].output_tokens),
        (1, 2, 11)
    );
    assert_eq!(sums[0].group["tenant"], "acme");
    accounts.shutdown().await;
    let mut forgetful = settings(&fresh.url);
    forgetful.usage_kept = Duration::ZERO;
    let accounts = Accounts::start(forgetful).unwrap();
    while !report::usage(accounts.database(), &acmes)
        .await
        .unwrap()
        .is_empty()
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
