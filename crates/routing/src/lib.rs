//! Pure routing policies: which replica should run a request, and why.
//!
//! Nothing here does input or output or reads a clock; the caller hands in what it sees of the replicas and
//! the time. The gateway and the simulator run this same code.
//!
//! ```text
//!   engines' loads   --> Candidate --+
//!   engines' costs   --> StepCost  --+--> Predictor: time to first token, time to the end
//!   engines' KV events --> PrefixIndex: tokens cached by each --+          |
//!                                                               v          v
//!                                          least_load | prefix | shape | session --> Choice
//! ```
//!
//! Servers elsewhere tell none of this: [`SentPrefixes`] remembers what each of them was sent.

mod breaker;
mod candidate;
mod estimate;
mod hash;
mod least_load;
mod policy;
mod predict;
mod prefix;
mod prefix_index;
mod retry_budget;
mod router;
mod sent_prefixes;
mod session;
mod shape;

pub use breaker::{Breaker, BreakerSettings};
pub use candidate::{Candidate, Request, StepCost};
pub use hash::{BlockHash, block_hashes, stable_hash};
pub use policy::{Choice, Policy, Reason, UnknownPolicy};
pub use prefix_index::{MAX_BLOCKS, MAX_REPLICAS, PrefixIndex};
pub use retry_budget::RetryBudget;
pub use router::Router;
pub use sent_prefixes::{MAX_PREFIXES, Prefixes, SentPrefixes};
pub use session::session_rank;
