//! Keeps work away from a replica that fails what it is given.
//!
//! ```text
//!          enough failures, and at least half of what was tried, within the window
//!  Closed -----------------------------------------------------------------> Open
//!    ^                                                                        |  open_ms, doubled each time in a row
//!    '-- a success -- Probing: a few requests each open_ms <------------------'
//!                        '---- a failure: Open again
//! ```
//!
//! Only the replica's own failures are to be reported: what a client did wrong, or gave up, is neither a success nor
//! a failure. A restarted replica begins anew.

/// Parts of the window that are forgotten one at a time.
const SLOTS: usize = 10;
/// The longest opening, in multiples of the first.
const MAX_OPENINGS: f64 = 16.0;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BreakerSettings {
    /// What is older than this does not count.
    pub window_ms: f64,
    /// Failures within the window, at the least, that open it.
    pub failures: u32,
    /// How long it stays open the first time.
    pub open_ms: f64,
    /// Requests that try a replica whose breaker was open, each `open_ms`.
    pub probes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Closed,
    Open { until_ms: f64 },
    Probing { since_ms: f64, left: u32 },
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    number: u64,
    succeeded: u32,
    failed: u32,
}

/// The breaker of one replica.
#[derive(Debug)]
pub struct Breaker {
    settings: BreakerSettings,
    epoch: u64,
    state: State,
    open_ms: f64,
    slots: [Slot; SLOTS],
}

impl Breaker {
    #[must_use]
    pub fn new(settings: BreakerSettings) -> Breaker {
        Breaker {
            settings,
            epoch: 0,
            state: State::Closed,
            open_ms: settings.open_ms,
            slots: [Slot::default(); SLOTS],
        }
    }

    #[must_use]
    pub fn settings(&self) -> BreakerSettings {
        self.settings
    }

    /// Whether a request may be sent now to the replica in its start `epoch`.
    pub fn allows(&mut self, epoch: u64, now_ms: f64) -> bool {
        self.enter(epoch);
        let left = self.settings.probes;
        match self.state {
            State::Closed => true,
            State::Open { until_ms } if now_ms < until_ms => false,
            State::Probing { since_ms, left } if now_ms < since_ms + self.settings.open_ms => {
                left > 0
            }
            State::Open { .. } | State::Probing { .. } => {
                self.state = State::Probing {
                    since_ms: now_ms,
                    left,
                };
                left > 0
            }
        }
    }

    /// A request was sent.
    pub fn sent(&mut self) {
        if let State::Probing { left, .. } = &mut self.state {
            *left = left.saturating_sub(1);
        }
    }

    /// The replica answered a request in its start `epoch`.
    pub fn succeeded(&mut self, epoch: u64, now_ms: f64) {
        self.enter(epoch);
        match self.state {
            State::Closed => self.slot(now_ms).succeeded += 1,
            // Of a request that was sent before: it says nothing about now.
            State::Open { .. } => {}
            State::Probing { .. } => self.begin(epoch),
        }
    }

    /// The replica failed a request by itself in its start `epoch`. Returns whether this opened the breaker.
    pub fn failed(&mut self, epoch: u64, now_ms: f64) -> bool {
        self.enter(epoch);
        match self.state {
            State::Open { .. } => return false,
            State::Probing { .. } => {
                let longest_ms = self.settings.open_ms * MAX_OPENINGS;
                self.open_ms = (self.open_ms * 2.0).min(longest_ms);
            }
            State::Closed => {
                self.slot(now_ms).failed += 1;
                let oldest = self.number(now_ms).saturating_sub(SLOTS as u64 - 1);
                let (mut succeeded, mut failed) = (0, 0);
                for slot in self.slots.iter().filter(|slot| slot.number >= oldest) {
                    succeeded += slot.succeeded;
                    failed += slot.failed;
                }
                if failed < self.settings.failures || failed < succeeded {
                    return false;
                }
            }
        }
        self.slots = [Slot::default(); SLOTS];
        self.state = State::Open {
            until_ms: now_ms + self.open_ms,
        };
        true
    }

    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    fn enter(&mut self, epoch: u64) {
        if epoch != self.epoch {
            self.begin(epoch);
        }
    }

