//! Some rows of a packed weight as a packed weight of their own, for column-parallel layers whose
//! parts are no view: heads of queries, keys and values, or a number that panels do not divide.

use std::ops::Range;

use super::layout::{CHANNELS, F32_SCALES, Format, Layout, LinearError, Packed, int4_scales};
use crate::cpu::Cpu;
use crate::rows::RowsMut;

/// Where a block's bytes belong to a lane: runs of so many bytes a lane, so often.
struct Runs {
    /// Bytes of a lane's scale before the values, 0 where there are none.
    scale: usize,
    /// Units of four bytes a lane.
    steps: usize,
    /// How often both come in a block.
    times: usize,
}

impl Runs {
    fn of(layout: &Layout) -> Self {
        let (scale, block, per_step, times) = match layout.format() {
            Format::Bf16 => (0, layout.block_k(), 2, 1),
            Format::Int8 => (F32_SCALES / CHANNELS, layout.block_k(), 4, 1),
            Format::Int4 { group, zeros } => {
                let times = layout.block_k() / group;
                (int4_scales(zeros) / CHANNELS, group, 8, times)
            }
        };
        Self {
            scale,
            steps: block / per_step,
            times,
        }
    }
}

/// The layout of the rows of `ranges` of a weight; of a gated one, those of the gate and, as many,
/// those of the up projection.
///
/// # Errors
/// If they are no rows of it, none, or it has groups along k.
pub fn selected(layout: &Layout, ranges: &[Range<usize>]) -> Result<Layout, LinearError> {
    let refused = |range: &Range<usize>| LinearError::Slice {
        what: "rows",
        first: range.start,
        end: range.end,
        count: layout.n(),
    };
    for range in ranges {
        if range.start >= range.end || range.end > layout.n() || layout.k_groups() > 1 {
            return Err(refused(range));
        }
    }
    let n = ranges.iter().map(ExactSizeIterator::len).sum();
    Layout::new(layout.format(), n, layout.k(), 1, layout.gated())
}

/// Copy the rows of `ranges` to `out`, of `selected`'s size; panels in parallel.
///
/// # Errors
/// As `selected`.
///
/// # Panics
/// If `out` has another size.
pub fn select(
    cpu: &Cpu,
    weight: &Packed,
    ranges: &[Range<usize>],
    out: &mut [u8],
) -> Result<(), LinearError> {
    let from = weight.layout();
    let to = selected(from, ranges)?;
    assert_eq!(out.len(), to.bytes(), "bytes of the packed weight");
    let rows: Vec<usize> = ranges.iter().cloned().flatten().collect();
    let (size, runs) = (to.block_bytes(), Runs::of(&to));
    let out = RowsMut::of(out, size);
    cpu.team.run(to.panels(), |panel, _| {
        // SAFETY: a block belongs to one panel, and a panel to one task.
        let block = unsafe { out.part(panel, 0, size) };
        let lane_of = |lane| to.channel(panel, lane).map(|row| from.lane_of(rows[row]));
        let first = lane_of(0).unwrap_or_default();
        if (0..CHANNELS).all(|lane| lane_of(lane) == Some((first.0, lane))) {
            block.copy_from_slice(weight.block(0, first.0));
            return;
        }
        block.fill(0);
        for lane in 0..CHANNELS {
            if let Some((panel, old)) = lane_of(lane) {
                copy_lane(&runs, weight.block(0, panel), old, block, lane);
            }
        }
    });
    Ok(())
}

fn copy_lane(runs: &Runs, from: &[u8], old: usize, to: &mut [u8], lane: usize) {
    let mut first = 0;
    for _ in 0..runs.times {
        for (width, count) in [(runs.scale, 1), (4, runs.steps)] {
            for _ in 0..count {
                let bytes = &from[first + old * width..][..width];
                to[first + lane * width..][..width].copy_from_slice(bytes);
                first += CHANNELS * width;
            }
        }
    }
}
