//! When, where and how often a choice may go on after its replica failed it.

use std::time::{Duration, Instant};

use scalellm_engine_link::{LostCause, ReplicaState, proto};

use crate::fault_metrics::Waiting;
use crate::fleet::Model;

/// Deaths of replicas that one request may be present at, if it did not get on between them.
pub const MAX_DEATHS: u32 = 2;
/// A choice that was given this many ids since a death was not what killed that replica.
const INNOCENT_AFTER_IDS: usize = 16;
/// A replica that failed the choice is tried again after this time, or at once when it was restarted: after a death,
/// its other sessions need a moment to notice.
const SAME_START_AFTER: Duration = Duration::from_secs(1);

/// Why a choice cannot stay where it is.
#[derive(Debug, Clone)]
pub struct Loss {
    pub cause: Cause,
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    Lost(LostCause),
    /// The engine's loop failed; it could still say so.
    Crashed,
    /// The engine is stopping and would not finish it.
    Drained,
}

impl Cause {
    /// A label for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Lost(cause) => cause.name(),
            Cause::Crashed => "crashed",
            Cause::Drained => "drained",
        }
    }

    /// Whether the replica failed, and the request may have been why.
    pub fn is_death(self) -> bool {
        matches!(
            self,
            Cause::Crashed | Cause::Lost(LostCause::Gone | LostCause::Silent | LostCause::Hung)
        )
    }
}

/// A replica in one of its starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    pub replica: usize,
    pub epoch: u64,
}

/// From a loss to the next output.
pub struct Pause {
    pub loss: Loss,
    pub since: Instant,
    /// When waiting for a replica ends.
    pub until: Instant,
    pub _waiting: Waiting,
}

/// The places that failed one choice.
#[derive(Debug, Default)]
pub struct Failures {
    /// The latest of each replica.
    places: Vec<(Place, Instant)>,
    deaths: u32,
    ids_at_death: usize,
    last_death: Option<Place>,
}

impl Failures {
    /// The replica would not take the choice, or lost it.
    pub fn note(&mut self, place: Place, now: Instant) {
        self.places
            .retain(|(known, _)| known.replica != place.replica);
        self.places.push((place, now));
    }

    /// The replica died while it had the choice, which had `ids` ids by then. Returns how many deaths in a row that
    /// makes; the sessions of one dead process count once.
    pub fn died(&mut self, place: Place, ids: usize) -> u32 {
        if self.last_death != Some(place) {
            if ids >= self.ids_at_death + INNOCENT_AFTER_IDS {
                self.deaths = 0;
            }
            self.deaths += 1;
            self.ids_at_death = ids;
            self.last_death = Some(place);
        }
        self.deaths
    }

    /// Replicas that are not to be tried now.
    pub fn avoid(&self, model: &Model, now: Instant) -> Vec<usize> {
        let lately = |(place, at): &&(Place, Instant)| {
            let same_start = model.replicas.get(place.replica).is_some_and(|replica| {
                replica.info().is_some_and(|info| info.epoch == place.epoch)
            });
            same_start && now.saturating_duration_since(*at) < SAME_START_AFTER
        };
        let failed = self.places.iter().filter(lately);
        failed.map(|(place, _)| place.replica).collect()
    }
}

/// Whether the second engine continues what the first has begun as the first would: the same weights, and digests of
/// everything else that decides a bit of the result. Engines that do not tell are not believed.
pub fn continues_exactly(
    first: &proto::DescribeResponse,
    second: &proto::DescribeResponse,
) -> bool {
    let told = |info: &proto::DescribeResponse| {
        !info.weights_digest.is_empty() && !info.numerics_digest.is_empty()
    };
    told(first)
        && first.weights_digest == second.weights_digest
        && first.numerics_digest == second.numerics_digest
        && first.tokenizer_digest == second.tokenizer_digest
        && first.quantization == second.quantization
        && first.vocab_size == second.vocab_size
}

/// Whether every replica is there, and none continues what `first` has begun.
pub fn is_hopeless(model: &Model, first: &proto::DescribeResponse) -> bool {
    model.replicas.iter().all(|replica| {
        replica.state() == ReplicaState::Ready
            && replica
                .info()
                .is_some_and(|info| !continues_exactly(first, &info))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(replica: usize, epoch: u64) -> Place {
        Place { replica, epoch }
    }

    #[test]
    fn deaths_count_unless_the_choice_got_on_between_them() {
        let mut failures = Failures::default();
        assert_eq!(failures.died(place(0, 1), 50), 1);
        assert_eq!(failures.died(place(0, 1), 50), 1, "the same process");
        assert_eq!(failures.died(place(1, 1), 50 + INNOCENT_AFTER_IDS), 1);
        assert_eq!(failures.died(place(0, 2), 51 + INNOCENT_AFTER_IDS), 2);
    }

    #[test]
    fn only_engines_that_tell_equal_digests_continue_each_other() {
        let info = |weights: &str, numerics: &str| proto::DescribeResponse {
            weights_digest: weights.to_owned(),
            numerics_digest: numerics.to_owned(),
            ..proto::DescribeResponse::default()
        };
        let first = info("w", "n");
        assert!(continues_exactly(&first, &first));
        for other in [info("v", "n"), info("w", "m"), info("", "")] {
            assert!(!continues_exactly(&first, &other));
            assert!(!continues_exactly(&other, &first));
        }
        assert!(!continues_exactly(&info("", ""), &info("", "")));
        let quantised = proto::DescribeResponse {
            quantization: "int4".to_owned(),
            ..info("w", "n")
        };
        assert!(!continues_exactly(&first, &quantised));
    }
}
