//! What a run found: a summary of each level, and its requests in compact columns.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use crate::lag::{GeneratorReport, bottleneck_reason};
use crate::level::Measured;
use crate::plan::Level;
use crate::record::{FailureKind, Outcome, Record, TokenSource};
use crate::stats::{Summary, microseconds};

/// A level is `timeout` when more than this share of its requests timed out.
const TIMEOUT_SHARE: f64 = 0.10;
/// The rule of the published table: 90% could not complete.
const PUBLISHED_TIMEOUT_SHARE: f64 = 0.90;

#[derive(Debug, Serialize)]
pub struct Report {
    /// Stopped before its end.
    pub interrupted: bool,
    /// Requests sent, and different prompts there were: if more, prompts were sent again.
    pub prompts_sent: usize,
    pub prompts: usize,
    pub levels: Vec<LevelReport>,
}

/// One row. Latencies are of completed requests; `timed_out` and `failed` stand beside them.
#[derive(Debug, Serialize)]
pub struct LevelReport {
    pub concurrency: Option<usize>,
    pub rate: Option<f64>,
    pub completed: usize,
    pub failed: usize,
    pub timed_out: usize,
    /// Open when the run was stopped.
    pub cancelled: usize,
    /// Sent again, since a connection that was kept for them ended without an answer.
    pub resent: usize,
    /// Unix time that the records' `start_ms` counts from.
    pub started_us: u64,
    /// First send (or scheduled send) to last end.
    pub duration_s: f64,
    /// Of completed requests, over the duration.
    pub output_tok_s: f64,
    pub request_s: f64,
    pub output_tokens: u64,
    pub input_tokens: Option<u64>,
    pub ttft_ms: Summary,
    pub tbt_ms: Summary,
    pub itl_ms: Summary,
    pub max_gap_ms: Summary,
    pub e2e_ms: Summary,
    pub level: LevelState,
    pub level_published_rule: LevelState,
    pub timed_out_share: f64,
    pub failures: BTreeMap<FailureKind, FailureCount>,
    pub token_sources: BTreeMap<TokenSource, usize>,
    pub generator: GeneratorReport,
    pub records: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LevelState {
    Ok,
    Timeout,
}

#[derive(Debug, Clone, Serialize)]
pub struct FailureCount {
    pub count: usize,
    /// The first one's message.
    pub example: String,
}

impl LevelReport {
    pub(crate) fn sum_up(level: &Level, measured: Measured, with_gaps: bool) -> LevelReport {
        let Measured {
            records,
            gaps,
            lag,
            cancelled,
            cpu,
            start_ns,
            started_us,
            wall_s,
        } = measured;
        let done: Vec<&Record> = records
            .iter()
            .filter(|record| record.outcome == Outcome::Completed)
            .collect();
        let timed_out = count(&records, |outcome| *outcome == Outcome::TimedOut);
        let failed = count(&records, |outcome| matches!(outcome, Outcome::Failed(_)));
        let duration_s = duration_s(&records).unwrap_or(wall_s);
        let output_tokens: u64 = done.iter().map(|record| u64::from(record.tokens)).sum();
        let per_second = |number: f64| {
            if duration_s > 0.0 {
                number / duration_s
            } else {
                0.0
            }
        };
        let timed_out_share = timed_out as f64 / records.len().max(1) as f64;
        let of = |value: fn(&Record) -> Option<f64>| {
            Summary::of(done.iter().filter_map(|record| value(record)).collect())
        };
        let ttft_ms = of(ttft_ms);
        let itl_ms = gaps.summary();
        let lag = lag.report();
        let reason = bottleneck_reason(
            &lag,
            cpu.map(|cpu| cpu.run_s),
            wall_s,
            &[ttft_ms.p50, itl_ms.p50],
        );
        LevelReport {
            concurrency: level.concurrency,
            rate: level.rate,
            completed: done.len(),
            failed,
            timed_out,
            cancelled,
            resent: records.iter().filter(|record| record.resent).count(),
            started_us,
            duration_s: microseconds(duration_s),
            output_tok_s: microseconds(per_second(output_tokens as f64)),
            request_s: microseconds(per_second(done.len() as f64)),
            output_tokens,
            input_tokens: done
                .iter()
                .map(|record| record.prompt_tokens.map(u64::from))
                .sum::<Option<u64>>()
                .filter(|_| !done.is_empty()),
            ttft_ms,
            tbt_ms: of(tbt_ms),
            itl_ms,
            max_gap_ms: of(max_gap_ms),
            e2e_ms: of(|record| Some(record.e2e_ns() as f64 / 1e6)),
            level: state(timed_out_share, TIMEOUT_SHARE),
            level_published_rule: state(timed_out_share, PUBLISHED_TIMEOUT_SHARE),
            timed_out_share,
            failures: failures(&records),
            token_sources: done.iter().fold(BTreeMap::new(), |mut sources, record| {
                *sources.entry(record.token_source).or_default() += 1;
                sources
            }),
            generator: GeneratorReport {
                lag,
                cpu_s: cpu.map(|cpu| cpu.run_s),
                cpu_wait_s: cpu.map(|cpu| cpu.wait_s),
                bottleneck: reason.is_some(),
                bottleneck_reason: reason,
            },
            records: columns(&records, start_ns, with_gaps),
        }
    }
}

fn state(timed_out_share: f64, limit: f64) -> LevelState {
    if timed_out_share > limit {
        LevelState::Timeout
    } else {
        LevelState::Ok
    }
}

fn count(records: &[Record], matches: impl Fn(&Outcome) -> bool) -> usize {
    records
        .iter()
        .filter(|record| matches(&record.outcome))
        .count()
}

fn duration_s(records: &[Record]) -> Option<f64> {
    let first = records.iter().map(|record| record.origin_ns).min()?;
    let last = records.iter().map(|record| record.end_ns).max()?;
    Some(last.saturating_sub(first) as f64 / 1e9)
}

fn ttft_ms(record: &Record) -> Option<f64> {
    record.ttft_ns().map(|ns| ns as f64 / 1e6)
}

fn tbt_ms(record: &Record) -> Option<f64> {
    record.tbt_ns().map(|ns| ns / 1e6)
}

fn max_gap_ms(record: &Record) -> Option<f64> {
    (record.chunks >= 2).then_some(record.max_gap_ns as f64 / 1e6)
}

fn failures(records: &[Record]) -> BTreeMap<FailureKind, FailureCount> {
    let mut kinds = BTreeMap::new();
    for record in records {
        if let Outcome::Failed(failure) = &record.outcome {
            kinds
                .entry(failure.kind)
                .or_insert_with(|| FailureCount {
                    count: 0,
                    example: failure.message.clone(),
                })
                .count += 1;
        }
    }
    kinds
}

/// One array a request; times in milliseconds, `start_ms` from the level's start.
fn columns(records: &[Record], start_ns: u64, with_gaps: bool) -> Value {
    let ms = |ns: u64| microseconds(ns as f64 / 1e6);
    let rows = records.iter().map(|record| {
        let outcome = match &record.outcome {
            Outcome::Completed => json!("completed"),
            Outcome::TimedOut => json!("timed_out"),
            Outcome::Failed(failure) => json!(failure.kind),
        };
        let mut row = json!([
            outcome,
            record.prompt,
            ms(record.origin_ns.saturating_sub(start_ns)),
            record
                .sent_ns
                .map(|sent| ms(sent.saturating_sub(record.origin_ns))),
            ttft_ms(record).map(microseconds),
            tbt_ms(record).map(microseconds),
            max_gap_ms(record).map(microseconds),
            ms(record.e2e_ns()),
            record.prompt_tokens,
            record.tokens,
            record.chunks,
            record.status,
            record.turn,
            record.id,
        ]);
        if let (true, Value::Array(row)) = (with_gaps, &mut row) {
            row.push(json!(record.gaps_us));
        }
        row
    });
    let mut names = vec![
        "outcome",
        "prompt",
        "start_ms",
        "send_delay_ms",
        "ttft_ms",
        "tbt_ms",
        "max_gap_ms",
        "e2e_ms",
        "input_tokens",
        "output_tokens",
        "chunks",
        "status",
        "turn",
        "id",
    ];
    if with_gaps {
        names.push("gaps_us");
    }
    json!({"columns": names, "rows": rows.collect::<Vec<_>>()})
}
