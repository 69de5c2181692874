//! How near the linear kernels come to what the machine can do.
//!
//! ```text
//! cargo run --release -p scalellm-cpu-kernels --example linear [format] [rows,rows,...] [threads]
//! ```
//!
//! Ceilings measured in the same run, on the same threads: VNNI and BF16 products of registers
//! only, and reading memory. Weights are so many that they come from memory each time. A product
//! is 2 rows n k operations; "of peak" and "of read" compare operations and weight bytes a second
//! with the ceilings.

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::cpu::Cpu;
use scalellm_cpu_kernels::level::Level;
use scalellm_cpu_kernels::linear::{Epilogue, Format, Layout, Output, Packed, linear, pack};
use scalellm_cpu_kernels::rows::{Rows, RowsMut};

/// What a round of products reads: far above any cache.
const ROUND_BYTES: usize = 160 << 20;
const READ_BYTES: usize = 512 << 20;
/// Time for each row of the table.
const SECONDS: f64 = 0.35;

/// (name, n, k, groups along k, gated)
const SHAPES: [(&str, usize, usize, usize, bool); 6] = [
    ("qkv", 4096, 1024, 1, false),
    ("o", 1024, 2048, 8, false),
    ("gate_up", 6144, 1024, 1, true),
    ("down", 1024, 3072, 8, false),
    ("lm_head", 151_936, 1024, 1, false),
    ("large down", 4096, 14336, 8, false),
];

/// Memory in huge pages where the kernel gives them.
struct Pages {
    start: *mut u8,
    size: usize,
}

impl Pages {
    fn new(size: usize) -> Self {
        // SAFETY: a fresh anonymous mapping; the answer is checked.
        let start = unsafe {
            let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
            let flags = flags | libc::MAP_ANONYMOUS;
            let start = libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED, "no memory");
            libc::madvise(start, size, libc::MADV_HUGEPAGE);
            start.cast()
        };
        Self { start, size }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: all of the mapping, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

/// Median seconds of calling `what` for a while.
fn median(mut what: impl FnMut()) -> f64 {
    what();
    let began = Instant::now();
    let mut times = Vec::new();
    while began.elapsed().as_secs_f64() < SECONDS || times.len() < 3 {
        let start = Instant::now();
        what();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_loadu_si512,
        _mm512_set1_epi8, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_xor_si512,
    };
    use std::hint::black_box;

    /// Products for each iteration: 13 x 2 vectors of 16 channels, of 4 (int8) or 2 (bf16) each.
    pub const INT8: f64 = 26.0 * 16.0 * 4.0 * 2.0;
    pub const BF16: f64 = 26.0 * 16.0 * 2.0 * 2.0;

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn int8(iterations: usize) {
        let (w, x) = (
            black_box(_mm512_set1_epi8(1)),
            black_box(_mm512_set1_epi8(1)),
        );
        let mut sums = [_mm512_setzero_si512(); 26];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, w, x);
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

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn bf16(iterations: usize) {
        // SAFETY: the same bits.
        let bits = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
        let w = bits(black_box(_mm512_set1_epi8(0)));
        let mut sums = [_mm512_setzero_ps(); 26];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, w, w);
            }
        }
        black_box(sums);
    }
}

/// Operations a second of int8 and of bf16 products in registers, on all threads.
fn peaks(cpu: &Cpu) -> (f64, f64) {
    #[cfg(target_arch = "x86_64")]
    if cpu.level == Level::Avx512 {
        const ITERATIONS: usize = 20_000;
        let rate = |operations: f64, task: fn(usize)| {
            let tasks = cpu.team.threads() * 8;
            let seconds = median(|| cpu.team.run(tasks, |_, _| task(ITERATIONS)));
            operations * (ITERATIONS * tasks) as f64 / seconds
        };
        // SAFETY: the level was detected.
        let int8 = rate(peak::INT8, |n| unsafe { peak::int8(n) });
        // SAFETY: as above.
        let bf16 = rate(peak::BF16, |n| unsafe { peak::bf16(n) });
        return (int8, bf16);
    }
    let _ = cpu;
    (f64::NAN, f64::NAN)
}

