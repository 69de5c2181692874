//! A protocol-true engine with set timings and faults: the real listener before a loop that computes nothing.
//!
//! For tests of gateways and for measuring a gateway alone. `endpoint` is its counterpart over HTTP: no engine of
//! ours, but what a gateway has behind it where its engines are foreign.

mod alarm;
mod babbler;
mod endpoint;
mod engine;
mod prefix_cache;
mod sequence;
mod settings;

pub use endpoint::{Speed, run_endpoint};
pub use engine::{FakeEngine, run};
pub use settings::{BadSettings, Faults, Garbage, LoadNumbers, Output, Refuse, Settings};
