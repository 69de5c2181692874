//! The last requests with all their times, for profiles. Kept always, so that a profile changes nothing; told when
//! `GET /admin/v1/profile` asks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use scalellm_engine_link::proto;
use serde_json::{Map, Value, json};

use crate::record::{Progress, RequestRecord};
use crate::stages::{Clock, Stage, StageTimes, micros};
use crate::traces::TraceContext;
use crate::written::Written;

/// Requests kept; an older one makes place.
pub const KEPT_REQUESTS: usize = 4096;

/// A request for a model that has ended.
#[derive(Debug, Clone)]
pub struct EndedRequest {
    pub id: Arc<str>,
    pub route: &'static str,
    pub model: Arc<str>,
    pub replica: Option<Arc<str>>,
    pub status: u16,
    pub started_us: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    pub longest_choice_tokens: u64,
    pub replays: u32,
    pub finish: Option<&'static str>,
    /// If it is traced.
    pub trace: Option<TraceContext>,
    pub times: StageTimes,
    first: Option<First>,
    /// Since the start.
    pub last_tokens_us: Option<u64>,
    pub engine_first: Option<Box<proto::StageTimes>>,
    pub engine_last: Option<Box<proto::StageTimes>>,
}

/// The first frame's way: what the gateway had done for it, and when, since the start.
#[derive(Debug, Clone, Copy)]
struct First {
    detokenise_us: u64,
    serialise_us: u64,
    handed_us: u64,
    written_us: Option<u64>,
}

impl EndedRequest {
    /// `None` for a request that named no model. Takes the engine's times out of `progress`.
    #[must_use]
    pub fn new(
        record: &RequestRecord,
        progress: &mut Progress,
        status: u16,
        written: &Written,
        first_serialise_us: u64,
        clock: &Clock,
    ) -> Option<EndedRequest> {
        let model = progress.model.as_ref()?;
        let since_start = |at: Instant| micros(at.saturating_duration_since(record.started));
        let detokenise_us = progress.first_detokenise_us;
        let first = written.first.zip(detokenise_us);
        Some(EndedRequest {
            id: Arc::clone(&record.id),
            route: record.route,
            model: Arc::clone(&model.name),
            replica: progress.replica.clone(),
            status,
            started_us: clock.unix_us(record.started),
            prompt_tokens: progress.prompt_tokens,
            cached_tokens: progress.cached_tokens,
            output_tokens: progress.output_tokens,
            longest_choice_tokens: progress.longest_choice_tokens,
            replays: progress.replays,
            finish: progress.finish,
            trace: record.trace,
            times: progress.times,
            first: first.map(|(frame, detokenise_us)| First {
                detokenise_us,
                serialise_us: first_serialise_us,
                handed_us: since_start(frame.handed),
                written_us: frame.written.map(since_start),
            }),
            last_tokens_us: progress.last_tokens.map(|came| since_start(came.at)),
            engine_first: progress.engine_first.take(),
            engine_last: progress.engine_last.take(),
        })
    }

    fn to_json(&self, sequence: u64) -> Value {
        let stages: Map<String, Value> = self
            .times
            .passed()
            .map(|(stage, us)| (stage.name().to_owned(), us.into()))
            .collect();
        json!({
            "sequence": sequence,
            "id": &*self.id,
            "route": self.route,
            "model": &*self.model,
            "replica": self.replica.as_deref(),
            "status": self.status,
            "started_us": self.started_us,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "longest_choice_tokens": self.longest_choice_tokens,
            "replays": self.replays,
            "stages_us": stages,
            "first": self.first.map(|first| json!({
                "detokenise_us": first.detokenise_us,
                "serialise_us": first.serialise_us,
                "handed_us": first.handed_us,
                "written_us": first.written_us,
            })),
            "last_tokens_us": self.last_tokens_us,
            "engine": self.engine_json(),
        })
    }

    /// Unix times and phases, by the engine's clock.
    fn engine_json(&self) -> Option<Value> {
        let first = self.engine_first.as_ref()?;
        let last = self.engine_last.as_ref();
        Some(json!({
            "received_us": first.received_us,
            "first_scheduled_us": first.first_scheduled_us,
            "first_token_us": first.first_token_us,
            "finished_us": last.map(|last| last.finished_us),
            "steps": last.map(|last| last.steps),
            "preemptions": last.map(|last| last.preemptions),
            "prefill_us": phases_json(&first.prefill),
            "decode_us": last.map(|last| phases_json(&last.decode)),
        }))
    }
}

#[must_use]
pub fn phases_json(phases: &[proto::PhaseTime]) -> Value {
    phases
        .iter()
        .map(|phase| (phase.name.clone(), Value::from(phase.us)))
        .collect()
}

/// Oldest first; each has the number of requests that ended before it.
pub struct RecentRequests {
    kept: Mutex<Kept>,
}

struct Kept {
    next: u64,
    requests: VecDeque<Arc<EndedRequest>>,
}

impl RecentRequests {
    #[must_use]
    pub fn new() -> RecentRequests {
        RecentRequests {
            kept: Mutex::new(Kept {
                next: 0,
                requests: VecDeque::new(),
            }),
        }
    }

    pub fn push(&self, request: Arc<EndedRequest>) {
        let mut kept = self.kept.lock();
        if kept.requests.len() >= KEPT_REQUESTS {
            kept.requests.pop_front();
        }
        kept.requests.push_back(request);
        kept.next += 1;
    }

    /// The number of the request that ends next, and those kept with numbers from `from` on.
    #[must_use]
    pub fn since(&self, from: u64) -> (u64, Vec<Value>) {
        let (next, first, requests) = {
            let kept = self.kept.lock();
            let oldest = kept.next - kept.requests.len() as u64;
            let skipped = usize::try_from(from.saturating_sub(oldest)).unwrap_or(usize::MAX);
            let wanted = kept.requests.iter().skip(skipped).cloned();
            (kept.next, oldest.max(from), wanted.collect::<Vec<_>>())
        };
        let told = (first..).zip(&requests);
        (next, told.map(|(number, r)| r.to_json(number)).collect())
    }
}

/// What was spent on the output before the first frame was handed over.
#[must_use]
pub fn serialised_us(record: &RequestRecord) -> u64 {
    record.times().get_us(Stage::Serialise).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended() -> EndedRequest {
        EndedRequest {
            id: "r".into(),
            route: "/v1/completions",
            model: "m".into(),
            replica: None,
            status: 200,
            started_us: 1,
            prompt_tokens: 1,
            cached_tokens: 0,
            output_tokens: 1,
            longest_choice_tokens: 1,
            replays: 0,
            finish: None,
            trace: None,
            times: StageTimes::default(),
            first: None,
            last_tokens_us: None,
            engine_first: None,
            engine_last: None,
        }
    }

    #[test]
    fn the_oldest_make_place_and_numbers_go_on() {
        let recent = RecentRequests::new();
        for _ in 0..KEPT_REQUESTS + 2 {
            recent.push(Arc::new(ended()));
        }
        let numbers = |from: u64| -> Vec<u64> {
            let (_, told) = recent.since(from);
            told.iter()
                .map(|request| request["sequence"].as_u64().unwrap())
                .collect()
        };
        let next = KEPT_REQUESTS as u64 + 2;
        assert_eq!(recent.since(u64::MAX).0, next);
        let all = numbers(0);
        assert_eq!((all.len(), all[0]), (KEPT_REQUESTS, 2));
        assert_eq!(numbers(next - 1), [next - 1]);
        assert!(numbers(next).is_empty());
    }
}
