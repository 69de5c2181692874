//! Which task computes what, and in which order its parts are put together.
//!
//! ```text
//! span of a few rows      a unit for each split of 512 keys; states are added in a second job
//! span of many rows       a unit for each 64 rows; its splits one after the other
//! piece                   a unit and a kv head
//! ```

use std::f32::consts::LOG2_E;
use std::ops::Range;

use half::bf16;

use super::ahead::Ahead;
use super::batch::{Batch, Span};
use super::layout::Cache;
use super::source::{Source, converted_numbers};
use super::tile::{self, AnyTile, Group, HEADER, ROWS, State, TILE, Tile, VECTORS};
use super::tile::{add_split, finish};
#[cfg(target_arch = "x86_64")]
use super::{avx512, avx512_int8};
use crate::cpu::Cpu;
use crate::rows::{Rows, RowsMut};
use crate::runs::Runs;
use crate::vectorise::vectorised;

/// Keys of one split, beginning at a multiple of it in the sequence.
const SPLIT: usize = 512;
/// Rows (a token's query heads of one kv head are as many) of one unit, unless one token has more.
const UNIT_ROWS: usize = 64;

/// What a query's products with keys become before the softmax.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scoring {
    /// The products are multiplied with it.
    pub scale: f32,
    /// A query sees itself and the window - 1 positions before it.
    pub window: Option<usize>,
    /// Scores become softcap * tanh(score / softcap).
    pub softcap: Option<f32>,
}

impl Scoring {
    /// What products are multiplied with: scores are in base 2, but for those that softcap takes.
    pub(super) fn factor(&self) -> f32 {
        if self.softcap.is_some() {
            self.scale
        } else {
            self.scale * LOG2_E
        }
    }

    /// The first position that a query at `position` sees.
    fn first(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Some tokens of a span and the splits that one task adds up for them.
#[derive(Clone)]
struct Unit<'a> {
    span: &'a Span,
    /// Positions.
    tokens: Range<usize>,
    splits: Range<usize>,
    /// Where the states go if splits are units of their own: the place of the first one's.
    states: Option<usize>,
}

/// What a thread computes at once: a unit for one kv head.
type Piece<'a, 'b> = (&'b Unit<'a>, usize);

/// What every task of a call reads.
struct Job<'a> {
    query: Rows<'a, bf16>,
    source: Source<'a>,
    scoring: Scoring,
    /// Query heads of one kv head.
    group: usize,
    out: RowsMut<'a, bf16>,
}

/// Causal attention of every span over its own sequence, whose keys `store` has stored.
///
/// `query` [T, heads * head_dim] (a view of `store`'s rows); `out` [T, heads * head_dim]. Rows of
/// no span are left alone.
///
/// # Panics
/// If shapes do not fit, or the window is empty.
pub fn attend(
    cpu: &mut Cpu,
    query: Rows<bf16>,
    cache: &Cache,
    batch: &Batch,
    scoring: Scoring,
    out: RowsMut<bf16>,
) {
    let (dim, kv_heads) = (cache.layout().head_dim(), cache.layout().kv_heads());
    let group = query.cols() / dim / kv_heads;
    assert!(
        group > 0 && query.cols() == group * kv_heads * dim,
        "{} columns",
        query.cols()
    );
    assert!(out.cols() == query.cols(), "out's columns");
    assert!(
        batch.rows() <= query.rows() && batch.rows() <= out.rows(),
        "rows"
    );
    assert!(scoring.window != Some(0), "an empty window");
    batch.check(cache);
    let level = cpu.level;
    let source = Source {
        cache,
        batch,
        level,
    };
    let job = Job {
        query,
        source,
        scoring,
        group,
        out,
    };
    let (units, divided, states) = plan(&job, kv_heads);

    let stride = HEADER + dim;
    let unit_rows = (UNIT_ROWS / group).max(1) * group;
    let own = 2 * unit_rows * stride + unit_rows * whole_query(dim) + converted_numbers(dim);
    let threads = cpu.team.threads();
    let team = &cpu.team;
    let [own_bytes, state_bytes] = cpu.scratch.parts([4 * own * threads, 4 * stride * states]);
    let own = numbers(own_bytes, own);
    let states = numbers(state_bytes, stride);
    let pieces = Runs::new(units.len() * kv_heads, threads);
    let piece = |index: usize| (&units[index / kv_heads], index % kv_heads);
    team.run(threads, |_, thread| {
        // SAFETY: a thread is in one task at a time, and has numbers of its own.
        let own = unsafe { own.part(thread, 0, own.cols()) };
        while let Some((index, next)) = pieces.take(thread) {
            job.run(piece(index), next.map(piece), own, &states);
        }
    });
    team.run(divided.len() * kv_heads, |task, _| {
        job.add_up(&divided[task / kv_heads], task % kv_heads, &states);
    });
}

