//! A measured speed that follows change and is forgotten when it grows old.

/// Within this time a new speed replaces most of an old one.
const FOLLOW_MS: f64 = 5_000.0;
/// A single observation counts at least this much, however close to the one before.
const MIN_WEIGHT: f64 = 0.1;
/// After this time without observations an estimate has lost most of its say against the fleet's.
const FORGET_MS: f64 = 60_000.0;

/// Exponentially weighted mean of a positive quantity.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Estimate {
    mean: Option<f64>,
    at_ms: f64,
}

impl Estimate {
    /// Takes in `value` seen at `now_ms`; what is not finite and positive is ignored.
    pub(crate) fn observe(&mut self, value: f64, now_ms: f64) {
        if !(value.is_finite() && value > 0.0) {
            return;
        }
        let elapsed_ms = (now_ms - self.at_ms).max(0.0);
        self.mean = Some(match self.mean {
            None => value,
            Some(mean) => {
                let weight = (1.0 - (-elapsed_ms / FOLLOW_MS).exp()).max(MIN_WEIGHT);
                mean + weight * (value - mean)
            }
        });
        self.at_ms = now_ms;
    }

    pub(crate) fn mean(&self) -> Option<f64> {
        self.mean
    }

    /// The mean, drawn towards `prior` as it ages.
    pub(crate) fn aged(&self, prior: f64, now_ms: f64) -> f64 {
        let Some(mean) = self.mean else { return prior };
        prior + trust(now_ms - self.at_ms) * (mean - prior)
    }
}

/// How much a measurement of that age still says: 1 when fresh, towards 0 with time.
pub(crate) fn trust(age_ms: f64) -> f64 {
    (-age_ms.max(0.0) / FORGET_MS).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_a_change_within_its_time_constant() {
        let mut estimate = Estimate::default();
        estimate.observe(1.0, 0.0);
        for step in 1..=100 {
            estimate.observe(3.0, f64::from(step) * 100.0);
        }
        assert!((estimate.mean().unwrap() - 3.0).abs() < 0.1);
    }

    #[test]
    fn is_forgotten_in_favour_of_the_prior() {
        let mut estimate = Estimate::default();
        assert_eq!(estimate.aged(2.0, 0.0), 2.0);
        estimate.observe(10.0, 0.0);
        assert_eq!(estimate.aged(2.0, 0.0), 10.0);
        assert!((estimate.aged(2.0, 600_000.0) - 2.0).abs() < 0.01);
    }

    #[test]
    fn ignores_what_cannot_be_a_speed() {
        let mut estimate = Estimate::default();
        for value in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            estimate.observe(value, 0.0);
        }
        assert_eq!(estimate.mean(), None);
    }
}
