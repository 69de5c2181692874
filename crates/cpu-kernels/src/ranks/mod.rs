//! The processes that compute a step together, each with its part of every layer.
//!
//! ```text
//! rank 0   send(step) | compute ... mine | meet | read all parts ... mine | meet | ...
//! rank 1   receive    | compute ... mine | meet | read all parts ... mine | meet | ...
//! ```
//!
//! In a round every rank writes a part into a slot of its own (`mine`), then waits until all have
//! (`meet`), then reads everybody's (`parts`). Two slots a rank are enough: who writes for the next
//! round but one has met all others in the next, and they have read this one by then.
//!
//! region   the memory that ranks of one host share, and waiting in it: spin, then sleep
//! futex    sleeping
//! links    TCP in its place, between hosts

mod futex;
mod links;
mod region;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use links::Links;
pub use region::{Region, Sizes};

use crate::rows::{Rows, RowsMut};

/// The most ranks: as many as the canonical groups that row-parallel layers hand out.
pub const MOST: usize = 8;

/// Another rank has ended, or failed: this step has no result, and there is no next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another rank of the replica has ended")]
pub struct RankLost;

/// One rank's view of all.
pub struct Ranks {
    region: Arc<Region>,
    rank: usize,
    /// To the ranks of other hosts; the region is this rank's alone then.
    links: Option<Arc<Links>>,
    round: u32,
    letters: u32,
    /// Since `take_time`: waiting for others and adding their parts up.
    time: Duration,
    /// Bytes of the part for the round to come.
    part_bytes: usize,
    link: Option<Link>,
}

/// A link between the ranks that is slower than the memory they share, to see what it would cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Also bytes a microsecond.
    pub megabytes_s: NonZeroU32,
}

impl Link {
    /// How long a part is on its way.
    #[must_use]
    pub fn takes(self, bytes: usize) -> Duration {
        Duration::from_nanos(1000 * bytes as u64 / u64::from(self.megabytes_s.get()))
    }

