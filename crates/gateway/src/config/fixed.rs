//! What a reload cannot change.

use super::Config;

impl Config {
    /// Takes from `old` what cannot change while the process runs; names what was to.
    pub fn keep_fixed(&mut self, old: &Config) -> Vec<&'static str> {
        fn keep<T: Clone + PartialEq>(
            name: &'static str,
            new: &mut T,
            old: &T,
        ) -> Option<&'static str> {
            let differs = new != old;
            new.clone_from(old);
            differs.then_some(name)
        }
        [
            keep("host", &mut self.host, &old.host),
            keep("port", &mut self.port, &old.port),
            keep("unix_socket", &mut self.unix_socket, &old.unix_socket),
            keep("database_url", &mut self.database_url, &old.database_url),
            keep("database_down", &mut self.database_down, &old.database_down),
            keep(
                "database_timeout_s",
                &mut self.database_timeout_s,
                &old.database_timeout_s,
            ),
            keep("lease_s", &mut self.lease_s, &old.lease_s),
            keep(
                "usage_interval_s",
                &mut self.usage_interval_s,
                &old.usage_interval_s,
            ),
            keep(
                "max_body_memory_bytes",
                &mut self.max_body_memory_bytes,
                &old.max_body_memory_bytes,
            ),
            keep(
                "max_connections",
                &mut self.max_connections,
                &old.max_connections,
            ),
            keep("text_threads", &mut self.text_threads, &old.text_threads),
            keep("text_queue", &mut self.text_queue, &old.text_queue),
            keep(
                "text_cache_bytes",
                &mut self.text_cache_bytes,
                &old.text_cache_bytes,
            ),
            keep("otlp_endpoint", &mut self.otlp_endpoint, &old.otlp_endpoint),
            keep(
                "otlp_sample_ratio",
                &mut self.otlp_sample_ratio,
                &old.otlp_sample_ratio,
            ),
            keep("log_format", &mut self.log_format, &old.log_format),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
