//! How the keys and values of one layer lie in memory.
//!
//! ```text
//! cache        [blocks][kv heads] of one head's tokens of a block:
//! bf16         | K [head_dim / 2][block_tokens][2] | V [block_tokens / 2][head_dim][2] |
//! int8         the same of int8, then a scale for each token's key and value:
//!              | K | V | f32 [block_tokens] of K | f32 [block_tokens] of V |
//! ```
//!
//! Keys lie side by side, so that one vector holds a pair of dimensions of 16 keys and a query's
//! pair is multiplied with all of them: no sum across a vector, and one read of the cache for all
//! query heads that share it. Values lie in pairs of tokens for the same reason.

use std::marker::PhantomData;

/// How a key's or value's numbers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    Bf16,
    /// Whole numbers from -127 to 127 and one f32 scale for each token and head.
    Int8,
}

/// What `KvLayout::new` refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("blocks of {0} tokens: a multiple of 16 is needed")]
    BlockTokens(usize),
    #[error("heads of {0} numbers: an even number from 2 to 1024 is needed")]
    HeadDim(usize),
    #[error("no kv heads")]
    NoHeads,
}

/// The shape of one layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    block_tokens: usize,
    kv_heads: usize,
    head_dim: usize,
    dtype: KvType,
}

impl KvLayout {
    /// Keys and values both have `head_dim` numbers.
    ///
    /// # Errors
    /// If a size is outside what the kernels can do.
    pub fn new(
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvType,
    ) -> Result<Self, LayoutError> {
        if block_tokens == 0 || !block_tokens.is_multiple_of(16) {
            return Err(LayoutError::BlockTokens(block_tokens));
        }
        if head_dim == 0 || head_dim > 1024 || !head_dim.is_multiple_of(2) {
            return Err(LayoutError::HeadDim(head_dim));
        }
        if kv_heads == 0 {
            return Err(LayoutError::NoHeads);
        }
        Ok(Self {
            block_tokens,
            kv_heads,
            head_dim,
            dtype,
        })
    }

    #[must_use]
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    #[must_use]
    pub fn dtype(&self) -> KvType {
        self.dtype
    }

    /// Numbers of one head's keys, or values, of a block.
    pub(super) fn numbers(&self) -> usize {
        self.block_tokens * self.head_dim
    }

    /// Bytes of one head's part of a block; a multiple of 64.
    pub(super) fn bytes_per_head(&self) -> usize {
        match self.dtype {
            KvType::Bf16 => 4 * self.numbers(),
            KvType::Int8 => 2 * self.numbers() + 8 * self.block_tokens,
        }
    }

    /// Bytes of one block of one layer.
    #[must_use]
    pub fn bytes_per_block(&self) -> usize {
        self.kv_heads * self.bytes_per_head()
    }
}

/// One layer's blocks.
pub struct Cache<'a> {
    layout: KvLayout,
    start: *mut u8,
    blocks: usize,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: plain bytes; `store`, which writes them, gives each thread its own blocks.
unsafe impl Send for Cache<'_> {}
// SAFETY: as above.
unsafe impl Sync for Cache<'_> {}

impl<'a> Cache<'a> {
    /// # Safety
    /// `blocks * layout.bytes_per_block()` bytes from `start` are initialised, and nobody else
    /// reads or writes them for `'a`.
    ///
    /// # Panics
    /// If `start` is not aligned to 4 bytes; 64 make it fast.
    #[must_use]
    pub unsafe fn from_raw(layout: KvLayout, start: *mut u8, blocks: usize) -> Self {
        assert!(start.addr().is_multiple_of(4), "a cache at {start:?}");
        Self {
            layout,
            start,
            blocks,
            memory: PhantomData,
        }
    }

    /// # Panics
    /// If `bytes` is not whole blocks, or not aligned to 4 bytes.
    #[must_use]
    pub fn of(layout: KvLayout, bytes: &'a mut [u8]) -> Self {
        let blocks = bytes.len() / layout.bytes_per_block();
        assert_eq!(
            blocks * layout.bytes_per_block(),
            bytes.len(),
            "whole blocks"
        );
        // SAFETY: as long as asked, and borrowed for `'a`.
        unsafe { Self::from_raw(layout, bytes.as_mut_ptr(), blocks) }
    }

    #[must_use]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Where a head's part of a block begins.
    pub(super) fn head(&self, block: usize, head: usize) -> *mut u8 {
        assert!(block < self.blocks && head < self.layout.kv_heads, "inside");
        let place = block * self.layout.kv_heads + head;
        // SAFETY: inside what `from_raw` was promised.
        unsafe { self.start.add(place * self.layout.bytes_per_head()) }
    }
}