    /// Until `bytes` have come that were sent at `sent`: asleep, but for the last of it.
    fn wait(self, bytes: usize, sent: Instant) {
        const WAKING: Duration = Duration::from_micros(150);
        let takes = self.takes(bytes);
        loop {
            let left = takes.saturating_sub(sent.elapsed());
            if left.is_zero() {
                return;
            }
            if left > WAKING {
                std::thread::sleep(left - WAKING);
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

impl Ranks {
    /// # Panics
    /// If there is no such rank.
    #[must_use]
    pub fn new(region: Arc<Region>, rank: usize) -> Self {
        assert!(rank < region.sizes().ranks, "rank {rank}");
        Self {
            region,
            rank,
            links: None,
            round: 0,
            letters: 0,
            time: Duration::ZERO,
            part_bytes: 0,
            link: None,
        }
    }

    /// A rank that meets the others over `links`; its region is nobody else's.
    ///
    /// # Panics
    /// If there is no such rank.
    #[must_use]
    pub fn linked(region: Arc<Region>, rank: usize, links: Arc<Links>) -> Self {
        Self {
            links: Some(links),
            ..Self::new(region, rank)
        }
    }

    /// As if the ranks were joined by `link`; for tests and benchmarks.
    #[must_use]
    pub fn over(self, link: Link) -> Self {
        Self {
            link: Some(link),
            ..self
        }
    }

    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.region.sizes().ranks
    }

    /// Rows of the slot that this rank fills for the round to come.
    ///
    /// # Panics
    /// If a slot does not hold so many.
    pub fn mine<'a, T: Copy>(&mut self, rows: usize, cols: usize) -> RowsMut<'a, T> {
        let slot = self.region.slot(self.round.wrapping_add(1), self.rank);
        self.fits::<T>(rows, cols);
        self.part_bytes = rows * cols * size_of::<T>();
        // SAFETY: inside the slot, which no other rank reads before `meet` or any more (see above);
        // `&mut self` is held by one operation at a time.
        unsafe { RowsMut::from_raw(slot.cast(), rows, cols, cols) }
    }

    /// Hand out what `mine` gave, and wait for what the others do.
    ///
    /// # Errors
    /// If a rank has ended; nobody meets any more then.
    pub fn meet(&mut self) -> Result<(), RankLost> {
        let began = Instant::now();
        self.round = self.round.wrapping_add(1);
        if let Some(links) = &self.links {
            self.swap(links)?;
        } else {
            self.region.arrive(self.rank, self.round);
            for other in 0..self.count() {
                if other != self.rank {
                    self.region.wait_for_part(other, self.round)?;
                }
            }
        }
        if let Some(link) = self.link {
            link.wait(self.part_bytes, began);
        }
        self.time += began.elapsed();
        Ok(())
    }

    /// This rank's part to all others, and theirs into the slots that they would have filled.
    fn swap(&self, links: &Links) -> Result<(), RankLost> {
        let slot = |rank| self.region.slot(self.round, rank);
        // SAFETY: inside the slots, which are this rank's alone and of which it has filled its own;
        // each is one slice.
        let (mine, theirs) = unsafe {
            let theirs = (0..self.count()).map(|rank| {
                let bytes = if rank == self.rank {
                    0
                } else {
                    self.part_bytes
                };
                std::slice::from_raw_parts_mut(slot(rank), bytes)
            });
            let mine = std::slice::from_raw_parts(slot(self.rank), self.part_bytes);
            (mine, theirs.collect())
        };
        links.swap(mine, theirs)
    }

    /// What each rank brought to the round of the last `meet`, in the order of ranks.
    ///
    /// # Panics
    /// If a slot does not hold so many rows.
    pub fn parts<'a, T: Copy>(&self, rows: usize, cols: usize) -> Vec<Rows<'a, T>> {
        self.fits::<T>(rows, cols);
        (0..self.count())
            .map(|rank| {
                let slot = self.region.slot(self.round, rank);
                // SAFETY: inside the slot, whose rank writes there again only after the next round.
                unsafe { Rows::from_raw(slot.cast_const().cast(), rows, cols, cols) }
            })
            .collect()
    }

    fn fits<T>(&self, rows: usize, cols: usize) {
        let (needed, held) = (rows * cols * size_of::<T>(), self.region.sizes().slot_bytes);
        assert!(needed <= held, "{needed} bytes for a slot of {held}");
    }

    /// Count time since `began` as spent on the others.
    pub(crate) fn count_time(&mut self, began: Instant) {
        self.time += began.elapsed();
    }

    /// Time spent on the others since this was last called.
    pub fn take_time(&mut self) -> Duration {
        std::mem::take(&mut self.time)
    }

    /// Give every other rank a letter; of rank 0 alone.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// If it is longer than a letter can be.
    pub fn send(&mut self, letter: &[u8]) -> Result<(), RankLost> {
        assert!(letter.len() <= self.region.sizes().letter_bytes, "a letter");
        if let Some(links) = &self.links {
            for other in 1..self.count() {
                links.send(other, &(letter.len() as u64).to_le_bytes())?;
                links.send(other, letter)?;
            }
            return Ok(());
        }
        for other in 1..self.count() {
            self.region.wait_until_read(other, self.letters)?;
        }
        // SAFETY: that many bytes; every other rank has read what was there.
        unsafe {
            let to = self.region.letter();
            std::ptr::copy_nonoverlapping(letter.as_ptr(), to, letter.len());
        }
        self.letters = self.letters.wrapping_add(1);
        self.region.announce_letter(self.letters, letter.len());
        Ok(())
    }

    /// Wait for the next letter of rank 0.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn receive(&mut self) -> Result<Vec<u8>, RankLost> {
        if let Some(links) = &self.links {
            return links.receive_letter(self.region.sizes().letter_bytes);
        }
        let number = self.letters.wrapping_add(1);
        let bytes = self.region.wait_for_letter(number)?;
        let bytes = bytes.min(self.region.sizes().letter_bytes);
        let mut letter = vec![0; bytes];
        // SAFETY: that many bytes, which rank 0 leaves alone until this rank has read them.
        unsafe {
            let from = self.region.letter();
            std::ptr::copy_nonoverlapping(from, letter.as_mut_ptr(), bytes);
        }
        self.letters = number;
        self.region.has_read(self.rank, number);
        Ok(letter)
    }
}

#[cfg(test)]
pub(crate) mod tests;
