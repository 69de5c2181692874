use proptest::prelude::*;
use scalellm_routing::{Candidate, Request};

pub(crate) fn idle(index: usize) -> Candidate {
    Candidate {
        index,
        id: index as u64,
        max_num_seqs: 64,
        step_ms: 20.0,
        block_size: 16,
        ..Candidate::default()
    }
}

pub(crate) fn prompt_of(prompt_tokens: usize) -> Request<'static> {
    Request {
        prompt_tokens,
        ..Request::default()
    }
}

pub(crate) fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let one = (
        0..300_u32,
        0..300_u32,
        0..100_000_u64,
        0.0..2000.0_f32,
        0..300_u32,
        0..300_usize,
        0..50_000_usize,
    );
    proptest::collection::vec(one, 1..8).prop_map(|all| {
        all.into_iter()
            .enumerate()
            .map(
                |(
                    index,
                    (
                        running,
                        waiting,
                        backlog_tokens,
                        step_ms,
                        max_num_seqs,
                        own_requests,
                        own_tokens,
                    ),
                )| {
                    Candidate {
                        index,
                        running,
                        waiting,
                        backlog_tokens,
                        step_ms,
                        max_num_seqs,
                        own_requests,
                        own_tokens,
                        ..idle(index)
                    }
                },
            )
            .collect()
    })
}
