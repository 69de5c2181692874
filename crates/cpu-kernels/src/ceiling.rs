//! What this processor can do at most: what kernels are measured against.
//!
//! ```text
//! int8, bf16   products of registers alone, by the instructions that the level's kernels multiply
//!              with: 26 independent sums, as many as hide their latency (12 below AVX-512)
//! read         64-byte loads of memory far larger than any cache, in huge pages
//! ```
//!
//! On all threads of the team together; medians of short runs.

use std::hint::black_box;
use std::io;
use std::time::Instant;

use crate::cpu::Cpu;
use crate::level::Level;
use crate::pages::Pages;

/// Bytes that a reading goes through: far above any cache.
const READ_BYTES: usize = 512 << 20;
const READ_TASK_BYTES: usize = 1 << 20;
/// Iterations of one task of products: about half a millisecond.
const ITERATIONS: usize = 20_000;
const TASKS_PER_THREAD: usize = 8;

/// Rates of a whole team.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Additions and multiplications a second of int8 products; none is known for portable code.
    pub int8_ops_s: Option<f64>,
    /// The same of bf16 products; below AVX-512 of the f32 ones that they are widened to.
    pub bf16_ops_s: Option<f64>,
    pub read_bytes_s: f64,
}

impl Ceilings {
    /// Measure each for about `seconds`.
    ///
    /// # Errors
    /// If there is no memory to read.
    pub fn measure(cpu: &Cpu, seconds: f64) -> io::Result<Self> {
        let mut pages = Pages::new(READ_BYTES)?;
        // Pages that nobody wrote are all the same one.
        pages.bytes_mut().fill(1);
        Ok(Self {
            int8_ops_s: products(cpu, seconds, Product::Int8),
            bf16_ops_s: products(cpu, seconds, Product::Bf16),
            read_bytes_s: read(cpu, seconds, pages.bytes()),
        })
    }
}

/// Median seconds of calling `what`, after once more, for about `seconds` and at least three times.
pub fn median(seconds: f64, mut what: impl FnMut()) -> f64 {
    what();
    let began = Instant::now();
    let mut times = Vec::new();
    while began.elapsed().as_secs_f64() < seconds || times.len() < 3 {
        let start = Instant::now();
        what();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[derive(Clone, Copy)]
enum Product {
    Int8,
    Bf16,
}

/// Operations a second of products of registers.
fn products(cpu: &Cpu, seconds: f64, product: Product) -> Option<f64> {
    let (operations, task) = of_level(cpu.level, product)?;
    let tasks = cpu.team.threads() * TASKS_PER_THREAD;
    let median = median(seconds, || cpu.team.run(tasks, |_, _| task(ITERATIONS)));
    Some((operations * ITERATIONS * tasks) as f64 / median)
}

/// Operations of an iteration, and what runs a number of them.
fn of_level(level: Level, product: Product) -> Option<(usize, fn(usize))> {
    #[cfg(target_arch = "x86_64")]
    return match (level, product) {
        // SAFETY: a level is only made where the processor has it; so in all of these.
        (Level::Avx512, Product::Int8) => Some((avx512::INT8, |n| unsafe { avx512::int8(n) })),
        // SAFETY: as above.
        (Level::Avx512, Product::Bf16) => Some((avx512::BF16, |n| unsafe { avx512::bf16(n) })),
        // SAFETY: as above.
        (Level::Avx2, Product::Int8) => Some((avx2::INT8, |n| unsafe { avx2::int8(n) })),
        // SAFETY: as above.
        (Level::Avx2, Product::Bf16) => Some((avx2::BF16, |n| unsafe { avx2::bf16(n) })),
        (Level::Portable, _) => None,
    };
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (level, product);
        None
    }
}

/// Bytes a second that the team reads of `bytes`.
fn read(cpu: &Cpu, seconds: f64, bytes: &[u8]) -> f64 {
    let parts: Vec<_> = bytes.chunks(READ_TASK_BYTES).collect();
    let median = median(seconds, || {
        cpu.team.run(parts.len(), |index, _| {
            #[cfg(target_arch = "x86_64")]
            if cpu.level == Level::Avx512 {
                // SAFETY: the processor has the level.
                unsafe { avx512::read(parts[index]) };
                return;
            }
            let lines = parts[index].as_chunks::<64>().0.iter();
            let words = lines.map(|line| line.as_chunks::<8>().0);
            black_box(words.fold([0; 8], |mut sums, words| {
                for (sum, &word) in sums.iter_mut().zip(words) {
                    *sum ^= u64::from_ne_bytes(word);
                }
                sums
            }));
        });
    });
    bytes.len() as f64 / median
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_loadu_si512,
        _mm512_set1_epi8, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_xor_si512,
    };
    use std::hint::black_box;

    const SUMS: usize = 26;
    /// 16 channels of 4 inputs (int8) or 2 (bf16) for each sum; a product and an addition each.
    pub const INT8: usize = SUMS * 16 * 4 * 2;
    pub const BF16: usize = SUMS * 16 * 2 * 2;

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn int8(iterations: usize) {
        let (w, x) = (
            black_box(_mm512_set1_epi8(1)),
            black_box(_mm512_set1_epi8(1)),
        );
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, w, x);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn bf16(iterations: usize) {
        // SAFETY: the same bits.
        let bits = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
        let w = bits(black_box(_mm512_set1_epi8(0)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, w, w);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    pub fn read(bytes: &[u8]) {
        let mut sums = [_mm512_setzero_si512(); 8];
        for lines in bytes.as_chunks::<512>().0 {
            for (sum, line) in sums.iter_mut().zip(lines.as_chunks::<64>().0) {
                // SAFETY: 64 bytes are there.
                let line = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
                *sum = _mm512_xor_si512(*sum, line);
            }
        }
        black_box(sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        _mm256_add_epi32, _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_set1_epi16, _mm256_set1_ps,
        _mm256_setzero_ps,
    };
    use std::hint::black_box;

    const SUMS: usize = 12;
    /// 8 channels of 2 inputs (int8, widened to 16 bits) or 1 (f32) for each sum.
    pub const INT8: usize = SUMS * 8 * 2 * 2;
    pub const BF16: usize = SUMS * 8 * 2;

    #[target_feature(enable = "avx2,fma")]
    pub fn int8(iterations: usize) {
        let w = black_box(_mm256_set1_epi16(1));
        let mut sums = [w; SUMS];
        for _ in 0..iterations {
            for sum in &mut sums {
                // Of the sum itself, or one product would do for all.
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, w));
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn bf16(iterations: usize) {
        let w = black_box(_mm256_set1_ps(0.0));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(w, w, *sum);
            }
        }
        black_box(sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_has_ceilings_of_a_plausible_size() {
        let bytes = vec![1; 8 << 20];
        for level in Level::available() {
            let cpu = Cpu::at_level(level, 1, 0).unwrap();
            for product in [Product::Int8, Product::Bf16] {
                let rate = products(&cpu, 0.0, product);
                assert_eq!(rate.is_some(), level > Level::Portable);
                assert!(
                    rate.is_none_or(|rate| (1e8..1e14).contains(&rate)),
                    "{rate:?}"
                );
            }
            assert!((1e7..1e13).contains(&read(&cpu, 0.0, &bytes)));
        }
    }

    #[test]
    fn the_median_is_of_three_calls_at_least_after_one_to_warm_up() {
        let mut calls = 0;
        assert!(median(0.0, || calls += 1) >= 0.0);
        assert_eq!(calls, 4);
    }
}
