//! What it costs ranks to add up numbers that each has: an all-reduce through shared memory.
//!
//! ```text
//! cargo run --release -p scalellm-cpu-kernels --example ranks [KB] [ranks] [microseconds between]
//! ```
//!
//! Every rank is a process. A round writes a part, meets the others and adds all parts up, in f32;
//! `between` is how long each computes (spins) before, which decides who waits for whom.

use std::fs::File;
use std::hint::{black_box, spin_loop};
use std::os::fd::{AsFd, FromRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use scalellm_cpu_kernels::ranks::{Ranks, Region, Sizes};

const WARM_UP: usize = 1_000;
const ROUNDS: usize = 20_000;

fn main() {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let mut next = |default| match numbers.next() {
        None => default,
        Some(Ok(number)) => number,
        Some(Err(error)) => panic!("not a number: {error}"),
    };
    let (bytes, ranks, between) = (next(16) * 1024, next(2), next(0));
    let sizes = Sizes {
        ranks,
        letter_bytes: 0,
        slot_bytes: bytes,
    };
    // SAFETY: a name that ends with a zero; the descriptor is checked, and nobody else's.
    let file = unsafe {
        let descriptor = libc::memfd_create(c"ranks".as_ptr(), 0);
        assert!(descriptor >= 0, "no shared memory");
        File::from_raw_fd(descriptor)
    };
    file.set_len(sizes.bytes() as u64).expect("shared memory");
    for rank in 1..ranks {
        // SAFETY: this process has one thread.
        if unsafe { libc::fork() } == 0 {
            measure(&file, sizes, rank, between);
            return;
        }
    }
    let mut took = measure(&file, sizes, 0, between);
    took.sort_unstable();
    let us = |share: f64| took[(took.len() as f64 * share) as usize].as_secs_f64() * 1e6;
    println!(
        "{} KB, {ranks} ranks, {between} us between: p50 {:.1} us, p90 {:.1}, p99 {:.1}",
        bytes / 1024,
        us(0.5),
        us(0.9),
        us(0.99)
    );
}

fn measure(file: &File, sizes: Sizes, rank: usize, between_us: usize) -> Vec<Duration> {
    let region = Region::map(file.as_fd(), sizes).expect("mapped");
    let mut ranks = Ranks::new(Arc::new(region), rank);
    let count = sizes.slot_bytes / 4;
    let (mine, mut sum) = (vec![1.0_f32; count], vec![0.0_f32; count]);
    let mut took = Vec::with_capacity(ROUNDS);
    for round in 0..WARM_UP + ROUNDS {
        let computed = Instant::now();
        while computed.elapsed() < Duration::from_micros(between_us as u64) {
            spin_loop();
        }
        let began = Instant::now();
        // SAFETY: the only slice of it.
        unsafe { ranks.mine::<f32>(1, count).part(0, 0, count) }.copy_from_slice(&mine);
        ranks.meet().expect("all ranks live");
        sum.fill(0.0);
        for part in ranks.parts::<f32>(1, count) {
            for (sum, part) in sum.iter_mut().zip(part.row(0)) {
                *sum += part;
            }
        }
        black_box(&sum);
        if round >= WARM_UP {
            took.push(began.elapsed());
        }
    }
    assert!(sum.iter().all(|&sum| sum == sizes.ranks as f32));
    took
}
