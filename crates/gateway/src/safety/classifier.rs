//! An external classifier: a server that answers OpenAI's `POST /moderations`.
//!
//! ```text
//! {"model": "...", "input": "text"}  ->  {"results": [{"flagged": false, ...}]}
//! ```

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use crate::config::safety::{Action, ClassifierConfig, OnFailure};
use crate::error::GatewayError;
use crate::foreign::{Exchange, Upstream};

const MAX_ANSWER_BYTES: usize = 1 << 20;
const MAX_TIMEOUT_S: f64 = 600.0;

pub struct Classifier {
    upstream: Arc<Upstream>,
    model: Option<String>,
    timeout: Duration,
    pub on_failure: OnFailure,
    every_chars: usize,
    context_chars: usize,
}

#[derive(Deserialize)]
struct Answer {
    results: Vec<Verdict>,
}

#[derive(Deserialize)]
struct Verdict {
    flagged: bool,
}

impl Classifier {
    /// `path` is the hook's place in the configuration.
    ///
    /// # Errors
    /// `GatewayError::Config` names the key, what it got and what is allowed.
    pub fn start(config: &ClassifierConfig, path: &str) -> Result<Classifier, GatewayError> {
        let bad =
            |key: &str, what: String| Err(GatewayError::Config(format!("{path}.{key}: {what}")));
        if config.action == Action::Mask {
            let what = "got \"mask\", allowed are \"refuse\" and \"stop\": a classifier does not say where";
            return bad("action", what.to_owned());
        }
        if !(config.timeout_s > 0.0 && config.timeout_s <= MAX_TIMEOUT_S) {
            let what = format!(
                "got {}, allowed is more than 0 to {MAX_TIMEOUT_S} seconds",
                config.timeout_s
            );
            return bad("timeout_s", what);
        }
        let upstream = config.upstream();
        upstream.validate(path)?;
        Ok(Classifier {
            upstream: Upstream::start_alone(&upstream, path)?,
            model: config.model.clone(),
            timeout: Duration::from_secs_f64(config.timeout_s),
            on_failure: config.on_failure,
            every_chars: config.every_chars,
            context_chars: config.context_chars,
        })
    }

    /// Whether it has something against `text`.
    ///
    /// # Errors
    /// It does not say, or not in time.
    pub async fn flags(&self, text: &str) -> Result<bool, String> {
        let mut question = json!({"input": text});
        if let Some(model) = &self.model {
            question["model"] = model.as_str().into();
        }
        let body = Bytes::from(question.to_string());
        let request = self.upstream.post_json("/moderations", body);
        let asking = async {
            let (head, mut exchange) = Exchange::start(&self.upstream, request, || true).await?;
            let answer = exchange.collect(MAX_ANSWER_BYTES).await?;
            Ok((head.status, answer))
        };
        let (status, answer) = tokio::time::timeout(self.timeout, asking)
            .await
            .map_err(|_| "it did not answer within timeout_s".to_owned())?
            .map_err(|failure: crate::foreign::Failure| failure.to_string())?;
        if !status.is_success() {
            return Err(format!("it answered {status}"));
        }
        let answer: Answer = serde_json::from_slice(&answer)
            .map_err(|error| format!("its answer is not that of /moderations: {error}"))?;
        if answer.results.is_empty() {
            return Err("its answer has no results".to_owned());
        }
        Ok(answer.results.iter().any(|verdict| verdict.flagged))
    }
}

/// One text of an answer: what waits for its verdict, and the end of what was let out.
#[derive(Debug, Default)]
pub struct Judged {
    context: String,
    held: String,
    held_chars: usize,
}

impl Judged {
    pub fn push(&mut self, new: &str) {
        self.held.push_str(new);
        self.held_chars += new.chars().count();
    }

    /// The next part to be judged, as the classifier is to see it; parts begin and end at the same places however the
    /// text came.
    pub fn next(&self, classifier: &Classifier, last: bool) -> Option<String> {
        let part = self.part(classifier.every_chars, last)?;
        Some(format!("{}{}", self.context, &self.held[..part]))
    }

    /// Lets that part out.
    pub fn release(&mut self, classifier: &Classifier, last: bool, out: &mut String) {
        let Some(part) = self.part(classifier.every_chars, last) else {
            return;
        };
        let released: String = self.held.drain(..part).collect();
        self.held_chars -= released.chars().count();
        out.push_str(&released);
        self.context.push_str(&released);
        let kept = classifier.context_chars;
        let from = match kept.checked_sub(1) {
            None => self.context.len(),
            Some(before) => self
                .context
                .char_indices()
                .nth_back(before)
                .map_or(0, |(at, _)| at),
        };
        self.context.drain(..from);
    }

    /// Where the next part ends.
    fn part(&self, every_chars: usize, last: bool) -> Option<usize> {
        if every_chars > 0 && self.held_chars >= every_chars {
            let mut ends = self.held.char_indices().skip(every_chars);
            return Some(ends.next().map_or(self.held.len(), |(at, _)| at));
        }
        (last && !self.held.is_empty()).then_some(self.held.len())
    }
}
