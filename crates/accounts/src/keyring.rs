//! The keys that requests have brought lately, and what each of them may still spend here.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::key::{Key, Quota};
use crate::ledger::{Answer, Ledger, Report};
use crate::secret::SecretHash;
use crate::store::Found;

/// A verdict of the database's holds this long; then a revoked key is refused everywhere.
pub const VERDICT_HOLDS: Duration = Duration::from_secs(10);
/// With the database down, and the operator's leave, a key that was good goes on this long.
const GOOD_WITHOUT_DATABASE: Duration = Duration::from_secs(3600);
const MAX_REFUSED: usize = 16_384;
const MAX_KEYS: usize = 65_536;

/// Why a key is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    Unknown,
    Revoked,
    Expired,
}

/// A key in use. There is one of these for each key, so that its ledgers are one.
#[derive(Debug)]
pub struct KeyState {
    key: RwLock<Arc<Key>>,
    ledgers: Mutex<[Option<Ledger>; Quota::ALL.len()]>,
    /// Counts syncs, the failed ones too.
    pub(crate) syncs: watch::Sender<u64>,
    pub(crate) sync_asked: AtomicBool,
    epoch: Instant,
    last_used_ms: AtomicU64,
}

impl KeyState {
    pub(crate) fn new(key: Key) -> Arc<KeyState> {
        let ledger = |quota: Quota| Some(Ledger::new(quota, key.limits.of(quota)?));
        Arc::new(KeyState {
            ledgers: Mutex::new(Quota::ALL.map(ledger)),
            key: RwLock::new(Arc::new(key)),
            syncs: watch::Sender::new(0),
            sync_asked: AtomicBool::new(false),
            epoch: Instant::now(),
            last_used_ms: AtomicU64::new(0),
        })
    }

    #[must_use]
    pub fn key(&self) -> Arc<Key> {
        Arc::clone(&self.key.read())
    }

    pub(crate) fn ledger<T>(&self, quota: Quota, work: impl FnOnce(&mut Ledger) -> T) -> Option<T> {
        self.ledgers.lock()[quota as usize].as_mut().map(work)
    }

