//! What one request has reserved of its key's budgets.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::accounts::{Denied, Patience, WhenDown};
use crate::key::Quota;
use crate::keyring::KeyState;
use crate::ledger::Taken;

/// Settled when it is dropped, once, with what was used by then.
#[derive(Debug)]
pub struct Reservation {
    state: Arc<KeyState>,
    taken: [Option<Share>; Quota::ALL.len()],
    used_tokens: i64,
}

#[derive(Debug, Clone, Copy)]
struct Share {
    epoch: u64,
    amount: i64,
}

impl Reservation {
    pub(crate) fn new(state: Arc<KeyState>) -> Reservation {
        Reservation {
            state,
            taken: [None; Quota::ALL.len()],
            used_tokens: 0,
        }
    }

    /// What the request has used, prompt and output.
    pub fn used(&mut self, tokens: i64) {
        self.used_tokens = tokens;
    }

    pub(crate) async fn take(
        &mut self,
        quota: Quota,
        amount: i64,
        patience: &Patience<'_>,
    ) -> Result<(), Denied> {
        let deadline = tokio::time::Instant::now() + patience.timeout;
        loop {
            // Subscribed before the ledger is asked, so that a sync in between is not missed.
            let mut syncs = self.state.syncs.subscribe();
            let now = Instant::now();
            let Some((taken, limit, due)) = self.state.ledger(quota, |ledger| {
                let taken = ledger.take(amount, now);
                (taken, ledger.limit(), ledger.is_due())
            }) else {
                return Ok(());
            };
            match taken {
                Taken::Yes(epoch) => {
                    self.taken[quota as usize] = Some(Share { epoch, amount });
                    if due {
                        patience.ask_sync(&self.state);
                    }
                    return Ok(());
                }
                Taken::TooMuch => {
                    return Err(Denied::TooMuch {
                        quota,
                        limit,
                        asked: amount,
                    });
                }
                Taken::Exhausted => return Err(self.exhausted(quota, amount)),
                Taken::Wait => {}
            }
            let _wanted = Wanted::new(&self.state, quota, amount);
            let heard = !patience.is_down() && {
                patience.ask_sync(&self.state);
                tokio::time::timeout_at(deadline, syncs.changed())
                    .await
                    .is_ok()
            };
            if heard && !patience.is_down() {
                continue;
            }
            if patience.when_down == WhenDown::Closed {
                return Err(Denied::Unavailable);
            }
            if let Some(epoch) = self
                .state
                .ledger(quota, |ledger| ledger.force(amount, Instant::now()))
            {
                self.taken[quota as usize] = Some(Share { epoch, amount });
            }
            return Ok(());
        }
    }

    fn exhausted(&self, quota: Quota, asked: i64) -> Denied {
        let (limit, left, reset) =
            self.state
                .remaining(quota)
                .unwrap_or((0, 0, Duration::from_secs(1)));
        Denied::Quota {
            quota,
            limit,
            asked,
            left,
            // A place among the concurrent requests may be free at any time.
            retry_after: reset.max(Duration::from_secs(1)),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        for quota in Quota::ALL {
            let Some(Share { epoch, amount }) = self.taken[quota as usize].take() else {
                continue;
            };
            let used = match quota {
                Quota::Concurrency => 0,
                Quota::RequestsPerMinute => amount,
                _ => self.used_tokens,
            };
            self.state
                .ledger(quota, |ledger| ledger.settle(epoch, amount, used));
        }
    }
}

/// Makes syncs ask for a waiting request's amount, for as long as it waits.
struct Wanted<'a> {
    state: &'a KeyState,
    quota: Quota,
    amount: i64,
}

impl<'a> Wanted<'a> {
    fn new(state: &'a KeyState, quota: Quota, amount: i64) -> Wanted<'a> {
        state.ledger(quota, |ledger| ledger.want(amount));
        Wanted {
            state,
            quota,
            amount,
        }
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.state
            .ledger(self.quota, |ledger| ledger.want(-self.amount));
    }
}
