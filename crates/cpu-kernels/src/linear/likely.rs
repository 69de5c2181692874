//! The most likely ids of each row, without writing logits.

use half::bf16;

use super::layout::{CHANNELS, F32_SCALES, Format, Packed};
use super::product;
use super::tile::Sums;
use crate::cpu::Cpu;
use crate::ranks::{RankLost, Ranks};
use crate::rows::{Rows, RowsMut};
use crate::vectorise::vectorised;

/// A logit and its id.
type Best = (f32, u32);

/// Before any logit was seen.
const NONE: Best = (f32::NEG_INFINITY, 0);

/// The largest logit of each row of `x`, and the lowest id that has it. A logit that is NaN is
/// never the largest; a row without any other has id 0 and minus infinity.
///
/// # Panics
/// If a size does not fit, or the weight is gated.
pub fn greedy(cpu: &mut Cpu, x: Rows<bf16>, weight: &Packed, out: &mut [(f32, u32)]) {
    let rows = x.rows();
    assert_eq!(out.len(), rows, "a place for each row");
    assert!(!weight.layout().gated(), "logits of a gated weight");
    let (level, threads) = (cpu.level, cpu.team.threads());
    let mut best = vec![NONE; threads * rows];
    if rows > 0 {
        let best = RowsMut::of(&mut best, rows);
        product(cpu, x, weight, |panel, thread, first, rows, sums| {
            // SAFETY: a thread is in one task at a time, and has a row of its own.
            let best = unsafe { best.part(thread, first, rows) };
            choose(level, weight, panel, sums, best);
        });
    }
    out.fill(NONE);
    for best in best.chunks(rows.max(1)) {
        for (out, &best) in out.iter_mut().zip(best) {
            *out = better(*out, best);
        }
    }
}

/// As `greedy`, where the weight's first row is id `first` and other ranks have the other ids; all
/// ranks get the best of all.
///
/// # Errors
/// If a rank has ended.
///
/// # Panics
/// As `greedy`, and if a slot of the ranks is too small.
pub fn greedy_among(
    cpu: &mut Cpu,
    ranks: &mut Ranks,
    x: Rows<bf16>,
    weight: &Packed,
    first: u32,
    out: &mut [(f32, u32)],
) -> Result<(), RankLost> {
    let rows = x.rows();
    greedy(cpu, x, weight, out);
    // SAFETY: the only slice of it.
    let mine = unsafe { ranks.mine::<Best>(1, rows).part(0, 0, rows) };
    for (mine, best) in mine.iter_mut().zip(&*out) {
        *mine = (best.0, best.1 + first);
    }
    ranks.meet()?;
    out.fill(NONE);
    for part in ranks.parts::<Best>(1, rows) {
        for (out, &best) in out.iter_mut().zip(part.row(0)) {
            *out = better(*out, best);
        }
    }
    Ok(())
}

fn better(a: Best, b: Best) -> Best {
    if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) {
        b
    } else {
        a
    }
}

/// As many of a row's largest logits as are wanted, and those that equal the last.
#[derive(Clone, Copy)]
pub struct Shortlist {
    wanted: usize,
    /// What lies below is not among them.
    least: f32,
    count: usize,
    /// How many there may be before the list is shortened.
    room: usize,
    /// In no order, and more than are wanted.
    logits: [Best; Self::ROOM],
    unusable: bool,
    overflown: bool,
}

impl Shortlist {
    /// The most that can be wanted.
    pub const MOST: usize = 64;
    const ROOM: usize = 4 * Self::MOST;
    /// Beyond what is wanted: the fewer, the sooner `least` is near its end, and the more often a
    /// list is shortened.
    const SPARE: usize = 16;

    /// # Panics
    /// If none are wanted, or more than `MOST`.
    #[must_use]
    pub fn new(wanted: usize) -> Self {
        assert!((1..=Self::MOST).contains(&wanted), "{wanted} logits");
        Self {
            wanted,
            least: f32::NEG_INFINITY,
            count: 0,
            room: 2 * wanted + Self::SPARE,
            logits: [NONE; Self::ROOM],
            unusable: false,
            overflown: false,
        }
    }

    /// Logits and ids, in no order, more than were wanted.
    #[must_use]
    pub fn logits(&self) -> &[(f32, u32)] {
        &self.logits[..self.count]
    }

    /// Whether a logit was NaN or infinity.
    #[must_use]
    pub fn unusable(&self) -> bool {
        self.unusable
    }

