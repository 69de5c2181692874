//! The load generator against a scripted server, and its SSE parser against a plain reading of
//! the standard.

mod closed_loop;
mod failures;
mod open_loop;
mod server;
mod sse;
mod tls;
