//! Who may come in and what they may spend: the face that the gateway sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::clerk::{Clerk, Job};
use crate::database::Database;
use crate::error::{AccountsError, Result};
use crate::key::{Key, NewKey};
use crate::keyring::{KeyState, Keyring, Look, Refused};
use crate::reservation::Reservation;
use crate::secret::SecretHash;
use crate::store;
use crate::usage::{Meters, Writer};

/// Questions to the database that wait to be asked.
const MAX_JOBS: usize = 1024;
/// How long the end may wait for leases to be given back and usage to be written.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// What happens to requests of known keys while the database is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenDown {
    /// They go on, and what they use is charged afterwards.
    Open,
    /// They are refused as soon as what is leased is spent, or the verdict on their key is old.
    Closed,
}

#[derive(Debug, Clone)]
pub struct Settings {
    pub database_url: String,
    pub when_down: WhenDown,
    /// Longest wait for the database, of anybody.
    pub timeout: Duration,
    /// How long a lease on a budget lasts without a sign of its gateway.
    pub lease: Duration,
    /// Usage that a killed gateway may lose: what ended, or was generated, in this last time.
    pub usage_interval: Duration,
    /// Ended requests whose usage is not written yet; more are counted as lost.
    pub usage_queue: usize,
    /// Usage is forgotten after this time.
    pub usage_kept: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            database_url: "sqlite".to_owned(),
            when_down: WhenDown::Open,
            timeout: Duration::from_secs(2),
            lease: Duration::from_secs(30),
            usage_interval: Duration::from_secs(1),
            usage_queue: 65_536,
            usage_kept: Duration::from_secs(400 * 24 * 3600),
        }
    }
}

/// Why a request is not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    Key(Refused),
    /// There are keys here, and the request brought none.
    NoKey,
    Quota {
        quota: crate::key::Quota,
        limit: i64,
        asked: i64,
        left: i64,
        retry_after: Duration,
    },
    /// The request alone is more than the limit.
    TooMuch {
        quota: crate::key::Quota,
        limit: i64,
        asked: i64,
    },
    Unavailable,
}

const KEYS_UNKNOWN: u8 = 0;
const NO_KEYS: u8 = 1;
const KEYS: u8 = 2;

/// What requests and the clerk share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub database: Database,
    pub gateway: String,
    pub lease: Duration,
    pub ring: Keyring,
    keys_exist: AtomicU8,
    down: AtomicBool,
    pub failures: AtomicU64,
}

impl Shared {
    /// Takes in whether the database answered.
    pub fn heard(&self, result: std::result::Result<(), &AccountsError>) {
        let down = result.is_err();
        if let Err(error) = result {
            self.failures.fetch_add(1, Relaxed);
            if !self.down.swap(true, Relaxed) {
                tracing::warn!(%error, "the database of keys and usage is down");
            }
        } else if self.down.swap(down, Relaxed) {
            tracing::info!("the database of keys and usage is back");
        }
    }

    pub fn is_down(&self) -> bool {
        self.down.load(Relaxed)
    }

    pub fn set_keys_exist(&self, any: bool) {
        self.keys_exist
            .fetch_max(if any { KEYS } else { NO_KEYS }, Relaxed);
    }

    pub fn keys_known_to_exist(&self) -> bool {
        self.keys_exist.load(Relaxed) == KEYS
    }
}

pub struct Accounts {
    shared: Arc<Shared>,
    when_down: WhenDown,
    timeout: Duration,
    jobs: mpsc::Sender<Job>,
    meters: Arc<Meters>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Accounts {
    /// Starts the clerk and the usage writer; connects in the background, so a runtime must be there.
    ///
    /// # Errors
    /// `Invalid` for a URL that cannot be.
    pub fn start(settings: Settings) -> Result<Accounts> {
        let database = Database::open(&settings.database_url, settings.timeout)?;
        let shared = Arc::new(Shared {
            database: database.clone(),
            gateway: format!("{:016x}", rand::random::<u64>()),
            lease: settings.lease,
            ring: Keyring::default(),
            keys_exist: AtomicU8::new(KEYS_UNKNOWN),
            down: AtomicBool::new(false),
            failures: AtomicU64::new(0),
        });
        let (jobs, inbox) = mpsc::channel(MAX_JOBS);
        let (meters, records) = Meters::new(&settings);
        let writer = Writer::new(Arc::clone(&shared), Arc::clone(&meters), &settings);
        let tasks = vec![
            tokio::spawn(Clerk::new(Arc::clone(&shared)).run(inbox)),
            tokio::spawn(writer.run(records)),
        ];
        Ok(Accounts {
            shared,
            when_down: settings.when_down,
            timeout: settings.timeout,
            jobs,
            meters,
            tasks: Mutex::new(tasks),
        })
    }

    /// The key of a secret. Waits for the database only for a key that was not seen lately.
    ///
    /// # Errors
    /// `Key`, or `Unavailable` when the database did not say and must be asked.
    pub async fn authenticate(&self, secret: &str) -> std::result::Result<Arc<KeyState>, Denied> {
        let Some(hash) = SecretHash::of(secret) else {
            return Err(Denied::Key(Refused::Unknown));
        };
        let old = match self.shared.ring.look(&hash, Instant::now()) {
            Look::Good(state) => return Ok(state),
            Look::Refused(why) => return Err(Denied::Key(why)),
            Look::Ageing(state) => {
                if self.jobs.try_send(Job::Find(hash, None)).is_err() {
                    self.shared.ring.refresh_failed(&hash);
                }
                return Ok(state);
            }
            Look::Old(state) => Some(state),
            Look::Missing => None,
        };
        let spare = old.filter(|_| self.when_down == WhenDown::Open);
        if self.shared.is_down()
            && let Some(state) = spare
        {
            return Ok(state);
        }
        match self.ask(hash).await {
            Ok(()) => match self.shared.ring.look(&hash, Instant::now()) {
                Look::Good(state) | Look::Ageing(state) => Ok(state),
                Look::Refused(why) => Err(Denied::Key(why)),
                Look::Old(_) | Look::Missing => Err(Denied::Unavailable),
            },
            Err(_) => spare.ok_or(Denied::Unavailable),
        }
    }

    async fn ask(&self, hash: SecretHash) -> Result<()> {
        let unheard = |_| AccountsError::Unavailable("too many questions wait for it".to_owned());
        let (reply, answer) = oneshot::channel();
        self.jobs
            .try_send(Job::Find(hash, Some(reply)))
            .map_err(|_| unheard(()))?;
        // The clerk's own limit is as long, but what waits before it must not add up.
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(answer) => answer.map_err(|_| unheard(()))?,
            Err(_) => Err(unheard(())),
        }
    }