    fn begin(&mut self, epoch: u64) {
        *self = Breaker::new(self.settings);
        self.epoch = epoch;
    }

    fn number(&self, now_ms: f64) -> u64 {
        (now_ms / (self.settings.window_ms / SLOTS as f64)) as u64
    }

    fn slot(&mut self, now_ms: f64) -> &mut Slot {
        let number = self.number(now_ms);
        let slot = &mut self.slots[(number % SLOTS as u64) as usize];
        if slot.number != number {
            *slot = Slot {
                number,
                ..Slot::default()
            };
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker() -> Breaker {
        let mut breaker = Breaker::new(BreakerSettings {
            window_ms: 10_000.0,
            failures: 3,
            open_ms: 1_000.0,
            probes: 2,
        });
        assert!(breaker.allows(1, 0.0));
        breaker
    }

    fn opened(at_ms: f64) -> Breaker {
        let mut breaker = breaker();
        assert!(!breaker.failed(1, at_ms) && !breaker.failed(1, at_ms) && breaker.failed(1, at_ms));
        breaker
    }

    #[test]
    fn it_opens_when_enough_fails_and_at_least_half() {
        let mut breaker = opened(5.0);
        assert!(!breaker.allows(1, 1_004.0));
        assert!(breaker.allows(1, 1_005.0));

        let mut mostly_good = self::breaker();
        for _ in 0..10 {
            mostly_good.succeeded(1, 0.0);
        }
        for _ in 0..9 {
            assert!(!mostly_good.failed(1, 1.0));
        }
        assert!(mostly_good.failed(1, 1.0));
    }

    #[test]
    fn what_left_the_window_does_not_count() {
        let mut breaker = breaker();
        assert!(!breaker.failed(1, 0.0) && !breaker.failed(1, 500.0));
        assert!(!breaker.failed(1, 10_600.0));
        assert!(breaker.allows(1, 10_600.0));
        let mut slow = self::breaker();
        assert!(!slow.failed(1, 0.0) && !slow.failed(1, 4_000.0) && slow.failed(1, 9_900.0));
    }

    #[test]
    fn few_probes_decide() {
        let mut breaker = opened(0.0);
        assert!(breaker.allows(1, 1_000.0));
        breaker.sent();
        assert!(breaker.allows(1, 1_000.0));
        breaker.sent();
        assert!(!breaker.allows(1, 1_500.0));
        // Nobody told how they ended: others may try.
        assert!(breaker.allows(1, 2_000.0));
        breaker.succeeded(1, 2_100.0);
        assert!(breaker.is_closed());
        for _ in 0..5 {
            breaker.sent();
            assert!(breaker.allows(1, 2_200.0));
        }
    }

    #[test]
    fn a_failed_probe_opens_it_for_twice_the_time() {
        let mut breaker = opened(0.0);
        assert!(breaker.allows(1, 1_000.0));
        assert!(breaker.failed(1, 1_000.0));
        assert!(!breaker.allows(1, 2_999.0));
        assert!(breaker.allows(1, 3_000.0));
        let mut at_ms = 3_000.0;
        for _ in 0..20 {
            assert!(breaker.failed(1, at_ms));
            at_ms += 16_000.0;
            assert!(breaker.allows(1, at_ms));
        }
    }

    #[test]
    fn late_answers_leave_it_open_and_a_restart_closes_it() {
        let mut breaker = opened(0.0);
        breaker.succeeded(1, 1.0);
        assert!(!breaker.failed(1, 1.0));
        assert!(!breaker.allows(1, 2.0));
        assert!(breaker.allows(2, 3.0));
        assert!(breaker.is_closed());
    }
}
