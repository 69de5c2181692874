//! A place for each request that generates: at once, after waiting its turn, or not at all.
//!
//! ```text
//! enter --place free, nobody before it--> Permit --drop--> the next one's Permit
//!    |                                                          ^
//!    |--bounded queue (fair_queue.rs) --its turn----------------'
//!    |        |--deadline passed: 504      |--shed for a higher class: 503
//!    |--deadline out of reach: 504
//!    '--queue full: 503
//! ```
//!
//! Batch work never has all places: a share is kept for those who wait for an answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use scalellm_accounts::Class;
use tokio::sync::oneshot;

use crate::error::ApiError;
use crate::fair_queue::{Ask, FairQueue};
use crate::foreign::InFlight;

/// Replicas may come back without any request ending: whoever waits looks again after this time.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Weight of the newest interval in the mean of those between two places given.
const FOLLOW: f64 = 0.1;

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Refusal {
    Full {
        retry_after: Duration,
    },
    Shed,
    /// The deadline passed in the queue.
    Late,
    /// It will have passed before its turn comes.
    OutOfReach {
        predicted: Duration,
    },
}

impl Refusal {
    pub(super) fn reason(self) -> &'static str {
        match self {
            Refusal::Full { .. } => "max_in_flight",
            Refusal::Shed => "shed",
            Refusal::Late => "deadline",
            Refusal::OutOfReach { .. } => "deadline_predicted",
        }
    }

    pub(super) fn error(self, places: usize) -> Box<ApiError> {
        match self {
            Refusal::Full { retry_after } => {
                let message = format!(
                    "all places for running requests (of max_in_flight, {places}) and in the queue are taken"
                );
                ApiError::busy("overloaded", message, whole_seconds(retry_after))
            }
            Refusal::Shed => {
                let message = "given up for a request of a higher class: the queue is full";
                ApiError::busy("overloaded", message, 5)
            }
            Refusal::Late => {
                ApiError::deadline("deadline_ms passed while the request waited for its turn")
            }
            Refusal::OutOfReach { predicted } => ApiError::deadline(format!(
                "deadline_ms would be missed: the wait before this request's turn is predicted to be {} ms",
                predicted.as_millis()
            )),
        }
    }
}

fn whole_seconds(time: Duration) -> u32 {
    time.as_secs_f64().ceil().clamp(1.0, 60.0) as u32
}

/// The places of one model.
pub struct Admission {
    state: Mutex<State>,
}

/// Places there are, and those that are taken.
#[derive(Clone, Copy, Default)]
struct Room {
    places: usize,
    taken: usize,
    taken_by_batch: usize,
    /// Of the places, that batch requests take at most.
    batch_share: f64,
}

#[derive(Default)]
struct State {
    room: Room,
    max_queued: usize,
    queue: FairQueue<oneshot::Sender<Result<Permit, Refusal>>>,
    next_id: u64,
    last_given: Option<Instant>,
    /// Mean time between two places given while somebody waited.
    interval_s: Option<f64>,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Permit {
    admission: Arc<Admission>,
    ask: Ask,
    used_tokens: Option<u64>,
    /// Of a request that upstreams could have got.
    pub(super) turn: Option<InFlight>,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission").finish_non_exhaustive()
    }
}

impl Admission {
    /// Batch requests take at most `batch_share` of the places.
    #[must_use]
    pub fn new(max_queued: usize, batch_share: f64) -> Arc<Admission> {
        let admission = Admission {
            state: Mutex::default(),
        };
        admission.set(max_queued, batch_share);
        Arc::new(admission)
    }

    /// For those who come from now on; nobody who waits is sent away.
    pub fn set(&self, max_queued: usize, batch_share: f64) {
        let mut state = self.state.lock();
        state.max_queued = max_queued;
        state.room.batch_share = batch_share;
    }

