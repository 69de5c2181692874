//! Times of whole requests, under the names of OpenTelemetry's conventions for generative AI
//! (<https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/>).

use crate::metrics::{Histogram, family, label};

/// What a request asks a model for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Chat,
    TextCompletion,
}

impl Operation {
    const ALL: [Operation; 2] = [Operation::Chat, Operation::TextCompletion];

    /// That of a route; `None` for one on which nothing is generated.
    #[must_use]
    pub fn of_route(route: &str) -> Option<Operation> {
        match route {
            "/v1/chat/completions" | "/v1/messages" | "/v1/responses" => Some(Operation::Chat),
            "/v1/completions" => Some(Operation::TextCompletion),
            _ => None,
        }
    }

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Chat => "chat",
            Operation::TextCompletion => "text_completion",
        }
    }
}

/// Who was wrong, as `error.type`: which status it was, `scalellm_requests_total` tells.
const ERRORS: [&str; 3] = ["", "client_error", "server_error"];

/// Of one model and operation.
#[derive(Debug, Default)]
pub struct OperationTimes {
    durations: [Histogram; ERRORS.len()],
    pub first_token: Histogram,
    /// (last - first) / (tokens - 1) of each request.
    pub output_token: Histogram,
}

impl OperationTimes {
    pub fn ended(&self, status: u16, took_us: u64) {
        let error = match status {
            0..400 => 0,
            400..500 => 1,
            _ => 2,
        };
        self.durations[error].observe_us(took_us);
    }
}

/// Of one model.
#[derive(Debug, Default)]
pub struct ModelTimes {
    operations: [OperationTimes; Operation::ALL.len()],
}

impl ModelTimes {
    #[must_use]
    pub fn of(&self, operation: Operation) -> &OperationTimes {
        &self.operations[operation as usize]
    }
}

/// Writes all models' histograms that have a value.
pub fn write<'a>(
    out: &mut String,
    models: impl Iterator<Item = (&'a str, &'a ModelTimes)> + Clone,
) {
    type Pick = fn(&OperationTimes, usize) -> Option<&Histogram>;
    let families: [(&str, &str, Pick); 3] = [
        (
            "gen_ai_server_request_duration_seconds",
            "From a request's first byte to the last of its answer, in the gateway.",
            |times, error| Some(&times.durations[error]),
        ),
        (
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's first byte to its first token, in the gateway.",
            |times, error| (error == 0).then_some(&times.first_token),
        ),
        (
            "gen_ai_server_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1) of each request.",
            |times, error| (error == 0).then_some(&times.output_token),
        ),
    ];
    for (name, help, pick) in families {
        family(out, name, "histogram", help);
        for (model, times) in models.clone() {
            for operation in Operation::ALL {
                let mut labels = format!(
                    "gen_ai_request_model={},gen_ai_operation_name=\"{}\",gen_ai_provider_name=\"scalellm\"",
                    label(model),
                    operation.name()
                );
                for (error, kind) in ERRORS.into_iter().enumerate() {
                    if error == 1 {
                        labels += ",error_type=";
                    }
                    let at = labels.len();
                    if error > 0 {
                        labels += &label(kind);
                    }
                    let histogram = pick(times.of(operation), error);
                    if let Some(histogram) = histogram.filter(|found| !found.is_empty()) {
                        histogram.write(out, name, &labels);
                    }
                    labels.truncate(at);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_request_counts_by_who_was_wrong_and_what_never_was_is_not_told() {
        let times = ModelTimes::default();
        let chat = times.of(Operation::Chat);
        for status in [200, 404, 499, 503] {
            chat.ended(status, 1000);
        }
        chat.first_token.observe_us(500);
        let mut out = String::new();
        write(&mut out, [("m", &times)].into_iter());
        let common = "{gen_ai_request_model=\"m\",gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"scalellm\"";
        let name = "gen_ai_server_request_duration_seconds_count";
        for line in [
            format!("{name}{common}}} 1"),
            format!("{name}{common},error_type=\"client_error\"}} 2"),
            format!("{name}{common},error_type=\"server_error\"}} 1"),
            format!("gen_ai_server_time_to_first_token_seconds_count{common}}} 1"),
        ] {
            assert!(out.lines().any(|l| l == line), "{line} is not in\n{out}");
        }
        assert!(!out.contains("text_completion"));
        assert!(!out.contains("time_per_output_token_seconds_count"));
    }
}
