//! Replicas of our own beside a model's upstreams: where the model says what they weigh they are together one more
//! candidate, and which of them gets a request is their own routing's to say.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use parking_lot::Mutex;
use scalellm_routing::{Prefixes, SentPrefixes, stable_hash};

use super::exchange::InFlight;
use super::pick::{Candidate, Reason};
use super::upstream::Upstream;
use super::{ForeignModel, Tier};

/// By which a session finds them, the same in every gateway.
const NAME: &[u8] = b"replicas";

/// What upstreams' counts tell of these, of a model's replicas together.
#[derive(Default)]
pub struct Replicas {
    in_flight: Arc<AtomicUsize>,
    /// What their caches may hold; which of them, the routing knows better.
    sent: Mutex<SentPrefixes>,
}

/// Who is to answer a request.
pub enum Turn {
    Replicas(InFlight),
    Upstreams(Option<Chosen>),
}

/// An upstream that was chosen for a request which is not sent yet, and counts as its own already: those that come
/// meanwhile shall see it.
pub struct Chosen {
    upstream: Arc<Upstream>,
    reason: Reason,
    _in_flight: InFlight,
}

impl ForeignModel {
    /// Whether replicas of our own and the upstreams share the requests.
    #[must_use]
    pub fn shares(&self) -> bool {
        self.replicas_weight.is_some()
    }

    /// Whether an upstream is there that gets its share now.
    #[must_use]
    pub fn takes_its_share(&self) -> bool {
        self.shares() && self.is_one_beside(&[])
    }

    /// Requests that upstreams have not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let counts = self.upstreams.iter().map(|upstream| &upstream.counts);
        counts.map(|counts| counts.in_flight.load(Relaxed)).sum()
    }

    /// Whose turn it is. What sets an upstream behind others sets it behind the replicas too.
    pub fn turn(&self, own_is_ready: bool, session: Option<u64>, prompt: &Prefixes) -> Turn {
        let Some(weight) = self.replicas_weight else {
            return Turn::Upstreams(None);
        };
        if !own_is_ready {
            // Whichever comes back has an empty cache.
            self.replicas.sent.lock().clear();
            return Turn::Upstreams(None);
        }
        let upstreams = self.tiers(&[]).into_iter();
        let well = upstreams.filter(|(tier, ..)| *tier == Tier::default());
        let mut among: Vec<_> = well
            .map(|(_, index, upstream)| upstream.candidate(index, prompt))
            .collect();
        among.push(Candidate {
            index: self.upstreams.len(),
            id: stable_hash(NAME),
            weight,
            in_flight: self.replicas.in_flight.load(Relaxed),
            sent: self.replicas.sent.lock().share(prompt),
        });
        let picked = self.picker.pick(&among, session, !prompt.is_empty());
        match picked.and_then(|(index, reason)| Some((self.upstreams.get(index)?, reason))) {
            None => Turn::Replicas(self.for_replicas()),
            Some((upstream, reason)) => Turn::Upstreams(Some(Chosen {
                upstream: Arc::clone(upstream),
                reason,
                _in_flight: InFlight::one_of(&upstream.counts.in_flight),
            })),
        }
    }

    /// Counts a request as the replicas'.
    pub fn for_replicas(&self) -> InFlight {
        InFlight::one_of(&self.replicas.in_flight)
    }

    /// They take it.
    pub fn replicas_take(&self, prompt: &Prefixes) {
        self.replicas.sent.lock().remember(prompt);
    }

    /// Where the upstream stands now that was chosen, if requests may still go there.
    pub fn still(&self, chosen: Chosen) -> Option<(usize, Reason)> {
        let mut usable = self.usable();
        let (index, _) = usable.find(|(_, upstream)| Arc::ptr_eq(upstream, &chosen.upstream))?;
        Some((index, chosen.reason))
    }
}
