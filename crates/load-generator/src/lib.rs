//! Drives an OpenAI-compatible endpoint with load and times every streamed chunk.
//!
//! ```text
//!   Plan ── levels ──> Run (own thread, one current-thread runtime)
//!                       │   Pacer (second thread): due arrivals and loop probes
//!                       │        │
//!                       └── level: closed loop (N clients) | open loop (scheduled sends)
//!                                │
//!                             Client ── one keep-alive connection per request in flight
//!                                │
//!                       bytes ─> SseParser ─> Answer ─> Record ─> LevelReport
//! ```
//!
//! Everything is bounded: requests per level, requests in flight, idle connections, bytes of one
//! event. What the generator itself adds (late sends, a busy loop) is measured and reported.

pub mod answer;
mod body;
mod client;
mod connection;
mod conversation;
mod cpu;
mod error;
mod lag;
mod level;
mod pacer;
pub mod plan;
mod reading;
pub mod record;
pub mod report;
mod run;
pub mod sse;
pub mod stats;
mod tls;
mod url;

pub use error::LoadError;
pub use plan::Plan;
pub use report::Report;
pub use run::{Progress, Run};
