//! How near the linear kernels come to what the machine can do.
//!
//! ```text
//! cargo run --release -p scalellm-cpu-kernels --example linear [format] [rows,...] [threads] [shape,...]
//! ```
//!
//! Weights are so many that they come from memory each time. A product is 2 rows n k operations.
//! "of peak" and "of read" compare operations and weight bytes a second with ceilings (products of
//! registers alone, and reading memory) that are measured just before: on a shared machine both
//! change from second to second. All figures are medians of the repeats.

use std::error::Error;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::ceiling::{Ceilings, median};
use scalellm_cpu_kernels::cpu::Cpu;
use scalellm_cpu_kernels::linear::{Format, Int4, Layout, Output, Packed, linear, pack, pack_int4};
use scalellm_cpu_kernels::pages::Pages;
use scalellm_cpu_kernels::rows::{Rows, RowsMut};

/// What a round of products reads: far above any cache.
const ROUND_BYTES: usize = 160 << 20;
const REPEATS: usize = 5;
/// Of each repeat: for each ceiling, and for the product.
const CEILING_SECONDS: f64 = 0.015;
const PRODUCT_SECONDS: f64 = 0.06;

/// (name, n, k, groups along k, gated)
const SHAPES: [(&str, usize, usize, usize, bool); 8] = [
    ("qkv", 4096, 1024, 1, false),
    ("o", 1024, 2048, 8, false),
    ("gate_up", 6144, 1024, 1, true),
    ("down", 1024, 3072, 8, false),
    ("lm_head", 151_936, 1024, 1, false),
    ("large down", 4096, 14336, 8, false),
    // What the groups cost, by which ranks get the bits of one process.
    ("o whole", 1024, 2048, 1, false),
    ("down whole", 1024, 3072, 1, false),
];

/// `int4`, `int4-128`, `int4-128-zeros` and the like.
fn int4(name: &str) -> Result<Format, Box<dyn Error>> {
    let (name, zeros) = match name.strip_suffix("-zeros") {
        Some(name) => (name, true),
        None => (name, false),
    };
    let group = match name.strip_prefix("int4") {
        Some("") => 32,
        Some(rest) => rest.trim_start_matches('-').parse()?,
        None => return Err(format!("no format {name}").into()),
    };
    Ok(Format::Int4 { group, zeros })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let format = match arguments.next().as_deref() {
        None | Some("int8") => Format::Int8,
        Some("bf16") => Format::Bf16,
        Some(other) => int4(other)?,
    };
    let rows = arguments.next().unwrap_or("1,8,64,256".to_owned());
    let rows = rows
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<usize>, _>>()?;
    let threads = arguments.next().map_or(Ok(2), |n| n.parse())?;
    let only = arguments.next();

    let mut cpu = Cpu::new(threads, 0)?;
    let mut rng = StdRng::seed_from_u64(1);
    println!("{} with {threads} threads", cpu.level);
    println!(
        "{:>12} {:>5} {:>9} {:>7} {:>8} {:>6} {:>8}   peak GOP/s, read GB/s",
        format!("{format:?}").split(' ').next().unwrap_or(""),
        "rows",
        "us",
        "GOP/s",
        "of peak",
        "GB/s",
        "of read"
    );
    for (name, n, k, k_groups, gated) in SHAPES {
        if only
            .as_ref()
            .is_some_and(|only| !only.split(',').any(|one| one == name))
        {
            continue;
        }
        let layout = Layout::new(format, n, k, k_groups, gated)?;
        let copies = (ROUND_BYTES / layout.bytes()).max(1);
        let mut pages = Pages::new(copies * layout.bytes())?;
        let (first, others) = pages.bytes_mut().split_at_mut(layout.bytes());
        if let Format::Int4 { zeros: true, .. } = format {
            let parts = n * layout.scale_groups();
            let mut whole = |count| {
                (0..count)
                    .map(|_| rng.random_range(0..16))
                    .collect::<Vec<u8>>()
            };
            let (numbers, zeros, scales) = (whole(n * k), whole(parts), vec![0.01; parts]);
            let weight = Int4 {
                numbers: Rows::of(&numbers, k),
                scales: Rows::of(&scales, parts / n),
                zeros: Rows::of(&zeros, parts / n),
            };
            pack_int4(&cpu, &layout, &weight, first);
        } else {
            let weight: Vec<_> = (0..n * k)
                .map(|_| bf16::from_f32(rng.random::<f32>() - 0.5))
                .collect();
            pack(&cpu, &layout, Rows::of(&weight, k), first);
        }
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
            let mut round = |cpu: &mut Cpu| {
                for weight in &weights {
                    let out = RowsMut::of(&mut out, layout.columns());
                    let out = if gated {
                        Output::SiluMul(out)
                    } else {
                        Output::Bf16(out)
                    };
                    linear(cpu, Rows::of(&x, k), weight, None, out);
                }
            };
            let mut repeats = Vec::new();
            for _ in 0..REPEATS {
                let ceilings = Ceilings::measure(&cpu, CEILING_SECONDS)?;
                let peak = match format {
                    Format::Bf16 => ceilings.bf16_ops_s,
                    Format::Int8 | Format::Int4 { .. } => ceilings.int8_ops_s,
                };
                let peak = peak.unwrap_or(f64::NAN);
                let seconds = median(PRODUCT_SECONDS, || round(&mut cpu)) / copies as f64;
                let operations = 2.0 * (rows * n * k) as f64 / seconds;
                let bytes = layout.bytes() as f64 / seconds;
                let read = ceilings.read_bytes_s;
                let of = [operations / peak * 100.0, bytes / read * 100.0];
                repeats.push([seconds, operations, of[0], bytes, of[1], peak, read]);
            }
            let [seconds, operations, of_peak, bytes, of_read, peak, read] =
                std::array::from_fn(|column| {
                    let mut values: Vec<_> = repeats.iter().map(|row| row[column]).collect();
                    values.sort_by(f64::total_cmp);
                    values[REPEATS / 2]
                });
            println!(
                "{name:>12} {rows:>5} {:>9.1} {:>7.0} {of_peak:>7.1}% {:>6.1} {of_read:>7.1}%   {:.0}, {:.1}",
                seconds * 1e6,
                operations / 1e9,
                bytes / 1e9,
                peak / 1e9,
                read / 1e9
            );
        }
    }
    Ok(())
}
