//! The memory that the ranks of a replica share, and how they wait for each other in it.
//!
//! ```text
//! control   one line for all, then one for each rank: words that count up, and who sleeps on them
//! letter    what rank 0 sends to the others before each step
//! slots     [2][ranks]: what a rank gives to the others; rounds use the two halves in turn
//! ```
//!
//! The memory is a file without a name. Its pages exist from their first use on, so that places for
//! the largest step cost nothing until there is one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::RankLost;
use super::futex;

/// How long a rank spins for another one before it sleeps: the ranks of a step arrive within some
/// tens of microseconds of each other.
const SPIN: Duration = Duration::from_micros(200);
/// Spins between two looks at the clock.
const SPINS: u32 = 32;
/// After this a sleeper looks around, in case nobody was left to wake it.
const NAP: Duration = Duration::from_millis(100);
const PAGE: usize = 4096;

/// A word that only counts up (and around), and how many sleep until it does.
#[repr(C, align(64))]
struct Word {
    count: AtomicU32,
    sleepers: AtomicU32,
}

/// What is known of one rank.
#[repr(C)]
struct Place {
    /// Rounds to which it has brought its part.
    arrived: Word,
    /// Letters it has read.
    read: Word,
}

#[repr(C)]
struct Control {
    lost: Word,
    /// Letters that were sent.
    sent: Word,
    /// Bytes of the last letter.
    letter_bytes: std::sync::atomic::AtomicUsize,
}

/// How large the parts of a region are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub ranks: usize,
    pub letter_bytes: usize,
    pub slot_bytes: usize,
}

impl Sizes {
    const fn pages(bytes: usize) -> usize {
        bytes.next_multiple_of(PAGE)
    }

    fn control(&self) -> usize {
        Self::pages(size_of::<Control>().next_multiple_of(64) + self.ranks * size_of::<Place>())
    }

    fn slot(&self) -> usize {
        Self::pages(self.slot_bytes)
    }

    /// Bytes of a region.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.control() + Self::pages(self.letter_bytes) + 2 * self.ranks * self.slot()
    }
}

/// The shared memory, as this process sees it.
pub struct Region {
    start: *mut u8,
    sizes: Sizes,
}

// SAFETY: what is not atomic is only reached by unsafe methods.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Map `file`, which was zeros of `sizes.bytes()` when the first rank mapped it.
    ///
    /// # Errors
    /// If it is smaller, or cannot be mapped.
    pub fn map(file: BorrowedFd, sizes: Sizes) -> io::Result<Self> {
        let bytes = sizes.bytes();
        // SAFETY: any bytes are a `stat`, which the call fills.
        let mut status = unsafe { std::mem::zeroed::<libc::stat>() };
        // SAFETY: a living descriptor and a place for the answer, which is checked.
        if unsafe { libc::fstat(file.as_raw_fd(), &raw mut status) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if usize::try_from(status.st_size).is_ok_and(|size| size < bytes) {
            let what = format!("{} bytes of shared memory for {sizes:?}", status.st_size);
            return Err(io::Error::other(what));
        }
        // SAFETY: a fresh mapping of a living descriptor; the answer is checked.
        let start = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let file = file.as_raw_fd();
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                access,
                libc::MAP_SHARED,
                file,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            sizes,
        })
    }

    #[must_use]
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn control(&self) -> &Control {
        // SAFETY: the mapping begins with it, and any bytes are valid atomics.
        unsafe { &*self.start.cast() }
    }

    fn place(&self, rank: usize) -> &Place {
        assert!(rank < self.sizes.ranks, "rank {rank}");
        let first = size_of::<Control>().next_multiple_of(64);
        // SAFETY: inside the control pages; any bytes are valid atomics.
        unsafe { &*self.start.add(first).cast::<Place>().add(rank) }
    }

    /// Nobody waits any more, now or later: a rank has ended.
    pub fn give_up(&self) {
        self.control().lost.count.store(1, Ordering::SeqCst);
        futex::wake_all(&self.control().lost.count);
        futex::wake_all(&self.control().sent.count);
        for rank in 0..self.sizes.ranks {
            futex::wake_all(&self.place(rank).arrived.count);
            futex::wake_all(&self.place(rank).read.count);
        }
    }

    /// Whether `give_up` was called, by any rank.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.control().lost.count.load(Ordering::Relaxed) != 0
    }

    /// Note that `rank` has brought its part to `round`.
    pub(super) fn arrive(&self, rank: usize, round: u32) {
        announce(&self.place(rank).arrived, round);
    }

    /// Wait until `rank` has brought its part to `round`.
    pub(super) fn wait_for_part(&self, rank: usize, round: u32) -> Result<(), RankLost> {
        self.wait(&self.place(rank).arrived, round)
    }

    /// Make the letter's bytes, written before, the `number`-th that was sent.
    pub(super) fn announce_letter(&self, number: u32, bytes: usize) {
        let control = self.control();
        control.letter_bytes.store(bytes, Ordering::Relaxed);
        announce(&control.sent, number);
    }

    /// Wait for the `number`-th letter: its bytes.
    pub(super) fn wait_for_letter(&self, number: u32) -> Result<usize, RankLost> {
        self.wait(&self.control().sent, number)?;
        Ok(self.control().letter_bytes.load(Ordering::Relaxed))
    }

    pub(super) fn has_read(&self, rank: usize, number: u32) {
        announce(&self.place(rank).read, number);
    }

    pub(super) fn wait_until_read(&self, rank: usize, number: u32) -> Result<(), RankLost> {
        self.wait(&self.place(rank).read, number)
    }

    pub(super) fn letter(&self) -> *mut u8 {
        self.start.wrapping_add(self.sizes.control())
    }

    /// What `rank` gives to the others in `round`.
    pub(super) fn slot(&self, round: u32, rank: usize) -> *mut u8 {
        let slots = self.sizes.control() + Sizes::pages(self.sizes.letter_bytes);
        let index = (round % 2) as usize * self.sizes.ranks + rank;
        self.start.wrapping_add(slots + index * self.sizes.slot())
    }

    fn wait(&self, word: &Word, target: u32) -> Result<(), RankLost> {
        let reached = |count: u32| count.wrapping_sub(target).cast_signed() >= 0;
        let began = Instant::now();
        loop {
            for _ in 0..SPINS {
                if reached(word.count.load(Ordering::Acquire)) {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if self.lost() {
                return Err(RankLost);
            }
            if began.elapsed() > SPIN {
                break;
            }
        }
        loop {
            word.sleepers.fetch_add(1, Ordering::SeqCst);
            let count = word.count.load(Ordering::SeqCst);
            if !reached(count) && !self.lost() {
                futex::wait(&word.count, count, NAP);
            }
            word.sleepers.fetch_sub(1, Ordering::SeqCst);
            if reached(word.count.load(Ordering::Acquire)) {
                return Ok(());
            }
            if self.lost() {
                return Err(RankLost);
            }
        }
    }
}

fn announce(word: &Word, count: u32) {
    word.count.store(count, Ordering::SeqCst);
    if word.sleepers.load(Ordering::SeqCst) > 0 {
        futex::wake_all(&word.count);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made.
        unsafe { libc::munmap(self.start.cast(), self.sizes.bytes()) };
    }
}