    /// A place, when it is this request's turn; `places` tells how many there are now.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn enter(
        self: &Arc<Self>,
        ask: Ask,
        deadline: Option<Instant>,
        places: impl Fn() -> usize,
    ) -> Result<Permit, Refusal> {
        let (place, mut turn) = {
            let mut state = self.state.lock();
            state.room.places = places();
            if state.queue.ahead_of(ask.class) == 0 && state.room.fits(&ask) {
                state.queue.charge(&ask);
                return Ok(self.give(&mut state, ask));
            }
            let predicted = state.predicted_wait(ask.class);
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if let Some(left) = left
                && predicted > left
            {
                return Err(Refusal::OutOfReach { predicted });
            }
            if state.queue.len() >= state.max_queued {
                let Some(shed) = state.queue.shed_below(ask.class) else {
                    return Err(Refusal::Full {
                        retry_after: predicted,
                    });
                };
                // Whoever waited there may have left already.
                let _ = shed.send(Err(Refusal::Shed));
            }
            let (sender, turn) = oneshot::channel();
            let place = QueuePlace {
                admission: self,
                id: state.next_id,
                class: ask.class,
                tenant: ask.tenant.clone(),
            };
            state.next_id += 1;
            state.queue.push(place.id, ask, sender);
            (place, turn)
        };
        // A place may fit that was given back between two looks.
        self.give_next();
        let late = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(late);
        let result = loop {
            tokio::select! {
                biased;
                turn = &mut turn => break turn.unwrap_or(Err(Refusal::Shed)),
                () = &mut late => break Err(Refusal::Late),
                () = tokio::time::sleep(LOOK_AGAIN) => {
                    self.state.lock().room.places = places();
                    self.give_next();
                }
            }
        };
        drop(place);
        result
    }

    #[must_use]
    pub fn taken(&self) -> usize {
        self.state.lock().room.taken
    }

    #[must_use]
    pub fn queued(&self, class: Class) -> usize {
        self.state.lock().queue.len_of(class)
    }

    fn give(self: &Arc<Self>, state: &mut State, ask: Ask) -> Permit {
        state.room.taken += ask.units;
        if ask.class == Class::Batch {
            state.room.taken_by_batch += ask.units;
        }
        Permit {
            admission: Arc::clone(self),
            ask,
            used_tokens: None,
            turn: None,
        }
    }

    /// Gives free places to those whose turn it is.
    fn give_next(self: &Arc<Self>) {
        let mut given = Vec::new();
        {
            let mut state = self.state.lock();
            let state = &mut *state;
            let now = Instant::now();
            while let Some((ask, turn)) = state.queue.pop(|ask| state.room.fits(ask)) {
                state.note_given(now);
                let permit = self.give(state, ask);
                given.push((permit, turn));
            }
            if state.queue.len() == 0 {
                state.last_given = None;
            }
        }
        for (permit, turn) in given {
            // If nobody waits there any more the permit comes back and is dropped, which gives its place on.
            drop(turn.send(Ok(permit)));
        }
    }
}

impl Room {
    fn fits(&self, ask: &Ask) -> bool {
        let units = ask.units.min(self.places);
        let batch_places = ((self.places as f64 * self.batch_share) as usize).max(1);
        self.taken + units <= self.places
            && (ask.class != Class::Batch
                || self.taken_by_batch + units.min(batch_places) <= batch_places)
    }
}

impl State {
    fn predicted_wait(&self, class: Class) -> Duration {
        let ahead = self.queue.ahead_of(class) as f64 + 1.0;
        let wait_s = ahead * self.interval_s.unwrap_or(0.0);
        Duration::try_from_secs_f64(wait_s).unwrap_or(Duration::MAX)
    }

    fn note_given(&mut self, now: Instant) {
        if let Some(last) = self.last_given {
            let took_s = now.saturating_duration_since(last).as_secs_f64();
            let mean_s = self.interval_s.unwrap_or(took_s);
            self.interval_s = Some(mean_s + FOLLOW * (took_s - mean_s));
        }
        self.last_given = Some(now);
    }
}

impl Permit {
    /// What the request really cost, for its tenant's account.
    pub fn used(&mut self, tokens: u64) {
        self.used_tokens = Some(tokens);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.admission.state.lock();
            state.room.taken -= self.ask.units;
            if self.ask.class == Class::Batch {
                state.room.taken_by_batch -= self.ask.units;
            }
            if let Some(tokens) = self.used_tokens {
                state
                    .queue
                    .correct(&self.ask, tokens as f64 - self.ask.cost);
            }
        }
        self.admission.give_next();
    }
}

/// A place in the queue, left when dropped.
struct QueuePlace<'a> {
    admission: &'a Arc<Admission>,
    id: u64,
    class: Class,
    tenant: String,
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        let removed = self
            .admission
            .state
            .lock()
            .queue
            .remove(self.id, self.class, &self.tenant);
        if removed.is_some() {
            // It may have kept smaller ones waiting.
            self.admission.give_next();
        }
    }
}
