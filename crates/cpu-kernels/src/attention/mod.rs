//! Attention over a paged cache of keys and values.
//!
//! ```text
//! layout   how a layer's cache lies in memory
//! batch    which rows of a step belong to which sequence, and where its blocks are
//! store    norm, rotary, and the step's keys and values into the cache
//! attend   every row over its own sequence: what is computed where, and in which order
//! tile     one tile of keys for some rows, at any level; avx512, avx512_int8: with dot products
//! source   where tiles come from: the cache itself, or int8 made bf16
//! ahead    fetches the next tile's memory meanwhile
//! ```
//!
//! A row's result depends on its query and on the keys before it, and on nothing else of the step:
//! keys are taken in tiles of 64 and in splits of 512 that begin at multiples of these positions in
//! the sequence, a split's sums are made one tile after the other, splits are added in their order,
//! and a key that a row may not see adds exactly nothing. Whether a row is alone or among many, and
//! which threads take which splits, changes who computes, but not what.

mod ahead;
mod attend;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_int8;
mod batch;
mod layout;
mod source;
mod store;
#[cfg(test)]
mod tests;
mod tile;

pub use attend::{Scoring, attend};
pub use batch::{Batch, BatchError, Span};
pub use layout::{Cache, KvLayout, KvType, LayoutError};
pub use store::{HeadNorms, store};
