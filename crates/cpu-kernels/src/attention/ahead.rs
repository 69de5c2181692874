//! Brings what will be read next closer, while something else is computed.

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Some pieces of memory, fetched line by line in their order into the second-level cache (into the
/// first, which a tile alone fills, it is no better than nothing).
///
/// A core's own prefetching follows one stream at a time and not beyond a page, and a sequence's
/// blocks are anywhere: without this a core waits for each of them anew.
pub(super) struct Ahead<const N: usize> {
    /// Where each piece begins, and how many bytes of it are left.
    pieces: [(*const u8, usize); N],
    piece: usize,
}

impl<const N: usize> Default for Ahead<N> {
    fn default() -> Self {
        Self {
            pieces: [(std::ptr::null(), 0); N],
            piece: N,
        }
    }
}

impl<const N: usize> Ahead<N> {
    /// The pieces are only hints: any address will do.
    pub fn new(pieces: [(*const u8, usize); N]) -> Self {
        Self { pieces, piece: 0 }
    }

    /// Begin to fetch the next lines, if there are any.
    #[inline(always)]
    pub fn fetch(&mut self, lines: usize) {
        let Some((start, left)) = self.pieces.get_mut(self.piece) else {
            return;
        };
        for line in 0..lines {
            fetch(start.wrapping_add(line * LINE));
        }
        *start = start.wrapping_add(lines * LINE);
        *left = left.saturating_sub(lines * LINE);
        if *left == 0 {
            self.piece += 1;
        }
    }
}

#[inline(always)]
fn fetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address does nothing that can be observed.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
