//! One gateway's slice of one budget, and the arithmetic of spending it without asking the database.
//!
//! ```text
//! budget of a window        |------------------------ limit ------------------------|
//! in the database           |- charged: used for good | granted to A | granted to B |...
//! this gateway (A)                                    |-- held --|free|
//! ```
//!
//! `held` is what requests have reserved or used. A sync reports it and brings `granted` to `held + slice / 2`. In
//! between, requests may take what is free, and, while the budget is not known to be used up, `slice / 2` more on
//! credit, which the next sync charges. So nobody waits for the database in the steady state, and the budget is
//! overshot by at most one slice for each gateway: by credit, or by what a gateway that died had taken since it last
//! reported (its lease ends, and what it had not reported as held goes back to the budget).

use std::time::{Duration, Instant};

use crate::key::Quota;

/// A refused request asks the database again only after this time.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// The largest amount by which one gateway can overshoot a budget of `limit`.
#[must_use]
pub const fn slice(quota: Quota, limit: i64) -> i64 {
    match quota {
        Quota::Concurrency | Quota::RequestsPerMinute | Quota::TokensPerMinute => limit / 16,
        Quota::TokensPerDay | Quota::TokensPerMonth => limit / 64,
    }
}

#[derive(Debug)]
pub struct Ledger {
    quota: Quota,
    limit: i64,
    window: Option<Window>,
    /// Counts windows, so that a reservation is settled only in its own.
    epoch: u64,
    granted: i64,
    held: i64,
    /// Of `held`, what the database was told last.
    reported: i64,
    /// For requests that wait for the next sync.
    wanted: i64,
    /// The last sync granted less than it was asked for.
    exhausted: bool,
    /// Budget left for everybody at the last sync.
    left: i64,
    synced_at: Option<Instant>,
    /// Afterwards others may have been given what is free here.
    lease_ends: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    start_ms: i64,
    /// `None` never ends.
    ends: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Reserved, in this epoch.
    Yes(u64),
    /// The next sync will tell; [`Ledger::want`] makes it ask for enough.
    Wait,
    /// The budget is used up until its window ends.
    Exhausted,
    /// More than the whole budget.
    TooMuch,
}

/// What a sync tells the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    pub quota: Quota,
    pub limit: i64,
    pub window_start_ms: Option<i64>,
    pub held: i64,
    pub reported: i64,
    /// For requests that wait for the answer: the database counts it as held, so that a lease that ends early never
    /// gives back what these were given.
    pub wanted: i64,
    /// To be free after the sync.
    pub free: i64,
    /// The lease is given up.
    pub close: bool,
    epoch: u64,
}

/// What the database answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub window_start_ms: i64,
    /// Time until the window ends, from when the answer was made; `None` never ends.
    pub window_left: Option<Duration>,
    pub granted: i64,
    /// What this gateway holds: what was reported, and what the database knew from before.
    pub held: i64,
    /// The same with what was wanted, as far as it was granted.
    pub reported: i64,
    pub exhausted: bool,
    /// Of the budget, after this grant.
    pub left: i64,
}

impl Ledger {
    #[must_use]
    pub fn new(quota: Quota, limit: i64) -> Ledger {
        Ledger {
            quota,
            limit,
            window: None,
            epoch: 0,
            granted: 0,
            held: 0,
            reported: 0,
            wanted: 0,
            exhausted: false,
            left: limit,
            synced_at: None,
            lease_ends: None,
        }
    }

    #[must_use]
    pub fn limit(&self) -> i64 {
        self.limit
    }

    pub fn set_limit(&mut self, limit: i64) {
        self.limit = limit;
    }

    /// Reserves `amount` if that needs no answer of the database's.
    pub fn take(&mut self, amount: i64, now: Instant) -> Taken {
        self.roll(now);
        if amount > self.limit {
            return Taken::TooMuch;
        }
        let live = self.lease_ends.is_none_or(|ends| now < ends);
        let free = if live {
            self.free()
        } else {
            self.free().min(0)
        };
        let credit = if self.exhausted || self.synced_at.is_none() {
            0
        } else {
            self.slice() / 2
        };
        if free - amount >= -credit {
            self.held += amount;
            return Taken::Yes(self.epoch);
        }
        let fresh = self
            .synced_at
            .is_some_and(|at| now.saturating_duration_since(at) < ASK_AGAIN);
        if self.exhausted && fresh {
            Taken::Exhausted
        } else {
            Taken::Wait
        }
    }

    /// Reserves `amount` without asking whether there is any: the database is down, and the operator chose to go on.
    pub fn force(&mut self, amount: i64, now: Instant) -> u64 {
        self.roll(now);
        self.held += amount;
        self.epoch
    }

    /// Settles a reservation: it took `used` of what was `reserved`.
    pub fn settle(&mut self, epoch: u64, reserved: i64, used: i64) {
        if epoch == self.epoch {
            self.held += used - reserved;
        }
    }

    /// Makes the next sync ask for more, until it is called with the negative.
    pub fn want(&mut self, amount: i64) {
        self.wanted += amount;
    }

    /// Whether a sync is due: too little is free, or so much that others should have it.
    #[must_use]
    pub fn is_due(&self) -> bool {
        let slice = self.slice();
        let free = self.free();
        self.wanted > 0
            || (!self.exhausted && free < slice / 4)
            || free > self.target() + slice
            || (self.exhausted && free > 0)
    }

    /// Whether the lease has to be renewed so that it does not end.
    #[must_use]
    pub fn is_ageing(&self, now: Instant, lease: Duration) -> bool {
        self.lease_ends
            .is_some_and(|ends| ends.saturating_duration_since(now) < lease * 2 / 3)
    }

