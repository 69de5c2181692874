//! What is checked of a configuration as a whole, beyond its types.

use super::Config;
use crate::error::GatewayError;
use crate::traces;

impl Config {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn validate(&self) -> Result<(), GatewayError> {
        let bad = |message: String| Err(GatewayError::Config(message));
        for (name, value, low) in [
            ("max_body_bytes", self.max_body_bytes, 1024),
            (
                "max_body_memory_bytes",
                self.max_body_memory_bytes,
                self.max_body_bytes,
            ),
            ("max_in_flight", self.max_in_flight, 1),
            ("max_connections", self.max_connections, 1),
            ("text_queue", self.text_queue, 1),
        ] {
            if value < low {
                return bad(format!("{name}: got {value}, allowed is {low} or more"));
            }
        }
        for (name, value, positive) in [
            ("drain_timeout_s", self.drain_timeout_s, false),
            ("request_timeout_s", self.request_timeout_s, false),
            ("header_timeout_s", self.header_timeout_s, true),
            ("body_timeout_s", self.body_timeout_s, true),
            ("write_timeout_s", self.write_timeout_s, true),
            ("replica_hung_after_s", self.replica_hung_after_s, true),
            ("replica_silence_s", self.replica_silence_s, true),
            ("database_timeout_s", self.database_timeout_s, true),
            ("lease_s", self.lease_s, true),
            ("usage_interval_s", self.usage_interval_s, true),
        ] {
            let allowed = (0.0..=1e7).contains(&value) && !(positive && value == 0.0);
            if !allowed {
                let least = if positive { "more than 0" } else { "0" };
                return bad(format!(
                    "{name}: got {value}, allowed is {least} to 1e7 seconds"
                ));
            }
        }
        for (name, keys) in [
            ("api_keys", &self.api_keys),
            ("admin_keys", &self.admin_keys),
        ] {
            if keys
                .iter()
                .any(|key| key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()))
            {
                return bad(format!(
                    "{name}: every key must be visible ASCII and not empty"
                ));
            }
        }
        if !(self.batch_share > 0.0 && self.batch_share <= 1.0) {
            return bad(format!(
                "batch_share: got {}, allowed is more than 0 to 1",
                self.batch_share
            ));
        }
        if !(1.0..=1000.0).contains(&self.places_per_slot) {
            return bad(format!(
                "places_per_slot: got {}, allowed is 1 to 1000",
                self.places_per_slot
            ));
        }
        if !(0.0..=1.0).contains(&self.otlp_sample_ratio) {
            return bad(format!(
                "otlp_sample_ratio: got {}, allowed is 0 to 1",
                self.otlp_sample_ratio
            ));
        }
        if let Some(endpoint) = &self.otlp_endpoint {
            traces::check_endpoint(endpoint)?;
        }
        for (there, absent, given, missing) in [
            (&self.tls_cert, &self.tls_key, "tls_cert", "tls_key"),
            (&self.tls_key, &self.tls_cert, "tls_key", "tls_cert"),
        ] {
            if there.is_some() && absent.is_none() {
                return bad(format!("{missing}: missing, needed with {given}"));
            }
        }
        self.faults.check().map_err(GatewayError::Config)?;
        if self.models.is_empty() {
            return bad("models: at least one [[models]] is needed".to_owned());
        }
        let mut names = std::collections::HashSet::new();
        for (index, model) in self.models.iter().enumerate() {
            for name in std::iter::once(&model.name).chain(&model.aliases) {
                if name.is_empty() || name.len() > 256 {
                    return bad(format!(
                        "models[{index}].name: got {name:?}, allowed are 1 to 256 bytes"
                    ));
                }
                if !names.insert(name) {
                    return bad(format!("models[{index}].name: {name:?} is used twice"));
                }
            }
            model.validate(index)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::LogFormat;

    const MODEL: &str = "[[models]]\nname = 'm'\npath = '/m'\nreplicas = ['unix:/run/m.sock']\n";

    #[test]
    fn defaults_fill_what_is_left_out() {
        let config = Config::from_toml(MODEL).unwrap();
        assert_eq!((config.port, config.log_format), (8000, LogFormat::Text));
        assert_eq!(config.request_timeout(), Some(Duration::from_secs(3600)));
    }

    #[test]
    fn secrets_that_are_left_out_come_from_the_environment() {
        let given = |name: &str| match name {
            "SCALELLM_API_KEY" => Some("one, two,".to_owned()),
            "SCALELLM_ADMIN_KEY" => Some("root".to_owned()),
            _ => Some(String::new()),
        };
        let config = Config::with_secrets(MODEL, given).unwrap();
        assert_eq!(config.api_keys, ["one", "two"]);
        assert_eq!(config.admin_keys, ["root"]);
        assert_eq!(config.database_url, None);
        let text = format!("api_keys = ['mine']\n{MODEL}");
        let config = Config::with_secrets(&text, given).unwrap();
        assert_eq!(config.api_keys, ["mine"]);
    }

    #[test]
    fn each_bad_key_is_named() {
        for (text, named) in [
            (String::new(), "models"),
            (format!("prot = 1\n{MODEL}"), "prot"),
            (format!("port = 'x'\n{MODEL}"), "port"),
            (format!("max_in_flight = 0\n{MODEL}"), "max_in_flight"),
            (
                format!("log_level = 'verbose'\n{MODEL}"),
                "unknown variant `verbose`, expected one of `error`, `warning`, `info`, `debug`, `trace`",
            ),
            (
                format!("drain_timeout_s = -1.0\n{MODEL}"),
                "drain_timeout_s",
            ),
            (format!("write_timeout_s = nan\n{MODEL}"), "write_timeout_s"),
            (format!("api_keys = ['']\n{MODEL}"), "api_keys"),
            (
                format!("otlp_endpoint = 'collector:4318'\n{MODEL}"),
                "otlp_endpoint: got \"collector:4318\"",
            ),
            (
                format!("otlp_sample_ratio = 2.0\n{MODEL}"),
                "otlp_sample_ratio",
            ),
            (format!("{MODEL}{MODEL}"), "models[1].name"),
            (
                MODEL.replace("'unix:/run/m.sock'", ""),
                "models[0].replicas",
            ),
            (
                MODEL.replace("unix:/run/m.sock", "no port"),
                "models[0].replicas[0]",
            ),
            (MODEL.replace("path = '/m'", ""), "models[0].path"),
            (
                format!("{MODEL}[[models.upstreams]]\nurl = 'x'\n"),
                "models[0].upstreams[0].url",
            ),
            (
                format!("{MODEL}[[models.upstreams]]\nurl = 'http://x'\nwieght = 1\n"),
                "wieght",
            ),
            (
                format!("{MODEL}replicas_weight = 0\n[[models.upstreams]]\nurl = 'http://x'\n"),
                "models[0].replicas_weight: got 0, allowed is 1 to 1000000",
            ),
            (
                format!("{MODEL}replicas_weight = 1\n"),
                "models[0].replicas_weight: allowed only beside both",
            ),
            (
                "[[models]]\nname = 'm'\nreplicas_weight = 1\n[[models.upstreams]]\nurl = 'http://x'\n".to_owned(),
                "models[0].replicas_weight: allowed only beside both",
            ),
            (format!("{MODEL}max_model_len = 0\n"), "max_model_len"),
            (
                format!("{MODEL}routing = 'random'\n"),
                "models[0].routing: got \"random\", allowed are least-load, prefix, shape, session",
            ),
            (
                format!("{MODEL}[faults]\nreplay_wait_s = -1"),
                "faults.replay_wait_s",
            ),
            (
                format!("{MODEL}[faults]\nretry_share = 2"),
                "faults.retry_share",
            ),
            (
                format!("{MODEL}[faults]\nhedge_share = 2"),
                "faults.hedge_share",
            ),
            (
                format!("{MODEL}[faults]\nbreaker_probes = 0"),
                "faults.breaker_probes",
            ),
            (format!("{MODEL}[faults]\nreplays = 1"), "replays"),
        ] {
            let message = Config::from_toml(&text).unwrap_err().to_string();
            assert!(
                message.contains(named),
                "{message:?} does not name {named:?}"
            );
        }
    }
}
