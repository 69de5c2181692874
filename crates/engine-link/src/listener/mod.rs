//! The engine's side: what an engine process embeds.
//!
//! ```text
//!   gateways == gRPC ==> runtime thread (service.rs) -- Core (core.rs) --> poll()   the engine's loop
//!            <== frames == one stream a session      <-- retained frames -- emit()
//! ```

mod bind;
mod config;
mod core;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod handle;
mod server;
mod service;
mod session;
mod validate;

use crate::proto;

pub use config::ListenerConfig;
pub use handle::EngineHandle;
pub use server::Listener;
pub use validate::{MAX_DEADLINE_MS, PRIORITIES, validate};

/// What Describe answers.
pub type EngineInfo = proto::DescribeResponse;

/// What the engine's loop is to do. At most one Submit and one Cancel per request wait here.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    Submit(Box<Submission>),
    /// The request is of no interest any more; outputs for it fall away.
    Cancel(u64),
    /// Finish what runs. New requests are refused by the listener already.
    Drain,
    /// Cancel everything and exit.
    Stop,
    /// Hand the whole prefix cache to `emit_kv`.
    KvSnapshot,
    /// Time the shapes on the idle engine, then `answer_calibrate`.
    Calibrate {
        ticket: u64,
        shapes: Vec<proto::CalibrationShape>,
    },
}

/// A validated Submit with its whole prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// Unique in this engine process; names the request in `emit` and in cancels.
    pub key: u64,
    /// Every field is within its limits; `prompt_ids` is complete.
    pub submit: proto::Submit,
    /// Unix time.
    pub received_us: u64,
    /// `received_us` plus the request's `deadline_ms`.
    pub deadline_us: Option<u64>,
}

/// What one step did for one request. The listener fills `output.request`, `times.received_us` and
/// `times.emitted_us`.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    pub key: u64,
    pub output: proto::Output,
}
