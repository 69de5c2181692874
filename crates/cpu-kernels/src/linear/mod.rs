//! Linear layers: y = x W^T (+ bias), on packed bf16, int8 or int4 weights.
//!
//! ```text
//! layout       how a packed weight lies in memory; slices of it
//! pack         quantises and packs, or packs what is quantised
//! activations  normalises, quantises and interleaves a batch's rows
//! tile         what a kernel computes: sums of one panel (32 channels) and one tile of rows
//! schedule     divides a product into tasks
//! portable, avx2, avx512   the kernels of each level
//! epilogue     from sums to outputs
//! likely       from sums to the most likely ids
//! reduced      products whose groups are several processes'
//! select       some rows of a packed weight as one of their own
//! ```
//!
//! A product is one job for the team, in which threads take panels with all rows (of a large batch, a
//! chunk of them), so that a weight is read from memory once.
//!
//! The bits of an output depend on its row, its channel and the layout, and on nothing else: sums
//! of int8 products are exact within a group (int4: a scale group), and groups are added in the
//! order of `tile::Tree`; bf16 products are added one after another along k. Integer formats give
//! the same bits at every level; bf16 at one level.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod epilogue;
mod layout;
mod likely;
mod pack;
mod portable;
mod reduced;
mod schedule;
mod select;
mod tile;

#[cfg(test)]
mod edge_tests;
#[cfg(test)]
mod sharing_tests;
#[cfg(test)]
mod tests;

pub use activations::Input;
pub use epilogue::Output;
pub use layout::{Format, Layout, LinearError, Packed, VERSION};
pub use likely::{Shortlist, greedy, greedy_among, shortlist};
pub use pack::{Int4, pack, pack_int4};
pub use reduced::reduced;
pub(crate) use reduced::{finish, partial};
pub use select::{select, selected};

use half::bf16;

use self::activations::{Activations, Tiles};
use self::epilogue::Finish;
use self::schedule::Schedule;
use self::tile::{Sums, Tree, Work};
use crate::cpu::Cpu;
use crate::level::Level;
use crate::rows::RowsMut;
use crate::vectorise::vectorised;

/// The input is `[rows, k]`; `out` is `[rows, n]`, or `[rows, n / 2]` for gated weights. A row with
/// something infinite or NaN in it gives NaN (in integer formats) or what arithmetic gives (bf16),
/// and leaves other rows alone.
///
/// # Panics
/// If a size does not fit, or the combination of weight, epilogue and output has no meaning.
pub fn linear<'a>(
    cpu: &mut Cpu,
    x: impl Into<Input<'a>>,
    weight: &Packed,
    bias: Option<&[bf16]>,
    out: Output,
) {
    let (level, x) = (cpu.level, x.into());
    let finish = &Finish::new(weight, x.rows.rows(), bias, out);
    product(cpu, x, weight, |panel, _, first, rows, sums| {
        store(level, finish, panel, first, rows, sums);
    });
}

vectorised! {
    fn store(finish: &Finish, panel: usize, first: usize, rows: usize, sums: &Sums) {
        // SAFETY: `product` hands every panel and tile of rows out once.
        unsafe { finish.store(panel, first, &sums.0[..rows]) }
    }
}

/// Call `done(panel, thread, first row, rows, sums)` for every panel and tile of rows.
fn product<'a>(
    cpu: &mut Cpu,
    x: impl Into<Input<'a>>,
    weight: &Packed,
    done: impl Fn(usize, usize, usize, usize, &Sums) + Sync,
) {
    let layout = weight.layout();
    let x = x.into();
    let count = x.rows.rows();
    x.check(layout);
    if count == 0 {
        return;
    }
    let Cpu {
        team,
        level,
        scratch,
    } = cpu;
    let (format, groups) = (layout.format(), layout.k_groups());
    let (most_rows, kernel) = kernel(*level, format);
    let tiles = Tiles::new(count, most_rows);
    let [values, scales, offsets] = activations::sizes(layout, count);
    let schedule = Schedule::new(layout, tiles, values, team.threads());
    let thread_sums = Tree::depth(groups);
    let sums = team.threads() * thread_sums * size_of::<Sums>();
    let rooms = x.room() * team.threads();
    let [values, scales, offsets, rooms, sums] =
        scratch.parts([values, scales, offsets, rooms, sums]);
    let x = Activations::prepare(
        team,
        *level,
        layout,
        x,
        tiles,
        rooms,
        [values, scales, offsets],
    );
    // SAFETY: aligned to 64, and any bytes are valid floats.
    let sums = RowsMut::of(unsafe { sums.align_to_mut::<Sums>().1 }, thread_sums);
    team.run(team.threads(), |_, thread| {
        // SAFETY: a thread is in one task at a time, and has a row of its own.
        let sums = unsafe { sums.part(thread, 0, thread_sums) };
        let mut tree = Tree(sums);
        while let Some(piece) = schedule.take(thread) {
            let parts = piece.tiles.len();
            for (part, tile) in piece.tiles.enumerate() {
                for group in 0..groups {
                    let ahead = match piece.next {
                        _ if parts == 1 && group + 1 < groups => {
                            weight.block(group + 1, piece.panel)
                        }
                        Some(next) if parts == 1 => weight.block(0, next),
                        Some(next) => share(weight.block(group, next), part, parts),
                        None => &[],
                    };
                    let work = Work {
                        format,
                        group,
                        block: weight.block(group, piece.panel),
                        tile: x.tile(tile, group),
                        ahead,
                    };
                    kernel(&work, &mut tree);
                }
                let (first, rows) = tiles.tile(tile);
                done(piece.panel, thread, first, rows, tree.top());
            }
        }
    });
}

/// One of `parts` parts of some bytes, about as many in each.
fn share(bytes: &[u8], part: usize, parts: usize) -> &[u8] {
    let each = bytes.len().div_ceil(parts);
    bytes
        .get(part * each..)
        .map_or(&[], |rest| &rest[..each.min(rest.len())])
}

/// The most rows of a tile, and what computes one.
fn kernel(level: Level, format: Format) -> (usize, fn(&Work, &mut Tree)) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = format;
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => {
            let rows = match format {
                Format::Bf16 | Format::Int8 => avx512::ROWS,
                Format::Int4 { .. } => avx512::INT4_ROWS,
            };
            // SAFETY: `Cpu` only has levels that `Level::detect` found.
            (rows, |work, tree| unsafe { avx512::product(work, tree) })
        }
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => (avx2::ROWS, |work, tree| unsafe {
            avx2::product(work, tree)
        }),
        _ => (portable::ROWS, portable::product),
    }
}