/// Bytes a second that all threads read from memory.
fn read(cpu: &Cpu, bytes: &[u8]) -> f64 {
    const PART: usize = 1 << 20;
    let parts: Vec<_> = bytes.chunks(PART).collect();
    let seconds = median(|| {
        cpu.team.run(parts.len(), |index, _| {
            #[cfg(target_arch = "x86_64")]
            if cpu.level == Level::Avx512 {
                // SAFETY: the level was detected.
                unsafe { peak::read(parts[index]) };
                return;
            }
            black_box(parts[index].iter().fold(0, |a, b| a ^ b));
        });
    });
    bytes.len() as f64 / seconds
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let format = match arguments.next().as_deref() {
        None | Some("int8") => Format::Int8,
        Some("bf16") => Format::Bf16,
        Some("int4") => Format::Int4 { group: 32 },
        Some("int4-128") => Format::Int4 { group: 128 },
        Some(other) => return Err(format!("no format {other}").into()),
    };
    let rows = arguments.next().unwrap_or("1,8,64,256".to_owned());
    let rows = rows
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<usize>, _>>()?;
    let threads = arguments.next().map_or(Ok(2), |n| n.parse())?;

    let mut cpu = Cpu::new(threads, 0)?;
    let mut rng = StdRng::seed_from_u64(1);
    let mut pages = Pages::new(READ_BYTES);
    pages.bytes().fill(1);
    let (int8, bf16_peak) = peaks(&cpu);
    let memory = read(&cpu, pages.bytes());
    println!(
        "{} with {threads} threads: int8 {:.0} GOP/s, bf16 {:.0} GOP/s, read {:.1} GB/s",
        cpu.level,
        int8 / 1e9,
        bf16_peak / 1e9,
        memory / 1e9
    );
    drop(pages);
    let peak = if format == Format::Bf16 {
        bf16_peak
    } else {
        int8
    };
    println!(
        "{:>12} {:>5} {:>9} {:>7} {:>8} {:>6} {:>8}",
        format!("{format:?}").split(' ').next().unwrap_or(""),
        "rows",
        "us",
        "GOP/s",
        "of peak",
        "GB/s",
        "of read"
    );
    for (name, n, k, k_groups, gated) in SHAPES {
        let layout = Layout::new(format, n, k, k_groups, gated)?;
        let copies = (ROUND_BYTES / layout.bytes()).max(1);
        let weight: Vec<_> = (0..n * k)
            .map(|_| bf16::from_f32(rng.random::<f32>() - 0.5))
            .collect();
        let mut pages = Pages::new(copies * layout.bytes());
        let (first, others) = pages.bytes().split_at_mut(layout.bytes());
        pack(&cpu, &layout, Rows::of(&weight, k), first);
        for bytes in others.chunks_exact_mut(layout.bytes()) {
            bytes.copy_from_slice(first);
        }
        let bytes = pages.bytes().chunks_exact(layout.bytes());
        let weights = bytes
            .map(|bytes| Packed::new(layout, bytes))
            .collect::<Result<Vec<_>, _>>()?;
        for &rows in &rows {
            let x: Vec<_> = (0..rows * k)
                .map(|_| bf16::from_f32(rng.random::<f32>() - 0.5))
                .collect();
            let mut out = vec![bf16::ZERO; rows * layout.columns()];
            let mut round = || {
                for weight in &weights {
                    let out = RowsMut::of(&mut out, layout.columns());
                    let out = if gated {
                        Output::SiluMul(out)
                    } else {
                        Output::Bf16(out)
                    };
                    linear(&mut cpu, Rows::of(&x, k), weight, Epilogue::default(), out);
                }
            };
            let seconds = median(&mut round) / copies as f64;
            let operations = 2.0 * (rows * n * k) as f64 / seconds;
            let bytes = layout.bytes() as f64 / seconds;
            println!(
                "{name:>12} {rows:>5} {:>9.1} {:>7.0} {:>7.1}% {:>6.1} {:>7.1}%",
                seconds * 1e6,
                operations / 1e9,
                operations / peak * 100.0,
                bytes / 1e9,
                bytes / memory * 100.0
            );
        }
    }
    Ok(())
}