    fn used(&self, now: Instant) {
        let ms = now.saturating_duration_since(self.epoch).as_millis();
        self.last_used_ms
            .store(u64::try_from(ms).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn idle_for(&self, now: Instant) -> Duration {
        let last = self.epoch + Duration::from_millis(self.last_used_ms.load(Relaxed));
        now.saturating_duration_since(last)
    }

    pub(crate) fn update(&self, key: Key) {
        let mut ledgers = self.ledgers.lock();
        for quota in Quota::ALL {
            let slot = &mut ledgers[quota as usize];
            match (slot.as_mut(), key.limits.of(quota)) {
                (Some(ledger), Some(limit)) => ledger.set_limit(limit),
                (None, Some(limit)) => *slot = Some(Ledger::new(quota, limit)),
                (_, None) => *slot = None,
            }
        }
        *self.key.write() = Arc::new(key);
    }

    /// Whether a sync is worth its while.
    pub(crate) fn wants_sync(&self, now: Instant, lease: Duration) -> bool {
        let ledgers = self.ledgers.lock();
        ledgers
            .iter()
            .flatten()
            .any(|ledger| ledger.is_due() || ledger.is_ageing(now, lease))
    }

    pub(crate) fn reports(&self, close: bool, now: Instant, lease: Duration) -> Vec<Report> {
        let mut ledgers = self.ledgers.lock();
        ledgers
            .iter_mut()
            .flatten()
            .filter(|ledger| close || ledger.is_due() || ledger.is_ageing(now, lease))
            .map(|ledger| ledger.report(close, now))
            .collect()
    }

    pub(crate) fn apply(
        &self,
        reports: &[Report],
        answers: &[Answer],
        asked: Instant,
        lease: Duration,
    ) {
        let now = Instant::now();
        for (report, answer) in reports.iter().zip(answers) {
            self.ledger(report.quota, |ledger| {
                ledger.apply(report, answer, asked, now, lease);
            });
        }
    }

    /// Limit, what is left of it, and the time until it is whole again, if there is such a limit.
    #[must_use]
    pub fn remaining(&self, quota: Quota) -> Option<(i64, i64, Duration)> {
        self.ledger(quota, |ledger| {
            let (left, reset) = ledger.remaining(Instant::now());
            (ledger.limit(), left, reset)
        })
    }
}

#[derive(Debug, Default)]
pub(crate) struct Keyring {
    keys: RwLock<HashMap<SecretHash, Entry>>,
    refused: Mutex<HashMap<SecretHash, (Refused, Instant)>>,
}

#[derive(Debug)]
struct Entry {
    state: Arc<KeyState>,
    fetched: Instant,
    good_until: Option<Instant>,
    refreshing: AtomicBool,
}

/// What the ring says to a secret.
#[derive(Debug)]
pub(crate) enum Look {
    Good(Arc<KeyState>),
    /// Good, and about to be too old: whoever sees this asks the database meanwhile.
    Ageing(Arc<KeyState>),
    /// Too old to go by, unless the database is down.
    Old(Arc<KeyState>),
    Refused(Refused),
    Missing,
}

impl Keyring {
    pub fn look(&self, hash: &SecretHash, now: Instant) -> Look {
        if let Some(entry) = self.keys.read().get(hash) {
            if entry.good_until.is_some_and(|until| now >= until) {
                return Look::Refused(Refused::Expired);
            }
            let age = now.saturating_duration_since(entry.fetched);
            let state = Arc::clone(&entry.state);
            state.used(now);
            return if age >= GOOD_WITHOUT_DATABASE {
                Look::Missing
            } else if age >= VERDICT_HOLDS {
                Look::Old(state)
            } else if age >= VERDICT_HOLDS / 2 && !entry.refreshing.swap(true, Relaxed) {
                Look::Ageing(state)
            } else {
                Look::Good(state)
            };
        }
        match self.refused.lock().get(hash) {
            Some((why, at)) if now.saturating_duration_since(*at) < VERDICT_HOLDS => {
                Look::Refused(*why)
            }
            _ => Look::Missing,
        }
    }

    /// Takes in what the database said; `state_of` finds the state of a key that is known under this id.
    pub fn put(
        &self,
        hash: SecretHash,
        found: Found,
        state_of: impl FnOnce(Key) -> Arc<KeyState>,
        now: Instant,
    ) {
        let refused = match found {
            Found::Valid(key, left) => {
                let state = state_of(*key);
                state.used(now);
                let entry = Entry {
                    state,
                    fetched: now,
                    good_until: left.map(|left| now + left),
                    refreshing: AtomicBool::new(false),
                };
                let mut keys = self.keys.write();
                // Idle keys leave by `forget`; beyond this many in use at once the database is asked every time.
                if keys.len() < MAX_KEYS || keys.contains_key(&hash) {
                    keys.insert(hash, entry);
                }
                return;
            }
            Found::Revoked => Refused::Revoked,
            Found::Expired => Refused::Expired,
            Found::Missing => Refused::Unknown,
        };
        self.keys.write().remove(&hash);
        let mut map = self.refused.lock();
        if map.len() >= MAX_REFUSED {
            map.clear();
        }
        map.insert(hash, (refused, now));
    }

    /// The refresh of this key failed: the next request tries again.
    pub fn refresh_failed(&self, hash: &SecretHash) {
        if let Some(entry) = self.keys.read().get(hash) {
            entry.refreshing.store(false, Relaxed);
        }
    }

    /// Makes the next request with any secret of this key ask the database.
    pub fn expire(&self, key_id: &str) {
        self.keys
            .write()
            .retain(|_, entry| entry.state.key.read().id != key_id);
        self.refused.lock().clear();
    }

    pub fn forget(&self, state: &Arc<KeyState>) {
        self.keys
            .write()
            .retain(|_, entry| !Arc::ptr_eq(&entry.state, state));
    }

    pub fn len(&self) -> usize {
        self.keys.read().len()
    }
}
