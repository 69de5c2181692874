//! Counts of what was tried again, and why it was not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::metrics::{Histogram, family};

/// Counts by a reason out of a short, fixed list.
#[derive(Debug, Default)]
struct ByReason(Mutex<BTreeMap<&'static str, u64>>);

impl ByReason {
    fn count(&self, reason: &'static str) {
        *self.0.lock().entry(reason).or_insert(0) += 1;
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        family(out, name, "counter", help);
        for (reason, count) in &*self.0.lock() {
            let _ = writeln!(out, "{name}{{reason=\"{reason}\"}} {count}");
        }
    }
}

#[derive(Debug, Default)]
pub struct FaultMetrics {
    retries: AtomicU64,
    hedges: AtomicU64,
    hedges_won: AtomicU64,
    replays: ByReason,
    not_replayed: ByReason,
    waiting: Arc<AtomicU64>,
    pause: Histogram,
    breakers_opened: AtomicU64,
}

/// A choice that waits for a replica to go on at, until dropped.
#[derive(Debug)]
pub struct Waiting(Arc<AtomicU64>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl FaultMetrics {
    pub fn retried(&self) {
        self.retries.fetch_add(1, Relaxed);
    }

    /// A choice, or a request to an upstream, was asked for at a second one beside the first.
    pub fn hedged(&self) {
        self.hedges.fetch_add(1, Relaxed);
    }

    /// The second one was the first to answer.
    pub fn hedge_won(&self) {
        self.hedges_won.fetch_add(1, Relaxed);
    }

    /// A choice goes on at a replica; `reason` is why it had to.
    pub fn replayed(&self, reason: &'static str) {
        self.replays.count(reason);
    }

    /// A choice whose replica died ends with an error.
    pub fn not_replayed(&self, reason: &'static str) {
        self.not_replayed.count(reason);
    }

    #[must_use]
    pub fn waits(&self) -> Waiting {
        self.waiting.fetch_add(1, Relaxed);
        Waiting(Arc::clone(&self.waiting))
    }

    /// From the loss to the next output.
    pub fn paused_us(&self, us: u64) {
        self.pause.observe_us(us);
    }

    pub fn breaker_opened(&self) {
        self.breakers_opened.fetch_add(1, Relaxed);
    }

    pub fn write(&self, out: &mut String) {
        for (name, kind, help, value) in [
            (
                "scalellm_retries_total",
                "counter",
                "Requests sent to a second replica, because the first refused them, or to a second upstream.",
                self.retries.load(Relaxed),
            ),
            (
                "scalellm_hedges_total",
                "counter",
                "Requests sent to a second replica or upstream beside the first, because that had said nothing for long.",
                self.hedges.load(Relaxed),
            ),
            (
                "scalellm_hedges_won_total",
                "counter",
                "Of them, those that the second one answered first.",
                self.hedges_won.load(Relaxed),
            ),
            (
                "scalellm_breakers_opened_total",
                "counter",
                "How often a replica failed so much that it got no more requests for a while.",
                self.breakers_opened.load(Relaxed),
            ),
            (
                "scalellm_replays_waiting",
                "gauge",
                "Choices whose replica died and that have not gone on yet.",
                self.waiting.load(Relaxed),
            ),
        ] {
            family(out, name, kind, help);
            let _ = writeln!(out, "{name} {value}");
        }
        self.replays.write(
            out,
            "scalellm_replays_total",
            "Choices that went on at a replica after theirs died, by what became of it.",
        );
        self.not_replayed.write(
            out,
            "scalellm_replays_failed_total",
            "Choices whose replica died and that could not go on, by what was in the way.",
        );
        let name = "scalellm_replay_pause_seconds";
        family(
            out,
            name,
            "histogram",
            "From the loss of a choice's replica to its next token.",
        );
        self.pause.write(out, name, "");
    }
}
