use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;

use crate::client::Client;
use crate::connection::Clock;
use crate::error::LoadError;
use crate::level::LevelContext;
use crate::plan::Plan;
use crate::report::Report;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    #[default]
    Warmup,
    Measure,
}

/// How a run stands; the newest replaces the one before.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Progress {
    pub phase: Phase,
    /// Index into the plan's levels.
    pub level: usize,
    /// How many the phase will send, where that is known.
    pub requests: Option<usize>,
    pub elapsed_s: f64,
    pub completed: usize,
    pub failed: usize,
    pub timed_out: usize,
    pub in_flight: usize,
    pub token_chunks: u64,
    pub last_failure: Option<String>,
}

/// A run on a thread of its own; dropping it stops and joins it.
pub struct Run {
    stop: watch::Sender<bool>,
    progress: watch::Receiver<Progress>,
    result: mpsc::Receiver<Result<Report, LoadError>>,
    thread: Option<JoinHandle<()>>,
}

impl Run {
    pub fn start(plan: Plan) -> Result<Run, LoadError> {
        let (stop, stopped) = watch::channel(false);
        let (progress_sender, progress) = watch::channel(Progress::default());
        let (result_sender, result) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("bench-load".into())
            .spawn(move || {
                let result = drive(&plan, stopped, progress_sender);
                // Nobody waits any more when the owner was dropped.
                result_sender.send(result).unwrap_or_default();
            })?;
        Ok(Run {
            stop,
            progress,
            result,
            thread: Some(thread),
        })
    }

    pub fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }

    /// Ends it early: open requests are cancelled, the report holds what was measured.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits for the end; None when it is not there within `at_most`.
    pub fn wait(&mut self, at_most: Duration) -> Option<Result<Report, LoadError>> {
        match self.result.recv_timeout(at_most) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(LoadError::Panicked(
                "its thread ended without a report".into(),
            ))),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic was already reported by `wait`.
            thread.join().unwrap_or_default();
        }
    }
}

fn drive(
    plan: &Plan,
    stop: watch::Receiver<bool>,
    progress: watch::Sender<Progress>,
) -> Result<Report, LoadError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(async {
        let clock = Clock::start();
        let client = Arc::new(Client::new(plan, clock).await?);
        let mut context = LevelContext {
            client: Arc::clone(&client),
            clock,
            max_in_flight: plan.max_in_flight,
            record_gaps: plan.record_gaps,
            stop,
            progress,
        };
        let mut levels = Vec::with_capacity(plan.levels.len());
        for (number, level) in plan.levels.iter().enumerate() {
            levels.push(context.run(number, level).await?);
            if *context.stop.borrow() {
                break;
            }
        }
        let (prompts_sent, prompts) = client.prompts();
        Ok(Report {
            interrupted: *context.stop.borrow(),
            prompts_sent,
            prompts,
            levels,
        })
    });
    // A name lookup may still sit in the runtime's blocking pool.
    runtime.shutdown_timeout(Duration::from_secs(1));
    report
}
