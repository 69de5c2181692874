use proptest::prelude::*;
use scalellm_routing::{Candidate, Policy, Reason, Request, Router};

use crate::support::{idle, prompt_of};

fn of_session(session: u64) -> Request<'static> {
    Request {
        session: Some(session),
        ..prompt_of(100)
    }
}

fn home(fleet: &[Candidate], session: u64) -> usize {
    let mut router = Router::new(Policy::Session);
    let choice = router.pick(fleet, &of_session(session), 0.0);
    choice.expect("there are replicas").index
}

#[test]
fn every_gateway_finds_the_same_replica_in_whatever_order_it_lists_them() {
    let fleet: Vec<Candidate> = (0..5).map(idle).collect();
    let mirrored: Vec<Candidate> = (0..5)
        .map(|index| Candidate {
            id: 4 - index as u64,
            ..idle(index)
        })
        .collect();
    for session in 0..100 {
        assert_eq!(home(&fleet, session), 4 - home(&mirrored, session));
    }
}

#[test]
fn a_replica_that_leaves_moves_its_own_sessions_alone() {
    let fleet: Vec<Candidate> = (0..5).map(idle).collect();
    let fewer: Vec<Candidate> = fleet.iter().copied().filter(|c| c.index != 2).collect();
    let mut counts = [0; 5];
    for session in 0..1000 {
        let before = home(&fleet, session);
        counts[before] += 1;
        if before != 2 {
            assert_eq!(home(&fewer, session), before);
        }
    }
    assert!(
        counts.iter().all(|count| (150..250).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn a_session_leaves_a_replica_that_has_too_much_to_do_and_comes_back() {
    let mut fleet: Vec<Candidate> = (0..3).map(idle).collect();
    let mut router = Router::new(Policy::Session);
    let first = router.pick(&fleet, &of_session(7), 0.0).unwrap();
    assert_eq!(first.reason, Reason::Session);
    fleet[first.index].backlog_tokens = 50_000;
    let second = router.pick(&fleet, &of_session(7), 0.0).unwrap();
    assert_eq!(second.reason, Reason::Moved);
    assert_ne!(second.index, first.index);
    fleet[first.index].backlog_tokens = 0;
    assert_eq!(router.pick(&fleet, &of_session(7), 0.0).unwrap(), first);
}

#[test]
fn without_a_session_the_prefix_decides() {
    let fleet = [idle(0), idle(1)];
    let mut router = Router::new(Policy::Session);
    router.store(1, [[1; 16]]);
    let request = Request {
        hashes: &[[1; 16]],
        block_size: 16,
        ..prompt_of(20)
    };
    let choice = router.pick(&fleet, &request, 0.0).unwrap();
    assert_eq!((choice.index, choice.reason), (1, Reason::Prefix));
}

proptest! {
    #[test]
    fn no_replica_gets_more_than_its_bound(sessions in proptest::collection::vec(0..40_u64, 50..200)) {
        let mut router = Router::new(Policy::Session);
        let mut fleet: Vec<Candidate> = (0..4).map(idle).collect();
        for session in &sessions {
            let index = router.pick(&fleet, &of_session(*session), 0.0).unwrap().index;
            fleet[index].backlog_tokens += 100;
        }
        let most = fleet.iter().map(|c| c.backlog_tokens).max().unwrap_or(0) as f64;
        let mean = sessions.len() as f64 * 100.0 / 4.0;
        // A token takes a millisecond; one request's own come on top of the bound and its slack.
        prop_assert!(most <= 1.25 * (mean + 100.0) + 50.0 + 100.0, "{most} of a mean of {mean}");
    }
}
