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

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::ceiling::{Ceilings, median};
use scalellm_cpu_kernels::cpu::Cpu;
use scalellm_cpu_kernels::linear::{Epilogue, Format, Layout, Output, Packed, linear, pack};
use scalellm_cpu_kernels::pages::Pages;
use scalellm_cpu_kernels::rows::{Rows, RowsMut};

/// What a round of products reads: far above any cache.
const ROUND_BYTES: usize = 160 << 20;
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
    let ceilings = Ceilings::measure(&cpu, SECONDS)?;
    let [int8, bf16_peak] =
        [ceilings.int8_ops_s, ceilings.bf16_ops_s].map(|rate| rate.unwrap_or(f64::NAN));
    let memory = ceilings.read_bytes_s;
    println!(
        "{} with {threads} threads: int8 {:.0} GOP/s, bf16 {:.0} GOP/s, read {:.1} GB/s",
        cpu.level,
        int8 / 1e9,
        bf16_peak / 1e9,
        memory / 1e9
    );
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
        let mut pages = Pages::new(copies * layout.bytes())?;
        let (first, others) = pages.bytes_mut().split_at_mut(layout.bytes());
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
            let seconds = median(SECONDS, &mut round) / copies as f64;
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
