//! The OpenAI-compatible front. One file for each stage of a request's life, in order:
//!
//! ```text
//! server, connection   a socket's requests; http2, socket, tls  accept
//! observe, recent,     id, stage times, metrics, log        (around all that follows)   write
//! written
//! traces/              OpenTelemetry spans to a collector    (after the end)
//! auth                 API key                              auth
//! body                 whole body, within its limit         body
//! request/             JSON to checked fields               parse
//! quota, metering      the key's budgets; what is used       (from admission to the end)
//! admission, fair_queue  a place among the running requests admission
//! safety/              a model's checks of requests and answers  safety (of the request)
//! prompt, text_pool    template and ids, long ones on own threads  text_queue, template, tokenise
//! fleet, submit        model name to replica                route
//! attempt, faults      the replica dies: on at another one   (until the last token)
//! choice, generation   engine outputs to text               link_out to decode, detokenise
//! respond/             JSON bodies and SSE frames           serialise
//! foreign/             models that servers elsewhere compute: from body on, in the place of what is between   upstream
//! ```
//!
//! `routes/` strings these together, one short handler for each endpoint.

mod admission;
mod app;
mod attempt;
mod auth;
mod body;
mod breaker;
mod choice;
pub mod config;
mod connection;
mod engine_name;
pub mod error;
mod fair_queue;
mod fault_metrics;
mod faults;
mod fleet;
mod foreign;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod gen_ai;
mod generation;
mod http2;
mod log;
mod memory;
mod metering;
mod metrics;
mod observe;
mod prompt;
mod quota;
mod recent;
mod record;
mod refused_prompts;
mod reload;
mod replay;
mod request;
mod respond;
mod routes;
mod routing;
mod safety;
mod serve;
mod served;
mod server;
mod socket;
mod stages;
mod submit;
pub mod text;
mod text_pool;
mod tls;
mod traces;
mod written;

pub use config::{
    Config, DatabaseDown, FaultConfig, LogFormat, LogLevel, ModelConfig, UpstreamConfig,
};
pub use error::GatewayError;
pub use log::Log;
pub use serve::{Gateway, serve};