    /// Whether a request without a key may come in: only while there never was one.
    ///
    /// # Errors
    /// `NoKey`; `Unavailable` while the database has not said.
    pub fn anonymous(&self) -> std::result::Result<(), Denied> {
        match self.shared.keys_exist.load(Relaxed) {
            NO_KEYS => Ok(()),
            KEYS => Err(Denied::NoKey),
            _ => Err(Denied::Unavailable),
        }
    }

    /// A place among the key's concurrent requests, and one of its requests this minute.
    ///
    /// # Errors
    /// `Quota`, `TooMuch`, `Unavailable`.
    pub async fn enter(&self, state: &Arc<KeyState>) -> std::result::Result<Reservation, Denied> {
        let mut reservation = Reservation::new(Arc::clone(state));
        for quota in [
            crate::key::Quota::Concurrency,
            crate::key::Quota::RequestsPerMinute,
        ] {
            self.reserve(&mut reservation, quota, 1).await?;
        }
        Ok(reservation)
    }

    /// Reserves a request's tokens: prompt and the longest output.
    ///
    /// # Errors
    /// `Quota`, `TooMuch`, `Unavailable`.
    pub async fn reserve_tokens(
        &self,
        reservation: &mut Reservation,
        tokens: i64,
    ) -> std::result::Result<(), Denied> {
        for quota in crate::key::Quota::OF_TOKENS {
            self.reserve(reservation, quota, tokens).await?;
        }
        Ok(())
    }

    async fn reserve(
        &self,
        reservation: &mut Reservation,
        quota: crate::key::Quota,
        amount: i64,
    ) -> std::result::Result<(), Denied> {
        let patience = Patience {
            jobs: &self.jobs,
            shared: &self.shared,
            timeout: self.timeout,
            when_down: self.when_down,
        };
        reservation.take(quota, amount, &patience).await
    }

    #[must_use]
    pub fn meters(&self) -> &Arc<Meters> {
        &self.meters
    }

    #[must_use]
    pub fn database(&self) -> &Database {
        &self.shared.database
    }

    /// Stores a new key; from now on nobody comes in without one.
    ///
    /// # Errors
    /// `Invalid`, `Unavailable`.
    pub async fn create_key(&self, new: &NewKey) -> Result<(Key, String)> {
        let created = store::create(&self.shared.database, new).await?;
        self.shared.set_keys_exist(true);
        Ok(created)
    }

    /// Revokes a key: here at once, at other gateways within [`crate::keyring::VERDICT_HOLDS`].
    ///
    /// # Errors
    /// `Unknown`, `Unavailable`.
    pub async fn revoke_key(&self, id: &str) -> Result<Key> {
        let key = store::revoke(&self.shared.database, id).await?;
        self.shared.ring.expire(id);
        Ok(key)
    }

    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            database_up: !self.shared.is_down(),
            database_failures: self.shared.failures.load(Relaxed),
            keys_known: self.shared.ring.len(),
            usage_waiting: self.meters.waiting(),
            usage_written: self.meters.written.load(Relaxed),
            usage_lost: self.meters.lost.load(Relaxed),
        }
    }

    /// Gives leases back and writes what usage there is.
    pub async fn shutdown(&self) {
        let tasks = std::mem::take(&mut *self.tasks.lock());
        let _ = self.jobs.send(Job::Close).await;
        self.meters.close();
        let deadline = tokio::time::Instant::now() + CLOSE_WITHIN;
        for mut task in tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                tracing::warn!("the database did not take the last leases or usage in time");
                task.abort();
            }
        }
        self.shared.database.close().await;
    }
}

impl Drop for Accounts {
    fn drop(&mut self) {
        for task in self.tasks.lock().iter() {
            task.abort();
        }
    }
}

/// For metrics.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    pub database_up: bool,
    pub database_failures: u64,
    pub keys_known: usize,
    pub usage_waiting: usize,
    pub usage_written: u64,
    pub usage_lost: u64,
}

/// How a reservation waits.
pub(crate) struct Patience<'a> {
    jobs: &'a mpsc::Sender<Job>,
    shared: &'a Shared,
    pub timeout: Duration,
    pub when_down: WhenDown,
}

impl Patience<'_> {
    pub fn is_down(&self) -> bool {
        self.shared.is_down()
    }

    /// Has the clerk sync this key's ledgers, unless that is asked for already.
    pub fn ask_sync(&self, state: &Arc<KeyState>) {
        if !state.sync_asked.swap(true, Relaxed)
            && self.jobs.try_send(Job::Sync(Arc::clone(state))).is_err()
        {
            // The clerk's tick will find that it is due.
            state.sync_asked.store(false, Relaxed);
        }
    }
}