/// Rows of f32 in scratch, which is aligned to 64 bytes.
fn numbers(bytes: &mut [u8], cols: usize) -> RowsMut<'_, f32> {
    // SAFETY: any bytes are numbers, and the slice is borrowed as long as the rows live.
    unsafe {
        RowsMut::from_raw(
            bytes.as_mut_ptr().cast(),
            bytes.len() / 4 / cols,
            cols,
            cols,
        )
    }
}

/// Numbers of f32 that a query as whole numbers takes: its scale, then int16.
fn whole_query(dim: usize) -> usize {
    1 + dim.div_ceil(2)
}

/// Units, the longest first; the whole of each span whose splits are units of their own; how many
/// states these need.
fn plan<'a>(job: &Job<'a>, kv_heads: usize) -> (Vec<Unit<'a>>, Vec<Unit<'a>>, usize) {
    let together = (UNIT_ROWS / job.group).max(1);
    let mut units = Vec::with_capacity(job.source.batch.spans().len());
    let mut divided = Vec::new();
    let mut states = 0;
    for span in job.source.batch.spans() {
        for first in (span.start..span.end()).step_by(together) {
            let tokens = first..span.end().min(first + together);
            let splits = job.scoring.first(first) / SPLIT..(tokens.end - 1) / SPLIT + 1;
            let unit = Unit {
                span,
                tokens,
                splits,
                states: None,
            };
            if span.count > together || unit.splits.len() == 1 {
                units.push(unit);
                continue;
            }
            divided.push(Unit {
                states: Some(states),
                ..unit.clone()
            });
            for split in unit.splits.clone() {
                let splits = split..split + 1;
                units.push(Unit {
                    states: Some(states),
                    splits,
                    ..unit.clone()
                });
                states += span.count * job.group * kv_heads;
            }
        }
    }
    units.sort_by_key(|unit| std::cmp::Reverse(unit.tokens.len() * unit.splits.len()));
    (units, divided, states)
}

