//! The engine's operations on a CPU.
//!
//! ```text
//! cpu       what an operation runs on: a team, a level and scratch
//! level     which instructions this processor has: AVX-512 (VNNI, BF16), AVX2 or portable
//! team      the one set of threads that everything runs on; tiles are taken from a counter
//! rows      checked two-dimensional views of activations
//! scratch   memory that operations need for their own intermediate results
//! ```
//!
//! Activations are bf16, rows of a batch's tokens; sums are kept in f32 or i32. Every operation
//! gives the same bits for a row whatever other rows are computed with it, however many threads
//! take part, and however a prompt was cut into steps.

pub mod cpu;
pub mod level;
pub mod rows;
pub mod scratch;
pub mod team;

pub use half::bf16;