    /// What to tell the database; with `close` all that is free goes back.
    pub fn report(&mut self, close: bool, now: Instant) -> Report {
        self.roll(now);
        Report {
            quota: self.quota,
            limit: self.limit,
            window_start_ms: self.window.map(|window| window.start_ms),
            held: self.held,
            reported: self.reported,
            wanted: self.wanted,
            free: if close { 0 } else { self.target() },
            close,
            epoch: self.epoch,
        }
    }

    /// Takes in the answer to `report`, which was `asked` for at that time.
    pub fn apply(
        &mut self,
        report: &Report,
        answer: &Answer,
        asked: Instant,
        now: Instant,
        lease: Duration,
    ) {
        if report.epoch != self.epoch {
            // The window ended while the answer was on its way: it tells of nothing that still counts.
            return;
        }
        // Reserved or settled while the answer was on its way.
        let since = self.held - report.held;
        if report
            .window_start_ms
            .is_some_and(|start_ms| start_ms != answer.window_start_ms)
        {
            self.epoch += 1;
        }
        self.window = Some(Window {
            start_ms: answer.window_start_ms,
            // From now and not from `asked`: late rather than early, so that the database is always there first.
            ends: answer.window_left.map(|left| now + left),
        });
        self.granted = answer.granted;
        self.held = answer.held + since;
        self.reported = answer.reported;
        self.exhausted = answer.exhausted;
        self.left = answer.left;
        self.synced_at = Some(now);
        self.lease_ends = Some(asked + lease);
    }

    /// As clients are told: what is left and when it is whole again.
    #[must_use]
    pub fn remaining(&self, now: Instant) -> (i64, Duration) {
        let ends = self.window.and_then(|window| window.ends);
        let over = ends.is_some_and(|ends| now >= ends);
        let left = if over || self.synced_at.is_none() {
            self.limit
        } else {
            (self.left + self.free()).clamp(0, self.limit)
        };
        let reset = ends.map_or(Duration::ZERO, |ends| ends.saturating_duration_since(now));
        (left, reset)
    }

    fn free(&self) -> i64 {
        self.granted - self.held
    }

    fn slice(&self) -> i64 {
        slice(self.quota, self.limit)
    }

    fn target(&self) -> i64 {
        self.slice() - self.slice() / 2
    }

    fn roll(&mut self, now: Instant) {
        let over = self
            .window
            .and_then(|window| window.ends)
            .is_some_and(|ends| now >= ends);
        if over {
            self.window = None;
            self.epoch += 1;
            self.granted = 0;
            self.held = 0;
            self.reported = 0;
            self.exhausted = false;
            self.lease_ends = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);

    fn synced(limit: i64, granted: i64, exhausted: bool) -> (Ledger, Instant) {
        let now = Instant::now();
        let mut ledger = Ledger::new(Quota::TokensPerMinute, limit);
        let report = ledger.report(false, now);
        let answer = Answer {
            window_start_ms: 60_000,
            window_left: Some(Duration::from_secs(40)),
            granted,
            held: 0,
            reported: 0,
            exhausted,
            left: limit - granted,
        };
        ledger.apply(&report, &answer, now, now, LEASE);
        (ledger, now)
    }

    #[test]
    fn spends_what_is_granted_and_half_a_slice_on_credit() {
        let (mut ledger, now) = synced(1600, 50, false);
        assert!(matches!(ledger.take(50, now), Taken::Yes(_)));
        assert!(matches!(ledger.take(50, now), Taken::Yes(_)));
        assert!(ledger.is_due());
        assert_eq!(ledger.take(1, now), Taken::Wait);
        assert_eq!(ledger.take(1601, now), Taken::TooMuch);
    }

    #[test]
    fn gives_no_credit_before_the_first_answer_or_when_exhausted() {
        let mut fresh = Ledger::new(Quota::TokensPerMinute, 1600);
        assert_eq!(fresh.take(1, Instant::now()), Taken::Wait);
        let (mut ledger, now) = synced(1600, 10, true);
        assert_eq!(ledger.take(11, now), Taken::Exhausted);
        assert!(matches!(ledger.take(10, now), Taken::Yes(_)));
        assert_eq!(ledger.take(1, now + ASK_AGAIN), Taken::Wait);
    }

    #[test]
    fn settling_gives_back_in_its_own_window_only() {
        let (mut ledger, now) = synced(1600, 100, false);
        let Taken::Yes(epoch) = ledger.take(100, now) else {
            panic!("100 are free");
        };
        ledger.settle(epoch, 100, 30);
        assert_eq!(ledger.remaining(now).0, 1500 + 70);
        let later = now + Duration::from_secs(41);
        assert!(matches!(ledger.take(20, later), Taken::Yes(_)));
        ledger.settle(epoch, 100, 0);
        assert_eq!(ledger.report(false, later).held, 20);
    }

    #[test]
    fn a_lease_that_ended_is_not_spent() {
        let (mut ledger, now) = synced(1600, 1000, false);
        let later = now + LEASE;
        assert_eq!(ledger.take(51, later), Taken::Wait);
        assert!(matches!(ledger.take(50, later), Taken::Yes(_)));
    }

    #[test]
    fn a_small_budget_is_exact() {
        let (mut ledger, now) = synced(15, 0, false);
        assert_eq!(ledger.take(1, now), Taken::Wait);
        ledger.want(1);
        let report = ledger.report(false, now);
        assert_eq!((report.wanted, report.free), (1, 0));
    }
}
