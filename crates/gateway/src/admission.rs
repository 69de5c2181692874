//! How many requests may generate at the same time.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fleet::{Limits, Model};
use crate::record::RequestRecord;
use crate::stages::Stage;

/// What a request was given on its way in.
pub struct Admitted {
    pub model: Arc<Model>,
    pub limits: Limits,
    pub permit: Permit,
}

/// Finds the request's model and a place for it.
///
/// # Errors
/// 404 for an unknown model, 400 if there is a choice and no name, 503 when all places are taken or no replica has been reached.
pub fn admit(app: &App, record: &RequestRecord, model_name: Option<&str>) -> ApiResult<Admitted> {
    let model = Arc::clone(app.fleet.find_or_only(model_name)?);
    record.update(|progress| progress.model = Some(Arc::clone(&model)));
    let permit = record
        .timed(Stage::Admission, || app.admission.enter())
        .inspect_err(|_| app.metrics.rejected("max_in_flight"))?;
    let limits = model
        .require_limits()
        .inspect_err(|_| app.metrics.rejected("no_replica"))?;
    Ok(Admitted {
        model,
        limits,
        permit,
    })
}

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
