//! The windows of budgets, all of them by the database's clock and in UTC.

use std::time::Duration;

use chrono::{DateTime, Datelike as _, Months, NaiveDate};

use crate::key::Quota;

const MINUTE_MS: i64 = 60_000;
const DAY_MS: i64 = 24 * 60 * MINUTE_MS;

/// Start of the window that `now_ms` is in, and the time until it ends; a budget without windows starts at 0 and
/// never ends.
#[must_use]
pub fn of(quota: Quota, now_ms: i64) -> (i64, Option<Duration>) {
    let (start_ms, end_ms) = match quota {
        Quota::Concurrency => return (0, None),
        Quota::RequestsPerMinute | Quota::TokensPerMinute => {
            let start_ms = now_ms - now_ms.rem_euclid(MINUTE_MS);
            (start_ms, start_ms + MINUTE_MS)
        }
        Quota::TokensPerDay => {
            let start_ms = now_ms - now_ms.rem_euclid(DAY_MS);
            (start_ms, start_ms + DAY_MS)
        }
        Quota::TokensPerMonth => month(now_ms),
    };
    let left_ms = u64::try_from(end_ms - now_ms).unwrap_or(0);
    (start_ms, Some(Duration::from_millis(left_ms)))
}

fn month(now_ms: i64) -> (i64, i64) {
    let midnight_ms = |day: NaiveDate| {
        day.and_time(chrono::NaiveTime::MIN)
            .and_utc()
            .timestamp_millis()
    };
    DateTime::from_timestamp_millis(now_ms)
        .and_then(|now| now.date_naive().with_day(1))
        .and_then(|first| Some((first, first.checked_add_months(Months::new(1))?)))
        .map_or((0, i64::MAX), |(first, next)| {
            (midnight_ms(first), midnight_ms(next))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_start_at_the_minute_the_day_and_the_month() {
        // 2024-02-29 12:34:56.789 UTC
        let now_ms = 1_709_210_096_789;
        let start = |quota| of(quota, now_ms).0;
        assert_eq!(start(Quota::Concurrency), 0);
        assert_eq!(start(Quota::TokensPerMinute), 1_709_210_040_000);
        assert_eq!(start(Quota::TokensPerDay), 1_709_164_800_000);
        assert_eq!(start(Quota::TokensPerMonth), 1_706_745_600_000);
        let left = of(Quota::TokensPerMonth, now_ms).1.unwrap();
        assert_eq!(
            left,
            Duration::from_millis(1_709_251_200_000 - 1_709_210_096_789)
        );
    }
}
