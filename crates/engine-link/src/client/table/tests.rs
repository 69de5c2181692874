//! The table without a network: messages are taken, and frames are given, by hand.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use futures_util::Stream;
use proptest::prelude::*;

use super::{Outgoing, SubmitError, Table};
use crate::proto::to_engine::Message;
use crate::proto::{self, FinishReason, RequestRef};

fn table(chunk_ids: usize) -> (Arc<Table>, Outgoing) {
    let table = Table::new(Arc::default(), 100, chunk_ids);
    let mut outgoing = table.attach(proto::Hello::default());
    assert!(matches!(next(&mut outgoing), Some(Message::Hello(_))));
    table.welcomed();
    (table, outgoing)
}

fn poll(outgoing: &mut Outgoing) -> Poll<Option<Message>> {
    let mut cx = Context::from_waker(Waker::noop());
    let polled = Pin::new(outgoing).poll_next(&mut cx);
    polled.map(|message| message.and_then(|m| m.message))
}

/// The next message, behind the pause that may come before it.
fn next(outgoing: &mut Outgoing) -> Option<Message> {
    (0..2).find_map(|_| match poll(outgoing) {
        Poll::Ready(message) => message,
        Poll::Pending => None,
    })
}

fn prompt(length: u32) -> proto::Submit {
    proto::Submit {
        prompt_ids: (0..length).collect(),
        max_tokens: 4,
        ..Default::default()
    }
}

fn output(request: RequestRef, ids: &[u32], reason: FinishReason) -> proto::Output {
    proto::Output {
        request: Some(request),
        token_ids: ids.to_vec(),
        finish_reason: reason as i32,
        ..Default::default()
    }
}

#[test]
fn a_cancel_overtakes_the_rest_of_its_prompt() {
    let (table, mut outgoing) = table(10);
    let stream = table.submit(prompt(1_000)).expect("taken");
    assert!(matches!(next(&mut outgoing), Some(Message::Submit(_))));
    assert!(matches!(next(&mut outgoing), Some(Message::PromptChunk(_))));
    let request = stream.request();
    drop(stream);
    assert_eq!(
        next(&mut outgoing),
        Some(Message::Cancel(proto::Cancel {
            request: Some(request)
        }))
    );
    assert_eq!(next(&mut outgoing), None);
    assert_eq!(table.len(), 1, "until the engine confirms");
    table.deliver(vec![output(request, &[], FinishReason::Cancelled)], vec![]);
    assert_eq!(table.len(), 0);
}

#[test]
fn a_request_cancelled_before_it_was_sent_is_never_sent() {
    let (table, mut outgoing) = table(10);
    drop(table.submit(prompt(5)).expect("taken"));
    assert_eq!(table.len(), 0);
    assert_eq!(next(&mut outgoing), None);
}

#[test]
fn small_requests_pass_between_the_chunks_of_large_ones() {
    let (table, mut outgoing) = table(10);
    let _large: Vec<_> = (0..2)
        .map(|_| table.submit(prompt(100)).expect("taken"))
        .collect();
    let small = table.submit(prompt(3)).expect("taken");
    let mut before = 0;
    while let Some(message) = next(&mut outgoing) {
        if matches!(&message, Message::Submit(submit) if submit.request == Some(small.request())) {
            break;
        }
        before += 1;
    }
    assert!(before <= 6, "{before} messages came first");
}

#[test]
fn the_threads_other_tasks_go_on_between_chunks() {
    let (table, mut outgoing) = table(10);
    let _large = table.submit(prompt(30)).expect("taken");
    assert!(matches!(next(&mut outgoing), Some(Message::Submit(_))));
    for _ in 0..2 {
        assert!(matches!(
            poll(&mut outgoing),
            Poll::Ready(Some(Message::PromptChunk(_)))
        ));
        assert_eq!(poll(&mut outgoing), Poll::Pending);
    }
}

#[test]
fn late_outputs_of_another_attempt_fall_away() {
    let (table, _outgoing) = table(10);
    let mut submit = prompt(3);
    submit.request = Some(RequestRef { id: 0, attempt: 2 });
    let stream = table.submit(submit).expect("taken");
    let request = stream.request();
    assert_eq!(request.attempt, 2);
    let late = RequestRef {
        attempt: 1,
        ..request
    };
    table.deliver(vec![output(late, &[9], FinishReason::Length)], vec![]);
    assert_eq!(table.len(), 1);
    assert_eq!(table.in_flight.prompt_tokens.load(Ordering::Relaxed), 3);
}

