//! Memory for an operation's own intermediate results, kept from call to call.

/// What a cache line holds; the alignment of everything handed out.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Grows to the most that was ever asked for.
#[derive(Default)]
pub struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    /// Parts of the given sizes in bytes, each aligned to 64, with whatever they held before.
    pub fn parts<const N: usize>(&mut self, sizes: [usize; N]) -> [&mut [u8]; N] {
        let lines = sizes.map(|size| size.div_ceil(64));
        let needed: usize = lines.iter().sum();
        if self.lines.len() < needed {
            self.lines.resize(needed, Line([0; 64]));
        }
        let mut rest = self.lines.as_mut_slice();
        let mut index = 0;
        sizes.map(|size| {
            let (part, left) = std::mem::take(&mut rest).split_at_mut(lines[index]);
            rest = left;
            index += 1;
            // SAFETY: `Line` is 64 plain bytes without padding; `size` is at most what `part` holds.
            unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr().cast::<u8>(), size) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_disjoint_and_as_long_as_asked() {
        let mut scratch = Scratch::default();
        let [a, b, c] = scratch.parts([3, 0, 130]);
        assert_eq!((a.len(), b.len(), c.len()), (3, 0, 130));
        assert_eq!(a.as_ptr() as usize % 64, 0);
        assert_eq!(c.as_ptr() as usize % 64, 0);
        a.fill(1);
        c.fill(2);
        assert!(a.iter().all(|&x| x == 1) && c.iter().all(|&x| x == 2));
    }
}
