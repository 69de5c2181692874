//! Whether an upstream can be reached, and whether it does what it is asked: two things, since a server that fails
//! every request may answer questions about its health.
//!
//! ```text
//! reached     connections and questions about its health; a few failures in a row, and it is down until one succeeds
//! breaker     requests; enough failures within a window, and it gets none for a while, then a few to try it
//! refusing    one that has just refused, or was late, comes after the others
//! ```

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use scalellm_routing::BreakerSettings;

use crate::breaker::SharedBreaker;

/// After a refusal that names no time; and the longest that is believed.
const REFUSES_FOR: Duration = Duration::from_secs(1);
const REFUSES_AT_MOST: Duration = Duration::from_secs(10);

/// So many connections or questions must fail one after the other until an upstream counts as down.
const DOWN_AFTER_FAILURES: u32 = 3;
/// One that is never asked is tried again after this time.
const TRY_AGAIN: Duration = Duration::from_secs(5);

pub struct Health {
    began: Instant,
    down: AtomicBool,
    was_well: AtomicBool,
    /// One after the other.
    failures: AtomicU32,
    /// While down: when it was last tried.
    tried: Mutex<Option<Instant>>,
    /// It has refused a request that another may take.
    refuses_until: Mutex<Option<Instant>>,
    breaker: SharedBreaker,
    pub opened: AtomicU64,
    /// How often it came back: its breaker begins anew then.
    epoch: AtomicU64,
}

impl Health {
    #[must_use]
    pub fn new(settings: BreakerSettings) -> Health {
        Health {
            began: Instant::now(),
            down: AtomicBool::default(),
            was_well: AtomicBool::default(),
            failures: AtomicU32::default(),
            tried: Mutex::default(),
            refuses_until: Mutex::default(),
            breaker: SharedBreaker::new(settings),
            opened: AtomicU64::default(),
            epoch: AtomicU64::default(),
        }
    }

    /// Whether it can be reached, or it is time to find out; `asked`: whether anything but requests finds out.
    #[must_use]
    pub fn is_reached(&self, asked: bool) -> bool {
        if !self.down.load(Relaxed) {
            return true;
        }
        let tried = *self.tried.lock();
        !asked && tried.is_none_or(|tried| tried.elapsed() >= TRY_AGAIN)
    }

    /// Whether its breaker lets a request pass.
    #[must_use]
    pub fn allows(&self) -> bool {
        self.breaker.allows(self.epoch.load(Relaxed), self.now_ms())
    }

    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.breaker.is_closed()
    }

    #[must_use]
    pub fn is_refusing(&self) -> bool {
        let until = *self.refuses_until.lock();
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Others are asked first for a while: who refuses at once has the fewest unanswered requests, and who is late makes
    /// each wait.
    pub fn refused(&self, retry_after: Option<Duration>) {
        let pause = retry_after.unwrap_or(REFUSES_FOR).min(REFUSES_AT_MOST);
        *self.refuses_until.lock() = Some(Instant::now() + pause);
    }

    /// A request was sent to it.
    pub fn sent(&self) {
        if self.down.load(Relaxed) {
            // One of them is enough to find out.
            *self.tried.lock() = Some(Instant::now());
        }
        self.breaker.sent();
    }

    /// It said something. Returns whether it was down.
    pub fn reached(&self) -> bool {
        self.failures.store(0, Relaxed);
        self.was_well.store(true, Relaxed);
        let back = self.down.swap(false, Relaxed);
        if back {
            self.epoch.fetch_add(1, Relaxed);
        }
        back
    }

    /// It could not be reached. Returns whether it is down since now.
    pub fn not_reached(&self) -> bool {
        let failures = self.failures.fetch_add(1, Relaxed) + 1;
        // One that has never been well need not show it often.
        if failures < DOWN_AFTER_FAILURES && self.was_well.load(Relaxed) {
            return false;
        }
        *self.tried.lock() = Some(Instant::now());
        !self.down.swap(true, Relaxed)
    }

    /// It began to answer a request well.
    pub fn succeeded(&self) {
        let epoch = self.epoch.load(Relaxed);
        self.breaker.succeeded(epoch, self.now_ms());
    }

    /// With other settings it begins anew.
    pub fn set(&self, settings: BreakerSettings) {
        self.breaker.set(settings);
    }

    /// It failed a request, by no fault of the client's. Returns whether this opened the breaker.
    pub fn failed(&self) -> bool {
        let epoch = self.epoch.load(Relaxed);
        let opened = self.breaker.failed(epoch, self.now_ms());
        if opened {
            self.opened.fetch_add(1, Relaxed);
        }
        opened
    }

    fn now_ms(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        Health::new(BreakerSettings {
            window_ms: 1e6,
            failures: 3,
            open_ms: 1e6,
            probes: 2,
        })
    }

    #[test]
    fn one_that_was_well_is_down_after_a_few_failures_in_a_row() {
        let health = health();
        assert!(!health.reached() && health.is_reached(true));
        assert!(!health.not_reached() && !health.not_reached());
        assert!(!health.reached());
        assert!(!health.not_reached() && !health.not_reached() && health.not_reached());
        assert!(!health.not_reached(), "it is already");
        assert!(!health.is_reached(true) && !health.is_reached(false));
        assert!(health.reached() && health.is_reached(true));
    }

    #[test]
    fn one_that_was_never_well_is_down_at_once_and_tried_by_one_request_at_a_time() {
        let health = health();
        assert!(health.not_reached());
        let long_ago = Instant::now().checked_sub(TRY_AGAIN);
        *health.tried.lock() = long_ago;
        assert!(!health.is_reached(true) && health.is_reached(false));
        health.sent();
        assert!(!health.is_reached(false));
    }

    #[test]
    fn one_that_fails_what_it_is_asked_is_closed_to_requests_until_it_comes_back() {
        let health = health();
        assert!(!health.failed() && !health.failed() && health.allows());
        assert!(health.failed());
        assert!(!health.allows() && !health.is_closed());
        assert!(
            !health.reached(),
            "its health's page says nothing of requests"
        );
        assert!(!health.allows());
        for _ in 0..3 {
            health.not_reached();
        }
        assert!(health.reached());
        assert!(health.allows() && health.is_closed());
    }
}
