//! Percentiles: exact over requests, and a bounded histogram over pooled gaps.

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::error::LoadError;

/// Mean and percentiles in milliseconds; all null when nothing was measured.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    pub mean: Option<f64>,
    pub p50: Option<f64>,
    pub p90: Option<f64>,
    pub p99: Option<f64>,
    pub max: Option<f64>,
}

impl Summary {
    /// Exact, of values in milliseconds; percentiles interpolate linearly between the two
    /// nearest ranks, as numpy's default does.
    pub fn of(mut values_ms: Vec<f64>) -> Summary {
        if values_ms.is_empty() {
            return Summary::default();
        }
        values_ms.sort_by(f64::total_cmp);
        let mean = values_ms.iter().sum::<f64>() / values_ms.len() as f64;
        let at = |quantile| Some(microseconds(interpolate(&values_ms, quantile)));
        Summary {
            mean: Some(microseconds(mean)),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

fn interpolate(sorted: &[f64], quantile: f64) -> f64 {
    let rank = quantile * (sorted.len() - 1) as f64;
    let (below, above) = (rank.floor() as usize, rank.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * rank.fract()
}

/// Milliseconds rounded to whole microseconds.
pub(crate) fn microseconds(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

/// Gaps from 1 microsecond to an hour within 0.1%, in constant memory.
pub struct Gaps {
    histogram: Histogram<u64>,
}

const HOUR_US: u64 = 3_600_000_000;

impl Gaps {
    pub fn new() -> Result<Gaps, LoadError> {
        let histogram = Histogram::new_with_bounds(1, HOUR_US, 3)
            .map_err(|error| LoadError::Start(std::io::Error::other(error)))?;
        Ok(Gaps { histogram })
    }

    pub fn record_ns(&mut self, gap_ns: u64) {
        self.histogram.saturating_record(gap_ns / 1000);
    }

    pub fn is_empty(&self) -> bool {
        self.histogram.is_empty()
    }

    pub fn summary(&self) -> Summary {
        if self.is_empty() {
            return Summary::default();
        }
        let ms = |us: f64| Some(microseconds(us / 1e3));
        let at = |quantile| ms(self.histogram.value_at_quantile(quantile) as f64);
        Summary {
            mean: ms(self.histogram.mean()),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: ms(self.histogram.max() as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate_as_numpy_does() {
        let summary = Summary::of((1..=10).rev().map(f64::from).collect());
        assert_eq!(summary.mean, Some(5.5));
        assert_eq!(summary.p50, Some(5.5));
        assert_eq!(summary.p90, Some(9.1));
        assert_eq!(summary.p99, Some(9.91));
        assert_eq!(summary.max, Some(10.0));
    }

    #[test]
    fn one_value_is_every_percentile_and_no_value_is_null() {
        let summary = Summary::of(vec![3.0]);
        assert_eq!((summary.p50, summary.p99), (Some(3.0), Some(3.0)));
        let none = serde_json::to_value(Summary::of(vec![])).expect("JSON");
        assert_eq!(none["p50"], serde_json::Value::Null);
    }

    #[test]
    fn pooled_gaps_keep_three_digits_and_never_overflow() {
        let mut gaps = Gaps::new().expect("histogram");
        (0..1000).for_each(|_| gaps.record_ns(10_000_000));
        gaps.record_ns(2_000_000_000);
        gaps.record_ns(u64::MAX);
        let summary = gaps.summary();
        assert!((summary.p50.expect("p50") - 10.0).abs() < 0.02);
        assert!(summary.max.expect("max") >= 3_600_000.0);
    }
}
