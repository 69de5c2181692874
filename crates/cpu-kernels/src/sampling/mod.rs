//! The next token of every row of scores.
//!
//! ```text
//! peak       the largest of each 64 scores: what most of a row is skipped by
//! noise      a pure function of (seed, choice, output index) and a counter
//! top_p      which ids top_k and top_p keep
//! draw       temperature, top_k, top_p, min_p and the choice
//! likely     the same from the largest logits alone, which are not written
//! logprobs   log-probabilities, ranks and the most likely tokens
//! ```
//!
//! A row costs a pass or two over its scores: nothing is put in order but the few ids that top_k
//! keeps, since for top_p one sum tells of an id whether it is kept.

mod draw;
mod likely;
#[cfg(test)]
mod likely_tests;
mod logprobs;
mod noise;
mod peak;
#[cfg(test)]
mod tests;
mod top_p;

pub use draw::{Draw, draw};
pub use likely::draw_likely;
pub use logprobs::{TokenLogprobs, logprobs};
pub use noise::row_key;
