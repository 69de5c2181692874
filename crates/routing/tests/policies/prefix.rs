use proptest::prelude::*;
use scalellm_routing::{
    BlockHash, Candidate, Policy, PrefixIndex, Reason, Request, Router, StepCost, block_hashes,
};

use crate::support::{candidates, idle, prompt_of};

const BLOCK: usize = 16;

fn fleet(count: usize) -> Vec<Candidate> {
    let cost = StepCost {
        fixed_ms: 10.0,
        token_ms: 0.1,
        attended_ms: 0.0,
        request_ms: 0.5,
    };
    (0..count)
        .map(|index| Candidate {
            cost,
            ..idle(index)
        })
        .collect()
}

/// A prompt of `tokens`, its hashes given.
fn prompt(hashes: &[BlockHash], tokens: usize) -> Request<'_> {
    Request {
        hashes,
        block_size: BLOCK as u32,
        ..prompt_of(tokens)
    }
}

fn hashes(tokens: u32) -> Vec<BlockHash> {
    block_hashes(&(0..tokens).collect::<Vec<u32>>(), BLOCK, b"")
}

#[test]
fn the_replica_with_the_longest_prefix_is_chosen() {
    let hashes = hashes(1600);
    let mut router = Router::new(Policy::Prefix);
    router.store(0, hashes[..10].to_vec());
    router.store(2, hashes[..50].to_vec());
    let choice = router.pick(&fleet(3), &prompt(&hashes, 1600), 0.0).unwrap();
    assert_eq!((choice.index, choice.reason), (2, Reason::Prefix));
    assert_eq!(choice.cached_tokens, 800);
    router.remove(2, hashes[..1].to_vec());
    let choice = router.pick(&fleet(2), &prompt(&hashes, 1600), 0.0).unwrap();
    assert_eq!((choice.index, choice.cached_tokens), (0, 160));
}

#[test]
fn one_token_is_always_computed() {
    let hashes = hashes(32);
    let mut router = Router::new(Policy::Prefix);
    router.store(0, hashes.clone());
    let choice = router.pick(&fleet(2), &prompt(&hashes, 32), 0.0).unwrap();
    assert_eq!(choice.cached_tokens, 31);
}

#[test]
fn a_prompt_that_nobody_has_goes_by_load() {
    let hashes = hashes(160);
    let mut fleet = fleet(3);
    fleet[0].backlog_tokens = 1000;
    fleet[1].backlog_tokens = 1000;
    let mut router = Router::new(Policy::Prefix);
    let choice = router.pick(&fleet, &prompt(&hashes, 160), 0.0).unwrap();
    assert_eq!((choice.index, choice.reason), (2, Reason::Cold));
}

#[test]
fn a_prefix_is_worth_the_time_it_saves_and_no_more() {
    let hashes = hashes(1600);
    let mut router = Router::new(Policy::Prefix);
    router.store(0, hashes.clone());
    // 1,600 cached tokens save 160 ms of 181; a tenth more than those is 1,780 tokens of backlog and the last token.
    for (backlog_tokens, expected) in [(1700, Reason::Prefix), (1900, Reason::Spread)] {
        let mut fleet = fleet(2);
        fleet[0].backlog_tokens = backlog_tokens;
        let request = Request {
            max_tokens: Some(1),
            ..prompt(&hashes, 1600)
        };
        let choice = router.pick(&fleet, &request, 0.0).unwrap();
        assert_eq!(choice.reason, expected, "{backlog_tokens}");
        router.forget(1);
    }
}

#[test]
fn a_prompt_on_its_way_counts_until_its_blocks_should_have_come() {
    let hashes = hashes(1600);
    let mut router = Router::new(Policy::Prefix);
    let first = router.pick(&fleet(3), &prompt(&hashes, 1600), 0.0).unwrap();
    assert_eq!(first.reason, Reason::Cold);
    let second = router
        .pick(&fleet(3), &prompt(&hashes, 1600), 10.0)
        .unwrap();
    assert_eq!((second.index, second.reason), (first.index, Reason::Prefix));
    let late = router
        .pick(&fleet(3), &prompt(&hashes, 1600), 60_000.0)
        .unwrap();
    assert_eq!((late.reason, late.cached_tokens), (Reason::Cold, 0));
}

#[test]
fn a_replica_that_restarted_has_nothing() {
    let hashes = hashes(160);
    let mut router = Router::new(Policy::Prefix);
    router.store(1, hashes.clone());
    router.clear(1);
    assert_eq!(router.cached_blocks(), 0);
    let choice = router.pick(&fleet(2), &prompt(&hashes, 160), 0.0).unwrap();
    assert_eq!(choice.reason, Reason::Cold);
}

#[test]
fn blocks_of_another_size_are_not_taken_for_cached() {
    let hashes = hashes(160);
    let mut fleet = fleet(2);
    fleet[0].block_size = 32;
    let mut router = Router::new(Policy::Prefix);
    router.store(0, hashes.clone());
    let choice = router.pick(&fleet, &prompt(&hashes, 160), 0.0).unwrap();
    assert_eq!((choice.reason, choice.cached_tokens), (Reason::Cold, 0));
}

#[test]
fn the_index_is_bounded_and_then_underestimates() {
    let hashes = hashes(1600);
    let mut index = PrefixIndex::with_max_blocks(10);
    index.store(0, hashes.clone());
    index.store(1, hashes.clone());
    assert_eq!(index.len(), 10);
    assert_eq!(index.leading(&hashes, &[0, 1, 2], 0.0), [10, 10, 0]);
    index.remove(0, hashes.clone());
    assert_eq!(index.leading(&hashes, &[0, 1], 0.0), [0, 10]);
}

proptest! {
    /// The index says what a set of hashes for each replica would.
    #[test]
    fn the_index_agrees_with_sets(events in proptest::collection::vec((0..4_usize, 0..20_usize, any::<bool>()), 0..200)) {
        let hashes = hashes(20 * BLOCK as u32);
        let mut index = PrefixIndex::default();
        let mut sets = vec![std::collections::HashSet::new(); 4];
        for (replica, block, stored) in events {
            if stored {
                index.store(replica, [hashes[block]]);
                sets[replica].insert(block);
            } else {
                index.remove(replica, [hashes[block]]);
                sets[replica].remove(&block);
            }
        }
        let expected: Vec<usize> = sets
            .iter()
            .map(|set| (0..20).take_while(|block| set.contains(block)).count())
            .collect();
        prop_assert_eq!(index.leading(&hashes, &[0, 1, 2, 3], 0.0), expected);
    }

    #[test]
    fn any_fleet_gets_a_choice_from_every_policy(
        fleet in candidates(),
        tokens in 0..100_000_usize,
        session in any::<Option<u64>>(),
    ) {
        let hashes = hashes(320);
        for policy in Policy::ALL {
            let mut router = Router::new(policy);
            router.store(0, hashes.clone());
            let request = Request { session, ..prompt(&hashes, tokens) };
            let choice = router.pick(&fleet, &request, 0.0).unwrap();
            prop_assert!(choice.index < fleet.len());
            prop_assert!(choice.predicted_ms.is_finite() && choice.predicted_ms >= 0.0);
            prop_assert!(choice.cached_tokens <= tokens);
        }
    }
}
