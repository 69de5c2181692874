//! The OpenAI-compatible front. One file for each stage of a request's life, in order:
//!
//! ```text
//! server, connection   a socket's requests                  accept
//! observe              id, stage times, metrics, log        (around all that follows)
//! auth                 API key                              auth
//! body                 whole body, within its limit         body
//! request/             JSON to checked fields               parse
//! admission            a place among the running requests   admission
//! prompt, text_pool    template and ids, on own threads     template, tokenise
//! fleet                model name to replicas; the choice   route
//! choice, generation   engine outputs to text               queue, prefill, link, decode, detokenise
//! respond/             JSON bodies and SSE frames           serialise
//! ```

pub mod config;
pub mod error;
pub mod text;
