//! When an open loop sends: offsets from the level's start, drawn before anything is sent.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::plan::ArrivalProcess;

/// The endless, ascending send times of one level.
pub struct Arrivals {
    process: ArrivalProcess,
    rate: f64,
    at_s: f64,
    random: StdRng,
}

impl Arrivals {
    /// `rate` in requests per second, positive. Equal seeds give equal times.
    pub fn new(process: ArrivalProcess, rate: f64, seed: u64) -> Arrivals {
        Arrivals {
            process,
            rate,
            at_s: 0.0,
            random: StdRng::seed_from_u64(seed),
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let due = Duration::try_from_secs_f64(self.at_s).ok()?;
        let mean_gap_s = 1.0 / self.rate;
        self.at_s += match self.process {
            // Inverse of the exponential distribution; 1 - u is never zero.
            ArrivalProcess::Poisson => -(1.0 - self.random.random::<f64>()).ln() * mean_gap_s,
            ArrivalProcess::Constant => mean_gap_s,
        };
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(process: ArrivalProcess, seed: u64) -> Vec<f64> {
        let times: Vec<_> = Arrivals::new(process, 50.0, seed).take(20_001).collect();
        times
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
            .collect()
    }

    #[test]
    fn poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() {
        let gaps = gaps(ArrivalProcess::Poisson, 7);
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.02).abs() < 0.0006, "mean {mean}");
        assert!(
            (variance.sqrt() / mean - 1.0).abs() < 0.05,
            "spread {}",
            variance.sqrt() / mean
        );
    }

    #[test]
    fn constant_gaps_are_equal() {
        assert!(
            gaps(ArrivalProcess::Constant, 7)
                .iter()
                .all(|gap| (gap - 0.02).abs() < 1e-6)
        );
    }

    #[test]
    fn the_seed_decides_the_times() {
        let (poisson, first) = (ArrivalProcess::Poisson, gaps(ArrivalProcess::Poisson, 1));
        assert_eq!(first, gaps(poisson, 1));
        assert_ne!(first, gaps(poisson, 2));
    }
}
