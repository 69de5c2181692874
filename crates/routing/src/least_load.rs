//! Least load: the replica that is predicted to be done first, whatever its cache holds.

use crate::policy::Reason;
use crate::router::View;

pub(crate) fn choose(view: &View<'_>) -> Option<(usize, Reason)> {
    Some((view.soonest_done(|_| true)?, Reason::Load))
}
