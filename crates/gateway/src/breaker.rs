//! A breaker that many requests share. One that never opened costs them nothing on their way.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use parking_lot::Mutex;
use scalellm_routing::{Breaker, BreakerSettings};

/// See [`Breaker`], whose functions these are.
pub struct SharedBreaker {
    breaker: Mutex<Breaker>,
    ever_opened: AtomicBool,
}

impl SharedBreaker {
    #[must_use]
    pub fn new(settings: BreakerSettings) -> SharedBreaker {
        SharedBreaker {
            breaker: Mutex::new(Breaker::new(settings)),
            ever_opened: AtomicBool::default(),
        }
    }

    #[must_use]
    pub fn never_opened(&self) -> bool {
        !self.ever_opened.load(Relaxed)
    }

    #[must_use]
    pub fn allows(&self, epoch: u64, now_ms: f64) -> bool {
        self.never_opened() || self.breaker.lock().allows(epoch, now_ms)
    }

    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.never_opened() || self.breaker.lock().is_closed()
    }

    pub fn sent(&self) {
        if !self.never_opened() {
            self.breaker.lock().sent();
        }
    }

    pub fn succeeded(&self, epoch: u64, now_ms: f64) {
        self.breaker.lock().succeeded(epoch, now_ms);
    }

    /// Returns whether this opened it.
    pub fn failed(&self, epoch: u64, now_ms: f64) -> bool {
        let opened = self.breaker.lock().failed(epoch, now_ms);
        if opened {
            self.ever_opened.store(true, Relaxed);
        }
        opened
    }

    /// With other settings it begins anew.
    pub fn set(&self, settings: BreakerSettings) {
        let mut breaker = self.breaker.lock();
        if breaker.settings() != settings {
            *breaker = Breaker::new(settings);
        }
    }
}
