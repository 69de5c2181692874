//! A protocol-true engine with set timings and faults: the real listener before a loop that computes nothing.
//!
//! For tests of gateways and for measuring a gateway alone.

mod babbler;
mod engine;
mod sequence;
mod settings;

pub use engine::{FakeEngine, run};
pub use settings::{BadSettings, Faults, Garbage, LoadNumbers, Output, Refuse, Settings};
