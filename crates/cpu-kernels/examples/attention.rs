//! Attention against what this machine can read and multiply.
//!
//! `cargo run --release -p scalellm-cpu-kernels --example attention [threads] [level]`
//!
//! Qwen3-0.6B's heads: 16 of queries, 8 of keys and values, 128 numbers each. Decode is given as
//! the share of the bandwidth with which the same threads read the same amount of memory, prefill
//! as a share of what dot products of bf16 reach in registers (AVX-512 only). Medians of 9.

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use scalellm_cpu_kernels::attention::{
    Batch, Cache, KvLayout, KvType, Scoring, Span, attend, store,
};
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::ceiling::Ceilings;
use scalellm_cpu_kernels::cpu::Cpu;
use scalellm_cpu_kernels::level::Level;
use scalellm_cpu_kernels::rows::{Rows, RowsMut};

const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const COLS: usize = (HEADS + 2 * KV_HEADS) * DIM;
const REPEATS: usize = 9;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(Ok(2), |threads| threads.parse())?;
    let level = match arguments.next().as_deref() {
        None => Level::detect(),
        Some("avx2") => Level::Avx2,
        Some("avx512") => Level::Avx512,
        Some("portable") => Level::Portable,
        Some(other) => return Err(format!("no level {other}").into()),
    };
    let mut cpu = Cpu::at_level(level, threads, 0)?;
    println!("{level}, {threads} threads");
    // So many layers in turn that no cache holds them.
    for dtype in [KvType::Bf16, KvType::Int8] {
        let layout = KvLayout::new(16, KV_HEADS, DIM, dtype)?;
        for (tokens, layers) in [(161, 8), (2048, 1)] {
            decode(&mut cpu, layout, 64, tokens, layers)?;
        }
        decode(&mut cpu, layout, 1, 8192, 16)?;
    }
    let peak = Ceilings::measure(&cpu, 0.3)?.bf16_ops_s.unwrap_or(f64::NAN);
    for dtype in [KvType::Bf16, KvType::Int8] {
        let layout = KvLayout::new(16, KV_HEADS, DIM, dtype)?;
        for tokens in [128, 512, 2048] {
            prefill(&mut cpu, layout, tokens, peak)?;
        }
    }
    Ok(())
}

fn scoring() -> Scoring {
    Scoring {
        scale: (DIM as f32).sqrt().recip(),
        window: None,
        softcap: None,
    }
}

/// Seconds of the middle one of some runs, after one more.
fn median(mut run: impl FnMut()) -> f64 {
    run();
    let mut seconds: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let began = Instant::now();
            run();
            began.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}

/// Small numbers that differ.
fn numbers(count: usize) -> Vec<bf16> {
    (0..count)
        .map(|i| bf16::from_f32((i * 7919 % 251) as f32 / 125.0 - 1.0))
        .collect()
}

