//! The most likely id of each row, without writing logits.

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

vectorised! {
/// Take a panel's logits into account.
fn choose(weight: &Packed, panel: usize, sums: &Sums, best: &mut [Best]) {
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
    for (best, sums) in best.iter_mut().zip(&sums.0) {
        let mut logits = [f32::NEG_INFINITY; CHANNELS];
        for ((logit, sum), scale) in logits.iter_mut().zip(sums).zip(scales) {
            *logit = sum * scale;
        }
        let logits = &logits[..columns];
        // Few panels hold a row's best: most are done after this.
        let any = logits
            .iter()
            .fold(false, |any, &logit| any | (logit >= best.0));
        if !any {
            continue;
        }
        for (lane, &logit) in logits.iter().enumerate() {
            *best = better(*best, (logit, (first + lane) as u32));
        }
    }
}
}
