//! Pure routing policies: which replica should run a request.
//!
//! Nothing here does input or output or reads a clock; the caller hands in what it sees of the replicas and
//! the time. The gateway and the simulator run this same code.

mod estimate;
mod least_load;

pub use least_load::{Candidate, LeastLoad, Pick};
