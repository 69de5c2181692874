//! The engine's operations on a CPU.
//!
//! ```text
//! cpu       what an operation runs on: a team, a level and scratch
//! level     which instructions this processor has: AVX-512 (VNNI, BF16), AVX2 or portable
//! team      the one set of threads that everything runs on; tiles are taken from a counter
//! rows      checked two-dimensional views of activations
//! scratch   memory that operations need for their own intermediate results
//! ranks     processes that compute a step together, and what they give each other
//! linear    products with packed weights: bf16, int8, int4
//! attention over the paged cache, and what stores keys and values there
//! plan      a model's step as a recorded list of all these
//! ceiling   what the processor can do at most, to measure kernels against; pages: huge ones
//! norm, rotary, activation, embedding, moe      what lies between linears
//! vectorise one body, compiled for each level; bfloat, exp, share: what such bodies are made of
//! runs      who computes which pieces of a job, where what comes next is to be fetched ahead
//! ```
//!
//! Activations are bf16, rows of a batch's tokens; sums are kept in f32 or i32. Every operation
//! gives the same bits for a row whatever other rows are computed with it, however many threads
//! take part, and however a prompt was cut into steps.

pub mod activation;
pub mod attention;
mod bfloat;
pub mod ceiling;
pub mod cpu;
pub mod embedding;
mod exp;
pub mod level;
pub mod linear;
pub mod moe;
pub mod norm;
pub mod pages;
pub mod plan;
pub mod ranks;
pub mod rotary;
pub mod rows;
mod runs;
pub mod sampling;
pub mod scratch;
mod share;
pub mod team;
mod vectorise;

pub use half::bf16;
