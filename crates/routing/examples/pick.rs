//! What a choice costs the gateway: `cargo run --release -p scalellm-routing --example pick`

use std::hint::black_box;
use std::time::Instant;

use scalellm_routing::{Candidate, Policy, Request, Router, StepCost, block_hashes};

const BLOCK: usize = 16;
const ROUNDS: u32 = 200;

fn main() {
    println!("replicas, prompt tokens, cached: hash us, pick us (median of {ROUNDS})");
    for replicas in [1, 4, 64] {
        for tokens in [128_usize, 8_192, 65_536] {
            for cached in [0, tokens] {
                let (hash_us, pick_us) = measure(replicas, tokens, cached);
                println!("{replicas:3} {tokens:6} {cached:6}: {hash_us:8.1} {pick_us:8.1}");
            }
        }
    }
}

fn measure(replicas: usize, tokens: usize, cached: usize) -> (f64, f64) {
    let cost = StepCost {
        fixed_ms: 10.0,
        token_ms: 0.05,
        attended_ms: 0.0,
        request_ms: 0.3,
    };
    let fleet: Vec<Candidate> = (0..replicas)
        .map(|index| Candidate {
            index,
            block_size: BLOCK as u32,
            cost,
            ..Candidate::default()
        })
        .collect();
    let mut router = Router::new(Policy::Prefix);
    let (mut hashing, mut picking) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Another prompt each time, so that none is expected from the last.
        let first = round * 100_000;
        let ids: Vec<u32> = (first..first + tokens as u32).collect();
        let began = Instant::now();
        let hashes = block_hashes(black_box(&ids), BLOCK, b"");
        hashing.push(began.elapsed());
        for index in 0..replicas {
            router.store(index, hashes[..cached / BLOCK].iter().copied());
        }
        let request = Request {
            prompt_tokens: tokens,
            hashes: &hashes,
            block_size: BLOCK as u32,
            ..Request::default()
        };
        let began = Instant::now();
        black_box(router.pick(&fleet, &request, f64::from(round) * 1e5));
        picking.push(began.elapsed());
    }
    let median_us = |times: &mut Vec<std::time::Duration>| {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e6
    };
    (median_us(&mut hashing), median_us(&mut picking))
}
