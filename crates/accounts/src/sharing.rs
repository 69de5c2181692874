//! The bound on what several gateways can spend of one budget, on random histories with deaths among them.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::database::Database;
use crate::key::Quota;
use crate::lease;
use crate::ledger::{Ledger, Taken, slice};

const QUOTA: Quota = Quota::TokensPerMonth;

#[derive(Debug, Clone)]
enum Event {
    Request {
        gateway: usize,
        amount: i64,
    },
    /// The oldest running request ends, having used this share of what it reserved, in percent.
    End {
        gateway: usize,
        percent: i64,
    },
    Sync {
        gateway: usize,
    },
    /// What ran may have used all that it had reserved.
    Die {
        gateway: usize,
    },
}

struct Gateway {
    name: String,
    ledger: Ledger,
    running: Vec<(u64, i64)>,
}

impl Gateway {
    fn new(number: usize, limit: i64) -> Gateway {
        Gateway {
            name: format!("gateway-{number}"),
            ledger: Ledger::new(QUOTA, limit),
            running: Vec::new(),
        }
    }

    async fn sync(&mut self, database: &Database, lease_time: Duration) {
        let now = Instant::now();
        let report = self.ledger.report(false, now);
        let answers = lease::sync(database, &self.name, "key", &[report], lease_time)
            .await
            .unwrap();
        self.ledger
            .apply(&report, &answers[0], now, now, Duration::from_secs(3600));
    }

    async fn request(&mut self, database: &Database, amount: i64) {
        for _ in 0..2 {
            match self.ledger.take(amount, Instant::now()) {
                Taken::Yes(epoch) => return self.running.push((epoch, amount)),
                Taken::Exhausted | Taken::TooMuch => return,
                Taken::Wait => {
                    self.ledger.want(amount);
                    self.sync(database, Duration::from_secs(3600)).await;
                    self.ledger.want(-amount);
                }
            }
        }
    }
}

async fn spent(limit: i64, gateways: usize, events: &[Event]) -> (i64, i64) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("a.db").display());
    let database = Database::open(&url, Duration::from_secs(30)).unwrap();
    database.migrate().await.unwrap();
    let mut alive: Vec<Gateway> = (0..gateways).map(|n| Gateway::new(n, limit)).collect();
    let mut born = gateways;
    let mut used = 0;
    for event in events {
        match event {
            Event::Request { gateway, amount } => {
                alive[gateway % gateways].request(&database, *amount).await;
            }
            Event::End { gateway, percent } => {
                let gateway = &mut alive[gateway % gateways];
                if !gateway.running.is_empty() {
                    let (epoch, amount) = gateway.running.remove(0);
                    let took = amount * percent / 100;
                    gateway.ledger.settle(epoch, amount, took);
                    used += took;
                }
            }
            Event::Sync { gateway } => {
                alive[gateway % gateways]
                    .sync(&database, Duration::from_secs(3600))
                    .await;
            }
            Event::Die { gateway } => {
                let dead =
                    std::mem::replace(&mut alive[gateway % gateways], Gateway::new(born, limit));
                born += 1;
                used += dead.running.iter().map(|(_, amount)| amount).sum::<i64>();
                // Its lease ends now: as if nothing had been heard of it for the lease's time.
                sqlx::query("UPDATE leases SET expires_at = 0 WHERE gateway = $1")
                    .bind(dead.name)
                    .execute(database.pool())
                    .await
                    .unwrap();
            }
        }
    }
    let running = alive.iter().flat_map(|g| &g.running);
    used += running.map(|(_, amount)| amount).sum::<i64>();
    (used, i64::try_from(born).unwrap())
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..3_usize, 1..200_i64).prop_map(|(gateway, amount)| Event::Request { gateway, amount }),
        3 => (0..3_usize, 0..=100_i64).prop_map(|(gateway, percent)| Event::End { gateway, percent }),
        1 => (0..3_usize).prop_map(|gateway| Event::Sync { gateway }),
        1 => (0..3_usize).prop_map(|gateway| Event::Die { gateway }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn overshoot_is_at_most_a_slice_for_each_gateway(
        limit in 64..4000_i64,
        gateways in 1..=3_usize,
        events in proptest::collection::vec(event(), 1..120),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (used, born) = runtime.block_on(spent(limit, gateways, &events));
        let bound = limit + born * slice(QUOTA, limit);
        prop_assert!(used <= bound, "used {used} of {limit}, allowed {bound}");
    }
}