    /// Whether more logits equal the last one than there is room for: they are not all here.
    #[must_use]
    pub fn overflown(&self) -> bool {
        self.overflown
    }

    fn offer(&mut self, logit: f32, id: u32) {
        if logit.is_nan() || logit == f32::INFINITY {
            self.unusable = true;
        } else if logit >= self.least && !self.overflown {
            self.logits[self.count] = (logit, id);
            self.count += 1;
            if self.count == self.room {
                self.shorten();
            }
        }
    }

    /// Make room, if equal ones leave any.
    fn shorten(&mut self) {
        let found = &mut self.logits[..self.count];
        let (_, last, after) =
            found.select_nth_unstable_by(self.wanted - 1, |a, b| b.0.total_cmp(&a.0));
        self.least = last.0;
        let mut equal = 0;
        for index in 0..after.len() {
            if after[index].0 >= self.least {
                after.swap(equal, index);
                equal += 1;
            }
        }
        self.count = self.wanted + equal;
        self.room = self.count + self.wanted + Self::SPARE;
        self.overflown = self.room > Self::ROOM;
    }

    /// Add what another list of the same row has.
    fn merge(&mut self, other: &Self) {
        self.unusable |= other.unusable;
        self.overflown |= other.overflown;
        for &(logit, id) in other.logits() {
            self.offer(logit, id);
        }
    }
}

/// The largest logits of each row of `x`, as many as each of `lists` wants.
///
/// # Panics
/// As `greedy`.
pub fn shortlist(cpu: &mut Cpu, x: Rows<bf16>, weight: &Packed, lists: &mut [Shortlist]) {
    let rows = x.rows();
    assert_eq!(lists.len(), rows, "a list for each row");
    assert!(!weight.layout().gated(), "logits of a gated weight");
    if rows == 0 {
        return;
    }
    let (level, threads) = (cpu.level, cpu.team.threads());
    let mut parts = lists.repeat(threads);
    let of_threads = RowsMut::of(&mut parts, rows);
    product(cpu, x, weight, |panel, thread, first, rows, sums| {
        // SAFETY: a thread is in one task at a time, and has a row of its own.
        let lists = unsafe { of_threads.part(thread, first, rows) };
        collect(level, weight, panel, sums, lists);
    });
    for parts in parts.chunks(rows) {
        for (list, part) in lists.iter_mut().zip(parts) {
            list.merge(part);
        }
    }
}

vectorised! {
/// Take a panel's logits into account.
fn choose(weight: &Packed, panel: usize, sums: &Sums, best: &mut [Best]) {
    of_panel(weight, panel, sums, best, |best| best.0, |best, logit, id| {
        *best = better(*best, (logit, id));
    });
}
}

vectorised! {
/// As `choose`.
fn collect(weight: &Packed, panel: usize, sums: &Sums, lists: &mut [Shortlist]) {
    of_panel(weight, panel, sums, lists, |list| list.least, Shortlist::offer);
}
}

/// Offer each of `rows` a panel's logits, unless all of them lie below what it has use for.
#[inline(always)]
fn of_panel<T>(
    weight: &Packed,
    panel: usize,
    sums: &Sums,
    rows: &mut [T],
    least: impl Fn(&T) -> f32,
    offer: impl Fn(&mut T, f32, u32),
) {
    let layout = weight.layout();
    let mut scales = [1.0; CHANNELS];
    if layout.format() == Format::Int8 {
        let bytes = &weight.block(0, panel)[..F32_SCALES];
        for (to, from) in scales.iter_mut().zip(bytes.as_chunks().0) {
            *to = f32::from_ne_bytes(*from);
        }
    }
    let first = panel * CHANNELS;
    let columns = CHANNELS.min(layout.columns() - first);
    for (row, sums) in rows.iter_mut().zip(&sums.0) {
        let mut logits = [f32::NEG_INFINITY; CHANNELS];
        for ((logit, sum), scale) in logits.iter_mut().zip(sums).zip(scales) {
            *logit = sum * scale;
        }
        let logits = &logits[..columns];
        // Few panels hold any of a row's largest: most are done after this. NaN lies nowhere.
        let least = least(row);
        let below = logits
            .iter()
            .fold(true, |all, &logit| all & (logit < least));
        if below {
            continue;
        }
        for (lane, &logit) in logits.iter().enumerate() {
            offer(row, logit, (first + lane) as u32);
        }
    }
}
