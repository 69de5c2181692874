//! How much work may be done again.
//!
//! A bucket: full at first, each retry takes one, each request put in a share of one, and time fills it slowly. So a
//! burst of retries is bounded by the bucket, and a stream of them by the share: retries never multiply an overload.

/// An empty bucket is full again after this time, even if no request comes.
const FILLED_WITHIN_MS: f64 = 60_000.0;

#[derive(Debug)]
pub struct RetryBudget {
    capacity: f64,
    share: f64,
    left: f64,
    at_ms: f64,
}

impl RetryBudget {
    /// At most `capacity` retries at once, and `share` of the requests in the long run.
    #[must_use]
    pub fn new(capacity: usize, share: f64) -> RetryBudget {
        let capacity = capacity as f64;
        RetryBudget {
            capacity,
            share,
            left: capacity,
            at_ms: 0.0,
        }
    }

    /// A request came that was not there before.
    pub fn request(&mut self) {
        self.left = (self.left + self.share).min(self.capacity);
    }

    /// Takes one retry; false if there is none.
    pub fn take(&mut self, now_ms: f64) -> bool {
        let passed_ms = (now_ms - self.at_ms).max(0.0);
        self.at_ms = now_ms.max(self.at_ms);
        let filled = self.capacity * passed_ms / FILLED_WITHIN_MS;
        self.left = (self.left + filled).min(self.capacity);
        let any = self.left >= 1.0;
        if any {
            self.left -= 1.0;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &mut RetryBudget, now_ms: f64) -> usize {
        (0..1_000).take_while(|_| budget.take(now_ms)).count()
    }

    #[test]
    fn a_burst_is_bounded_and_a_stream_gets_its_share() {
        let mut budget = RetryBudget::new(10, 0.2);
        assert_eq!(taken(&mut budget, 0.0), 10);
        for _ in 0..25 {
            budget.request();
        }
        assert_eq!(taken(&mut budget, 0.0), 5);
        for _ in 0..1_000 {
            budget.request();
        }
        assert_eq!(taken(&mut budget, 0.0), 10);
    }

    #[test]
    fn time_fills_it_within_a_minute() {
        let mut budget = RetryBudget::new(10, 0.0);
        assert_eq!(taken(&mut budget, 1_000.0), 10);
        assert_eq!(taken(&mut budget, 7_500.0), 1);
        assert_eq!(taken(&mut budget, 7_000.0), 0);
        assert_eq!(taken(&mut budget, 100_000.0), 10);
    }
}