/// One token of each of `sequences` of a length, in each layer.
fn decode(
    cpu: &mut Cpu,
    layout: KvLayout,
    sequences: usize,
    tokens: usize,
    layers: usize,
) -> Result<(), Box<dyn Error>> {
    let each = tokens.div_ceil(layout.block_tokens());
    let blocks = sequences * each;
    let bytes = blocks * layout.bytes_per_block();
    let fill = match layout.dtype() {
        KvType::Bf16 => 0x3f00_3f00_u32, // one half, twice
        KvType::Int8 => 0x3c3c_3c3c,
    };
    let mut memory = vec![fill; layers * bytes / 4];
    let read = {
        let memory = &memory;
        let part = memory.len() / 256;
        let seconds = median(|| {
            cpu.team.run(256, |task, _| {
                let part = &memory[task * part..(task + 1) * part];
                black_box(part.iter().fold([0; 1], |sum, &x| [sum[0] ^ x]));
            });
        });
        (256 * part * 4) as f64 / seconds
    };
    // A sequence's blocks are spread, as they are after a while.
    let tables: Vec<i32> = (0..blocks)
        .map(|i| (i * 7_368_787 % blocks) as i32)
        .collect();
    let spans: Vec<Span> = (0..sequences)
        .map(|s| Span {
            first_row: s,
            start: tokens - 1,
            count: 1,
            table_first: s * each,
        })
        .collect();
    let batch = Batch::new(&spans, &tables, layout.block_tokens(), blocks)?;
    let mut qkv = numbers(sequences * COLS);
    let angles = vec![0.5; sequences * DIM];
    let mut out = vec![bf16::ZERO; sequences * HEADS * DIM];
    let mut caches: Vec<Cache> = memory
        .chunks_mut(bytes / 4)
        .map(|layer| {
            // SAFETY: as long as asked, and borrowed.
            unsafe { Cache::from_raw(layout, layer.as_mut_ptr().cast(), blocks) }
        })
        .collect();
    let storing = median(|| {
        for cache in &mut caches {
            let rows = RowsMut::of(&mut qkv, COLS);
            store(cpu, rows, None, Rows::of(&angles, DIM), cache, &batch);
        }
    });
    // SAFETY: queries are the first columns.
    let query = unsafe { Rows::from_raw(qkv.as_ptr(), sequences, HEADS * DIM, COLS) };
    let seconds = median(|| {
        for cache in &caches {
            attend(
                cpu,
                query,
                cache,
                &batch,
                scoring(),
                RowsMut::of(&mut out, HEADS * DIM),
            );
        }
    });
    let rate = (layers * bytes) as f64 / seconds;
    println!(
        "decode {sequences} x {tokens} {:?}: {:.3} ms a layer, {:.1} GB/s, {:.0}% of {:.1}; \
         storing {:.3} ms",
        layout.dtype(),
        seconds / layers as f64 * 1e3,
        rate / 1e9,
        rate / read * 100.0,
        read / 1e9,
        storing / layers as f64 * 1e3,
    );
    Ok(())
}

/// A whole prompt.
fn prefill(
    cpu: &mut Cpu,
    layout: KvLayout,
    tokens: usize,
    peak: f64,
) -> Result<(), Box<dyn Error>> {
    let blocks = tokens.div_ceil(layout.block_tokens());
    let mut memory = vec![0_u32; blocks * layout.bytes_per_block() / 4];
    // SAFETY: as long as asked, and borrowed.
    let mut cache = unsafe { Cache::from_raw(layout, memory.as_mut_ptr().cast(), blocks) };
    let tables: Vec<i32> = (0..blocks as i32).collect();
    let spans = [Span {
        first_row: 0,
        start: 0,
        count: tokens,
        table_first: 0,
    }];
    let batch = Batch::new(&spans, &tables, layout.block_tokens(), blocks)?;
    let mut qkv = numbers(tokens * COLS);
    let angles = vec![0.5; tokens * DIM];
    let storing = median(|| {
        let rows = RowsMut::of(&mut qkv, COLS);
        store(cpu, rows, None, Rows::of(&angles, DIM), &mut cache, &batch);
    });
    let mut out = vec![bf16::ZERO; tokens * HEADS * DIM];
    // SAFETY: queries are the first columns.
    let query = unsafe { Rows::from_raw(qkv.as_ptr(), tokens, HEADS * DIM, COLS) };
    let seconds = median(|| {
        attend(
            cpu,
            query,
            &cache,
            &batch,
            scoring(),
            RowsMut::of(&mut out, HEADS * DIM),
        );
    });
    // A product and a sum for each number of each key and value that a row sees.
    let operations = (tokens * (tokens + 1) / 2 * HEADS * DIM * 4) as f64;
    println!(
        "prefill {tokens} {:?}: {:.3} ms, {:.0} GFLOP/s, {:.0}% of {:.0}; storing {:.3} ms",
        layout.dtype(),
        seconds * 1e3,
        operations / seconds / 1e9,
        operations / seconds / peak * 100.0,
        peak / 1e9,
        storing * 1e3,
    );
    Ok(())
}