impl Job<'_> {
    /// Numbers of a row's state.
    fn stride(&self) -> usize {
        HEADER + self.source.cache.layout().head_dim()
    }

    fn run(
        &self,
        (unit, head): Piece,
        next: Option<Piece>,
        own: &mut [f32],
        states: &RowsMut<f32>,
    ) {
        let rows = unit.tokens.len() * self.group;
        let numbers = rows * self.stride();
        let (sums, own) = own.split_at_mut(numbers);
        let (later, own) = own.split_at_mut(numbers);
        let dim = self.source.cache.layout().head_dim();
        let (queries, tile) = own.split_at_mut(rows * whole_query(dim));
        if self.source.whole_queries() {
            for (row, whole) in queries.chunks_exact_mut(whole_query(dim)).enumerate() {
                let query = self.query(unit, head, row);
                let (scale, whole) = whole.split_at_mut(1);
                let whole = &mut as_int16(whole)[..dim];
                scale[0] = quantise_query(self.source.level, query, whole);
            }
        }
        for split in unit.splits.clone() {
            if split == unit.splits.start {
                self.add_keys((unit, head), next, split, queries, tile, sums);
                continue;
            }
            self.add_keys((unit, head), next, split, queries, tile, later);
            add_states(self.source.level, sums, later, self.stride());
        }
        for (row, sum) in sums.chunks_exact_mut(self.stride()).enumerate() {
            if let Some(first) = unit.states {
                // SAFETY: each unit has its own places, in them each head, in them each row.
                let state = unsafe { states.part(first + head * rows + row, 0, sum.len()) };
                state.copy_from_slice(sum);
            } else {
                self.finish(unit, head, row, sum);
            }
        }
    }

    /// Add the states of a unit whose splits were units of their own, in their order.
    fn add_up(&self, unit: &Unit, head: usize, states: &RowsMut<f32>) {
        let rows = unit.tokens.len() * self.group;
        let kv_heads = self.source.cache.layout().kv_heads();
        let first = unit.states.unwrap_or_default();
        for row in 0..rows {
            let state = |split: usize| {
                let place = first + (split * kv_heads + head) * rows + row;
                // SAFETY: all tasks that wrote states have ended, this one alone has this row's.
                unsafe { states.part(place, 0, self.stride()) }
            };
            let sum = state(0);
            for split in 1..unit.splits.len() {
                add_states(self.source.level, sum, state(split), self.stride());
            }
            self.finish(unit, head, row, sum);
        }
    }

    /// Position and query head of a unit's row.
    fn row(&self, unit: &Unit, head: usize, row: usize) -> (usize, usize) {
        (
            unit.tokens.start + row / self.group,
            head * self.group + row % self.group,
        )
    }

    /// A row's query.
    fn query(&self, unit: &Unit, head: usize, row: usize) -> &[bf16] {
        let dim = self.source.cache.layout().head_dim();
        let (position, head) = self.row(unit, head, row);
        let numbers = self
            .query
            .row(unit.span.first_row + position - unit.span.start);
        &numbers[head * dim..][..dim]
    }

    fn finish(&self, unit: &Unit, head: usize, row: usize, sum: &mut [f32]) {
        let dim = self.source.cache.layout().head_dim();
        let (position, head) = self.row(unit, head, row);
        let row = unit.span.first_row + position - unit.span.start;
        // SAFETY: each row of each head is finished once.
        let out = unsafe { self.out.part(row, head * dim, dim) };
        write_mean(self.source.level, sum, out);
    }

    /// The first position that any row of a unit sees, and one more than the last.
    fn seen(&self, unit: &Unit) -> Range<usize> {
        let first = self
            .scoring
            .first(unit.tokens.start)
            .max(unit.splits.start * SPLIT);
        first..unit.tokens.end.min(unit.splits.end * SPLIT)
    }

    /// The states of a piece's rows after one split; `next` will probably be computed after it.
    fn add_keys(
        &self,
        (unit, head): Piece,
        next: Option<Piece>,
        split: usize,
        whole: &[f32],
        numbers: &mut [f32],
        states: &mut [f32],
    ) {
        for state in states.chunks_exact_mut(self.stride()) {
            State::of(state).clear();
        }
        let all = self.seen(unit);
        let (first, end) = (
            all.start.max(split * SPLIT),
            all.end.min((split + 1) * SPLIT),
        );
        for base in (first / TILE * TILE..end).step_by(TILE) {
            let seen = first.max(base) - base..end.min(base + TILE) - base;
            let tile = self.source.tile(unit.span, head, base, seen, numbers);
            let ahead = |(unit, head): Piece, base| {
                let end = self.seen(unit).end;
                self.source.ahead(unit.span, head, base, end)
            };
            let mut ahead = match next {
                _ if base + TILE < all.end => ahead((unit, head), base + TILE),
                Some(next) => ahead(next, self.seen(next.0).start / TILE * TILE),
                None => Ahead::default(),
            };
            for (place, states) in states.chunks_mut(ROWS * self.stride()).enumerate() {
                let mut group = self.group(unit, head, place * ROWS, base, whole, states);
                self.add_tile(&mut group, &tile, &mut ahead);
            }
        }
    }

    /// The rows from `first` on whose states are given, and what they see of the tile at `base`.
    fn group<'a>(
        &'a self,
        unit: &Unit,
        head: usize,
        first: usize,
        base: usize,
        whole: &'a [f32],
        states: &'a mut [f32],
    ) -> Group<'a> {
        let dim = self.source.cache.layout().head_dim();
        let mut of_int8: [(&[i16], f32); ROWS] = [(&[], 0.0); ROWS];
        let mut queries: [&[bf16]; ROWS] = [&[]; ROWS];
        let mut seen = [const { 0..0 }; ROWS];
        for row in 0..states.len() / self.stride() {
            let position = self.row(unit, head, first + row).0;
            let begin = self.scoring.first(position).clamp(base, base + TILE) - base;
            let end = (position + 1).clamp(base, base + TILE) - base;
            queries[row] = self.query(unit, head, first + row);
            seen[row] = begin..end.max(begin);
            if self.source.whole_queries() {
                let query = &whole[(first + row) * whole_query(dim)..][..whole_query(dim)];
                of_int8[row] = (&from_int16(&query[1..])[..dim], query[0]);
            }
        }
        Group {
            queries,
            whole: of_int8,
            seen,
            states,
        }
    }

    fn add_tile(&self, group: &mut Group, tile: &AnyTile, ahead: &mut Ahead<VECTORS>) {
        if group.seen.iter().all(Range::is_empty) {
            return;
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = ahead;
        match tile {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level above portable is only made where the processor has it.
            AnyTile::Int8(tile) => unsafe {
                avx512_int8::add_tile(group, tile, ahead, &self.scoring);
            },
            #[cfg(target_arch = "x86_64")]
            AnyTile::Bf16(tile) if self.source.dot_products() => {
                // SAFETY: as above.
                unsafe { avx512::add_tile(group, tile, ahead, &self.scoring) };
            }
            AnyTile::Bf16(tile) => add_tile(self.source.level, group, tile, &self.scoring),
        }
    }
}

/// The same memory as pairs of int16.
fn as_int16(numbers: &mut [f32]) -> &mut [i16] {
    // SAFETY: plain numbers, two of 2 bytes for each of 4.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), 2 * numbers.len()) }
}

/// As `as_int16`.
fn from_int16(numbers: &[f32]) -> &[i16] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), 2 * numbers.len()) }
}

vectorised! {
    fn add_tile(group: &mut Group, tile: &Tile, scoring: &Scoring) {
        tile::add_tile(group, tile, scoring);
    }
}

vectorised! {
    fn quantise_query(query: &[bf16], whole: &mut [i16]) -> f32 {
        tile::quantise_query(query, whole)
    }
}

vectorised! {
    fn add_states(sums: &mut [f32], later: &mut [f32], stride: usize) {
        for (sum, later) in sums.chunks_exact_mut(stride).zip(later.chunks_exact_mut(stride)) {
            add_split(&mut State::of(sum), &State::of(later));
        }
    }
}

vectorised! {
    fn write_mean(state: &mut [f32], out: &mut [bf16]) {
        finish(&State::of(state), out);
    }
}
