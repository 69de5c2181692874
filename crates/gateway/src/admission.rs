//! How many requests may generate at the same time.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{ApiError, ApiResult};

/// Hands out places; waits for nobody, because a client that waits here cannot be routed elsewhere.
pub struct Admission {
    places: Arc<Semaphore>,
    limit: usize,
}

/// A place, given back when dropped.
pub struct Permit {
    _place: OwnedSemaphorePermit,
}

impl Admission {
    #[must_use]
    pub fn new(limit: usize) -> Admission {
        let limit = limit.min(Semaphore::MAX_PERMITS);
        Admission {
            places: Arc::new(Semaphore::new(limit)),
            limit,
        }
    }

    /// A place for one request.
    ///
    /// # Errors
    /// 503 with Retry-After when all are taken.
    pub fn enter(&self) -> ApiResult<Permit> {
        Arc::clone(&self.places)
            .try_acquire_owned()
            .map(|place| Permit { _place: place })
            .map_err(|_| {
                let message = format!(
                    "all {} places for running requests (max_in_flight) are taken",
                    self.limit
                );
                ApiError::busy("overloaded", message, 1)
            })
    }

    #[must_use]
    pub fn taken(&self) -> usize {
        self.limit - self.places.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_permit_frees_its_place() {
        let admission = Admission::new(1);
        let permit = admission.enter().unwrap();
        let refused = admission.enter().err().unwrap();
        assert_eq!(
            (refused.status.as_u16(), refused.retry_after_s),
            (503, Some(1))
        );
        drop(permit);
        assert_eq!(admission.taken(), 0);
        assert!(admission.enter().is_ok());
    }
}
