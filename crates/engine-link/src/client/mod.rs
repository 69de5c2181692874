//! The gateway's side: one [`Replica`] per engine, a few sessions each, every request multiplexed over them.

mod config;
mod connect;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod kv_view;
mod replica;
mod session;
mod shared;
mod socket;
mod stream;
mod table;

pub use config::ReplicaConfig;
pub use kv_view::{BlockHash, KvSink};
pub use replica::{Replica, ReplicaState};
pub use stream::{LostCause, RequestStream, StreamError};
pub use table::SubmitError;
