//! The link between gateway and engine.
//!
//! ```text
//!  gateway process                                engine process
//!  client::Replica  -- a few Sessions (gRPC) -->  listener::Listener --poll--> the engine's loop
//!      submit -> RequestStream                        <-- frames --------emit--
//! ```
//!
//! - [`proto`]: the generated types of `proto/scalellm/engine/v1/engine.proto`, which states the rules.
//! - [`client`]: a pool of sessions to one engine; multiplexes all requests over them.
//! - [`listener`]: what an engine embeds; validates, orders, retains and reports.

pub mod address;
pub mod client;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod listener;

/// Generated from `proto/scalellm/engine/v1/engine.proto`.
pub mod proto {
    tonic::include_proto!("scalellm.engine.v1");
}

pub use address::{Address, AddressError};
pub use client::{
    BlockHash, KvSink, LostCause, Replica, ReplicaConfig, ReplicaState, RequestStream, StreamError,
    SubmitError,
};
pub use listener::{
    Command, EngineHandle, EngineInfo, Listener, ListenerConfig, StepOutput, Submission,
};
