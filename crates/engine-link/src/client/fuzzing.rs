//! Whatever an engine may send: frames as bytes, into the tables of a gateway's requests.
//!
//! ```text
//! record: one byte that says what (below), and for a frame a length-delimited FromEngine
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use futures_util::StreamExt as _;
use prost::Message as _;

use super::config::ReplicaConfig;
use super::kv_view::{BlockHash, KvSink};
use super::session::SessionTask;
use super::shared::Shared;
use super::stream::{LostCause, RequestStream};
use super::table::Outgoing;
use crate::address::Address;
use crate::proto::{self, FromEngine};

const MAX_STREAMS: usize = 8;

struct Nowhere;

impl KvSink for Nowhere {
    fn change(&self, _: Vec<BlockHash>, _: Vec<BlockHash>) {}

    fn clear(&self) {}
}

/// A request and how many ids it may yet get.
struct Reader {
    stream: RequestStream,
    room: usize,
}

impl Reader {
    /// Reads what there is. False once it has ended.
    fn read(&mut self, cx: &mut Context<'_>) -> bool {
        loop {
            match self.stream.poll_next_unpin(cx) {
                Poll::Pending => return true,
                Poll::Ready(Some(Ok(output))) => {
                    let ids = output.token_ids.len();
                    assert!(ids <= self.room, "{ids} ids where {} may come", self.room);
                    self.room -= ids;
                }
                Poll::Ready(Some(Err(_))) => {}
                Poll::Ready(None) => return false,
            }
        }
    }
}

/// # Panics
/// If a request gets more than it asked for, or something of it is left when all is over.
pub fn gateway_side(mut data: &[u8]) {
    let config = ReplicaConfig {
        sessions: 1,
        chunk_ids: 2,
        ..ReplicaConfig::default()
    };
    let address = Address::Tcp("localhost:1".to_owned());
    let shared = Shared::new(address, config, Some(Arc::new(Nowhere)));
    let mut task = SessionTask::new(0, Arc::clone(&shared));
    let table = Arc::clone(&shared.tables[0]);
    let mut cx = Context::from_waker(Waker::noop());
    let mut outgoing = attached(&shared);
    let mut readers: Vec<Reader> = Vec::new();
    while let Some((what, rest)) = data.split_first() {
        data = rest;
        match what % 8 {
            0 if readers.len() < MAX_STREAMS => {
                let room = usize::from(what / 8);
                let submit = proto::Submit {
                    prompt_ids: vec![1; 5],
                    max_tokens: u32::from(what / 8),
                    ..proto::Submit::default()
                };
                readers.extend(table.submit(submit).map(|stream| Reader { stream, room }));
            }
            1 => drop(readers.pop()),
            2 => readers.retain_mut(|reader| reader.read(&mut cx)),
            3 => {
                table.detach();
                outgoing = attached(&shared);
            }
            // What is to be sent, a few messages.
            4 => while let Poll::Ready(Some(_)) = outgoing.poll_next_unpin(&mut cx) {},
            _ => {
                let Ok(frame) = FromEngine::decode_length_delimited(&mut data) else {
                    break;
                };
                if let Err(reason) = task.take_frame(frame) {
                    table.lose_all(LostCause::Silent, &reason);
                    outgoing = attached(&shared);
                }
            }
        }
    }
    readers.retain_mut(|reader| reader.read(&mut cx));
    drop(readers);
    table.lose_all(LostCause::Closed, "the end");
    assert_eq!(table.len(), 0);
    for left in [&shared.in_flight.requests, &shared.in_flight.prompt_tokens] {
        assert_eq!(left.load(Ordering::Relaxed), 0);
    }
}

fn attached(shared: &Shared) -> Outgoing {
    let outgoing = shared.tables[0].attach(proto::Hello::default());
    shared.tables[0].welcomed();
    outgoing
}
