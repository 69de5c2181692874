//! What the generator itself adds to the times it reports.

use serde::Serialize;

use crate::error::LoadError;
use crate::stats::{Gaps, Summary};

/// How late the generator was, within one level.
pub(crate) struct Lag {
    /// From when a request was due (its scheduled send, or its client being free) to its first
    /// byte, connecting left out: that is the server's doing.
    pub send: Gaps,
    /// From when a probe was due to when the event loop saw it: what a chunk waits to be read.
    pub wake: Gaps,
}

#[derive(Debug, Clone, Serialize)]
pub struct LagReport {
    pub send_ms: Summary,
    pub read_ms: Summary,
}

impl Lag {
    pub fn new() -> Result<Lag, LoadError> {
        Ok(Lag {
            send: Gaps::new()?,
            wake: Gaps::new()?,
        })
    }

    pub fn report(&self) -> LagReport {
        LagReport {
            send_ms: self.send.summary(),
            read_ms: self.wake.summary(),
        }
    }
}

/// The generator's share of a level, and whether it held the level back.
#[derive(Debug, Clone, Serialize)]
pub struct GeneratorReport {
    pub lag: LagReport,
    /// Processor time of the generator's thread, and time it was ready but not run.
    pub cpu_s: Option<f64>,
    pub cpu_wait_s: Option<f64>,
    pub bottleneck: bool,
    pub bottleneck_reason: Option<String>,
}

/// Lag below this never counts: it is what waking a thread costs.
const TOLERATED_LAG_MS: f64 = 1.0;
/// Otherwise lag may be this share of what is being measured.
const TOLERATED_LAG_SHARE: f64 = 0.05;
const TOLERATED_CPU_SHARE: f64 = 0.9;

/// Says why the generator was the bottleneck, if it was.
///
/// `measured_ms`: the medians that the lag would distort (TTFT, ITL), those that exist.
pub(crate) fn bottleneck_reason(
    lag: &LagReport,
    cpu_s: Option<f64>,
    wall_s: f64,
    measured_ms: &[Option<f64>],
) -> Option<String> {
    if let Some(cpu_s) = cpu_s.filter(|cpu| wall_s > 0.1 && cpu / wall_s > TOLERATED_CPU_SHARE) {
        return Some(format!(
            "its core was busy for {:.0}% of the time",
            cpu_s / wall_s * 100.0
        ));
    }
    let smallest = measured_ms
        .iter()
        .flatten()
        .copied()
        .fold(f64::INFINITY, f64::min);
    let allowed = (smallest * TOLERATED_LAG_SHARE).max(TOLERATED_LAG_MS);
    // The 90th percentile: one preempted moment in a hundred moves a p99, not what was measured.
    for (what, lag) in [("sends", lag.send_ms.p90), ("reads", lag.read_ms.p90)] {
        if let Some(late) = lag.filter(|&late| smallest.is_finite() && late > allowed) {
            return Some(format!(
                "10% of {what} were {late:.1} ms late or more; the smallest median measured is {smallest:.1} ms"
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lag(send_p90: f64, read_p90: f64) -> LagReport {
        let summary = |p90| Summary {
            p90: Some(p90),
            ..Summary::default()
        };
        LagReport {
            send_ms: summary(send_p90),
            read_ms: summary(read_p90),
        }
    }

    #[test]
    fn small_lag_and_lag_small_beside_the_measure_are_fine() {
        assert_eq!(
            bottleneck_reason(&lag(0.9, 0.5), Some(1.0), 10.0, &[Some(2.0)]),
            None
        );
        assert_eq!(
            bottleneck_reason(&lag(4.0, 4.0), None, 10.0, &[Some(1000.0), Some(90.0)]),
            None
        );
    }

    #[test]
    fn late_sends_late_reads_and_a_busy_core_are_named() {
        let reason = |lag, cpu_s| bottleneck_reason(&lag, cpu_s, 10.0, &[Some(50.0), None]);
        assert!(reason(lag(9.0, 0.1), None).expect("late").contains("sends"));
        assert!(reason(lag(0.1, 9.0), None).expect("late").contains("reads"));
        assert!(
            reason(lag(0.1, 0.1), Some(9.5))
                .expect("busy")
                .contains("95%")
        );
    }

    #[test]
    fn a_level_without_answers_blames_nobody() {
        assert_eq!(
            bottleneck_reason(&lag(90.0, 90.0), None, 1.0, &[None, None]),
            None
        );
    }
}
