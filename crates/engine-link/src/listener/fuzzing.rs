//! Whatever a gateway may send: messages as bytes, into the listener that an engine embeds.
//!
//! ```text
//! record: one byte that says what (below), and for a message a length-delimited ToEngine
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use prost::Message as _;

use super::config::ListenerConfig;
use super::core::{Attachment, Core, Next};
use super::handle::EngineHandle;
use super::service::Reader;
use super::{Command, EngineInfo, StepOutput, validate};
use crate::proto::{self, FinishReason, ToEngine, to_engine};

/// # Panics
/// If the loop gets what is not valid or more than it may have, or something of it is left when all is over.
pub fn engine_side(mut data: &[u8]) {
    let info = EngineInfo {
        vocab_size: 100,
        max_model_len: 64,
        max_num_seqs: 2,
        epoch: 1,
        ..EngineInfo::default()
    };
    let config = ListenerConfig {
        max_waiting: 3,
        max_sessions: 2,
        max_retained_bytes: 2_000,
        reattach_within: Duration::ZERO,
        ..ListenerConfig::default()
    };
    let limit = info.max_num_seqs as usize + config.max_waiting;
    let core = Core::new(info, config);
    let handle = EngineHandle {
        core: Arc::clone(&core),
    };
    let mut stream: Option<(Reader, Attachment)> = None;
    let mut running = BTreeSet::new();
    while let Some((what, rest)) = data.split_first() {
        data = rest;
        match what % 8 {
            0 => {
                for command in handle.poll(Duration::ZERO) {
                    take(command, &core, &mut running);
                }
                assert!(running.len() <= limit, "{} run", running.len());
            }
            1 => {
                if let Some(key) = running.pop_first() {
                    let ends = what / 8 > 8;
                    handle.emit(vec![output(key, ends)], proto::Load::default());
                    running.extend((!ends).then_some(key));
                }
            }
            2 => {
                if let Some((_, attachment)) = &stream {
                    frames(&core, attachment);
                }
            }
            3 => end(&core, stream.take()),
            4 => handle.emit_kv(Vec::new(), Vec::new(), what / 8 > 8),
            5 => core.reap(),
            _ => {
                let Ok(message) = ToEngine::decode_length_delimited(&mut data) else {
                    break;
                };
                match (message.message, &mut stream) {
                    (Some(to_engine::Message::Hello(hello)), _) => {
                        if let Ok(attachment) = core.attach(&hello) {
                            let reader = Reader::new(Arc::clone(&core), attachment.clone());
                            end(&core, stream.replace((reader, attachment)));
                        }
                    }
                    (Some(message), Some((reader, _))) => reader.take(message),
                    _ => {}
                }
            }
        }
    }
    end(&core, stream);
    core.reap();
    for command in handle.poll(Duration::ZERO) {
        take(command, &core, &mut running);
    }
    assert!(
        running.is_empty(),
        "{} run without a session",
        running.len()
    );
    // Only an idle engine is calibrated.
    let shape = proto::CalibrationShape::default();
    assert_eq!(core.calibrate(vec![shape]).err(), None);
}

/// The stream breaks.
fn end(core: &Core, stream: Option<(Reader, Attachment)>) {
    if let Some((reader, attachment)) = stream {
        drop(reader);
        core.detach(&attachment);
    }
}

fn take(command: Command, core: &Core, running: &mut BTreeSet<u64>) {
    match command {
        Command::Submit(submission) => {
            let submit = &submission.submit;
            assert_eq!(validate(submit, &core.info), Ok(()));
            assert_eq!(submit.prompt_ids.len(), submit.prompt_tokens as usize);
            assert!(running.insert(submission.key), "a key came twice");
        }
        Command::Cancel(key) => {
            running.remove(&key);
        }
        Command::Drain | Command::Stop | Command::KvSnapshot | Command::Calibrate { .. } => {}
    }
}

fn output(key: u64, ends: bool) -> StepOutput {
    let mut output = proto::Output {
        token_ids: vec![1],
        ..proto::Output::default()
    };
    if ends {
        output.set_finish_reason(FinishReason::Length);
    }
    StepOutput { key, output }
}

/// All that the stream is to send now.
fn frames(core: &Core, attachment: &Attachment) {
    let mut last = 0;
    while let Next::Frame(frame) = core.next(attachment, Waker::noop()) {
        if frame.sequence > 0 {
            assert!(frame.sequence > last, "{} after {last}", frame.sequence);
            last = frame.sequence;
        }
    }
}