#[test]
fn an_engine_that_sends_more_than_max_tokens_is_cut_off() {
    let (table, mut outgoing) = table(10);
    let stream = table.submit(prompt(3)).expect("taken");
    assert!(next(&mut outgoing).is_some());
    table.deliver(
        vec![output(
            stream.request(),
            &[1, 2, 3, 4, 5],
            FinishReason::Unspecified,
        )],
        vec![],
    );
    assert!(matches!(next(&mut outgoing), Some(Message::Cancel(_))));
    assert_eq!(table.in_flight.requests.load(Ordering::Relaxed), 0);
}

#[test]
fn after_a_reattachment_unanswered_requests_and_cancels_go_out_again() {
    let (table, mut outgoing) = table(10);
    let answered = table.submit(prompt(3)).expect("taken");
    let unanswered = table.submit(prompt(25)).expect("taken");
    let dropped = table.submit(prompt(3)).expect("taken");
    while next(&mut outgoing).is_some() {}
    table.deliver(
        vec![output(answered.request(), &[1], FinishReason::Unspecified)],
        vec![],
    );
    let cancelled = dropped.request();
    drop(dropped);
    assert!(next(&mut outgoing).is_some());
    table.detach();
    assert_eq!(
        table.submit(prompt(1)).map(|_| ()),
        Err(SubmitError::NotReady)
    );
    assert_eq!(next(&mut outgoing), None, "the old stream gets nothing");
    let mut again = table.attach(proto::Hello::default());
    table.welcomed();
    let sent: Vec<_> = std::iter::from_fn(|| next(&mut again)).collect();
    assert!(matches!(&sent[0], Message::Hello(_)));
    assert_eq!(
        sent[1],
        Message::Cancel(proto::Cancel {
            request: Some(cancelled)
        })
    );
    assert!(matches!(&sent[2], Message::Submit(s) if s.request == Some(unanswered.request())));
    assert_eq!(sent.len(), 5, "with the two chunks that follow");
    let duplicate = proto::Refusal {
        request: Some(unanswered.request()),
        code: proto::RefusalCode::Duplicate as i32,
        ..Default::default()
    };
    table.deliver(vec![], vec![duplicate]);
    assert_eq!(table.len(), 3, "the engine had it: it runs on");
}

#[test]
fn beyond_its_bound_a_session_is_full() {
    let table = Table::new(Arc::default(), 1, 10);
    let _outgoing = table.attach(proto::Hello::default());
    table.welcomed();
    let first = table.submit(prompt(1)).expect("taken");
    assert_eq!(table.submit(prompt(1)).map(|_| ()), Err(SubmitError::Full));
    drop(first);
    assert!(table.submit(prompt(1)).is_ok());
}

proptest! {
    #[test]
    fn chunks_put_together_are_the_prompts(
        lengths in prop::collection::vec(1u32..200, 1..8),
        chunk_ids in 1usize..50,
    ) {
        let (table, mut outgoing) = table(chunk_ids);
        let streams: Vec<_> = lengths.iter().map(|&n| table.submit(prompt(n)).expect("taken")).collect();
        let mut received: HashMap<RequestRef, (u32, Vec<u32>)> = HashMap::new();
        while let Some(message) = next(&mut outgoing) {
            match message {
                Message::Submit(s) => {
                    prop_assert!(s.prompt_ids.len() <= chunk_ids);
                    received.insert(s.request.expect("named"), (s.prompt_tokens, s.prompt_ids));
                }
                Message::PromptChunk(c) => {
                    prop_assert!(!c.prompt_ids.is_empty() && c.prompt_ids.len() <= chunk_ids);
                    received.get_mut(&c.request.expect("named")).expect("begun").1.extend(c.prompt_ids);
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
        for (stream, length) in streams.iter().zip(lengths) {
            let (announced, ids) = &received[&stream.request()];
            prop_assert_eq!(*announced, length);
            prop_assert_eq!(ids, &(0..length).collect::<Vec<_>>());
        }
    }
}
