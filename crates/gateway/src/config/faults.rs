//! The settings of what happens when a replica fails: the table `[faults]`.

use std::time::Duration;

use scalellm_routing::BreakerSettings;
use serde::{Deserialize, Serialize};

/// Bounds of everything that is tried again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FaultConfig {
    /// A request whose replica dies goes on at another one, from where it was. Without it, only what has not begun is
    /// sent to a second replica.
    pub replay: bool,
    /// How long such a request waits for a replica to go on at, within its deadline.
    pub replay_wait_s: f64,
    /// How long one that has not begun waits for a replica to come, where none is there; 0: it is refused.
    pub replica_wait_s: f64,
    /// Replicas that one choice may outlive.
    pub max_replays: u32,
    /// Retries, and replays, are at most this share of the requests in the long run.
    pub retry_share: f64,
    /// A prompt that was present at two deaths of replicas is refused for this long.
    pub poison_refused_s: f64,
    /// A replica that fails `breaker_failures` requests, and at least half, within this time gets no more.
    pub breaker_window_s: f64,
    pub breaker_failures: u32,
    /// Until it is tried again; doubled each time that fails, up to 16 times.
    pub breaker_open_s: f64,
    /// Requests that try it, each `breaker_open_s`, until one succeeds.
    pub breaker_probes: u32,
    /// What has said nothing for this long is asked for at a second replica or upstream too; 0: never.
    pub hedge_after_s: f64,
    /// Of this share of the requests in the long run, and of a few at once.
    pub hedge_share: f64,
}

impl Default for FaultConfig {
    fn default() -> Self {
        FaultConfig {
            replay: true,
            replay_wait_s: 60.0,
            replica_wait_s: 0.0,
            max_replays: 8,
            retry_share: 0.2,
            poison_refused_s: 600.0,
            breaker_window_s: 10.0,
            breaker_failures: 5,
            breaker_open_s: 5.0,
            breaker_probes: 2,
            hedge_after_s: 0.0,
            hedge_share: 0.05,
        }
    }
}

impl FaultConfig {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// A message that names the key, what it got and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        for (name, value, least) in [
            ("replay_wait_s", self.replay_wait_s, 0.0),
            ("replica_wait_s", self.replica_wait_s, 0.0),
            ("poison_refused_s", self.poison_refused_s, 0.0),
            ("breaker_window_s", self.breaker_window_s, 0.001),
            ("breaker_open_s", self.breaker_open_s, 0.001),
            ("hedge_after_s", self.hedge_after_s, 0.0),
        ] {
            if !(least..=1e7).contains(&value) {
                return Err(format!(
                    "faults.{name}: got {value}, allowed is {least} to 1e7 seconds"
                ));
            }
        }
        for (name, share) in [
            ("retry_share", self.retry_share),
            ("hedge_share", self.hedge_share),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return Err(format!("faults.{name}: got {share}, allowed is 0 to 1"));
            }
        }
        for (name, value) in [
            ("breaker_failures", self.breaker_failures),
            ("breaker_probes", self.breaker_probes),
        ] {
            if value == 0 {
                return Err(format!("faults.{name}: got 0, allowed is 1 or more"));
            }
        }
        Ok(())
    }

    #[must_use]
    pub fn hedge_after(&self) -> Option<Duration> {
        (self.hedge_after_s > 0.0).then(|| Duration::from_secs_f64(self.hedge_after_s))
    }

    #[must_use]
    pub fn replay_wait(&self) -> Duration {
        Duration::from_secs_f64(self.replay_wait_s)
    }

    #[must_use]
    pub fn replica_wait(&self) -> Duration {
        Duration::from_secs_f64(self.replica_wait_s)
    }

    #[must_use]
    pub fn breaker(&self) -> BreakerSettings {
        BreakerSettings {
            window_ms: self.breaker_window_s * 1e3,
            failures: self.breaker_failures,
            open_ms: self.breaker_open_s * 1e3,
            probes: self.breaker_probes,
        }
    }
}
