//! Memory in huge pages, so that reading it is not slowed by the walk of page tables.

use std::io;

/// Zeroed memory of the process, in huge pages where the system gives them.
pub struct Pages {
    start: *mut u8,
    size: usize,
}

impl Pages {
    /// # Errors
    /// If there is no such memory.
    pub fn new(size: usize) -> io::Result<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a fresh anonymous mapping; the answer is checked.
        let start = unsafe {
            let flags = flags | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        #[cfg(target_os = "linux")]
        // SAFETY: the mapping just made; advice that is refused changes nothing.
        unsafe {
            libc::madvise(start, size, libc::MADV_HUGEPAGE);
        }
        Ok(Self {
            start: start.cast(),
            size,
        })
    }

    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: all of the mapping, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.size) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_and_keeps_what_is_written() {
        let mut pages = Pages::new(3 << 20).unwrap();
        assert!(pages.bytes().iter().all(|&byte| byte == 0));
        pages.bytes_mut()[(3 << 20) - 1] = 7;
        assert_eq!(pages.bytes().last(), Some(&7));
        assert!(pages.bytes().as_ptr().addr().is_multiple_of(4096));
    }

    #[test]
    fn memory_that_cannot_be_had_is_refused() {
        assert!(Pages::new(usize::MAX / 2).is_err());
    }
}
