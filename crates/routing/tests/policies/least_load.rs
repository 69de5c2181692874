use proptest::prelude::*;
use scalellm_routing::{Candidate, Policy, Request, Router, StepCost};

use crate::support::{candidates, idle, prompt_of};

fn router() -> Router {
    Router::new(Policy::LeastLoad)
}

#[test]
fn no_candidate_no_pick() {
    assert_eq!(router().pick(&[], &prompt_of(10), 0.0), None);
}

#[test]
fn predicts_nothing_before_a_prompt_was_measured() {
    let mut policy = router();
    let fleet = [idle(0), idle(1)];
    assert_eq!(policy.predict_first_token_ms(&fleet, 100, 0.0), None);
    policy.observe_prefill(0, 100, 50.0, 0.0);
    assert_eq!(policy.predict_first_token_ms(&[], 100, 0.0), None);
    let predicted_ms = policy.predict_first_token_ms(&fleet, 1000, 0.0).unwrap();
    assert!((499.0..501.0).contains(&predicted_ms), "{predicted_ms}");
}

#[test]
fn what_is_cached_does_not_count() {
    let mut router = router();
    router.store(1, [[1; 16]]);
    let request = Request {
        hashes: &[[1; 16]],
        block_size: 16,
        ..prompt_of(20)
    };
    let choice = router.pick(&[idle(0), idle(1)], &request, 0.0).unwrap();
    assert_eq!((choice.index, choice.cached_tokens), (0, 0));
}

#[test]
fn equal_replicas_take_turns() {
    let mut policy = router();
    let fleet = [idle(0), idle(1), idle(2)];
    let picks: Vec<usize> = (0..6)
        .map(|_| policy.pick(&fleet, &prompt_of(10), 0.0).unwrap().index)
        .collect();
    assert_eq!(picks, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn backlog_weighs_by_measured_speed_and_not_by_count() {
    let mut policy = router();
    policy.observe_prefill(0, 1000, 100.0, 0.0);
    policy.observe_prefill(1, 1000, 1000.0, 0.0);
    let fleet = [
        Candidate {
            backlog_tokens: 2000,
            running: 2,
            ..idle(0)
        },
        idle(1),
    ];
    assert_eq!(policy.pick(&fleet, &prompt_of(1000), 0.0).unwrap().index, 0);
    let fleet = [
        Candidate {
            backlog_tokens: 20_000,
            running: 2,
            ..idle(0)
        },
        idle(1),
    ];
    assert_eq!(policy.pick(&fleet, &prompt_of(1000), 0.0).unwrap().index, 1);
}

#[test]
fn own_tokens_count_before_the_engine_reports_them() {
    let mut policy = router();
    let fleet = [
        Candidate {
            own_tokens: 500,
            own_requests: 1,
            ..idle(0)
        },
        idle(1),
    ];
    for _ in 0..4 {
        assert_eq!(policy.pick(&fleet, &prompt_of(10), 0.0).unwrap().index, 1);
    }
}

#[test]
fn a_full_batch_is_avoided() {
    let mut policy = router();
    let full = Candidate {
        running: 64,
        waiting: 8,
        ..idle(0)
    };
    let busy = Candidate {
        running: 60,
        step_ms: 40.0,
        ..idle(1)
    };
    assert_eq!(
        policy
            .pick(&[full, busy], &prompt_of(10), 0.0)
            .unwrap()
            .index,
        1
    );
}

#[test]
fn a_once_slow_replica_is_tried_again() {
    let mut policy = router();
    policy.observe_prefill(0, 100, 10_000.0, 0.0);
    policy.observe_prefill(1, 100, 10.0, 0.0);
    policy.observe_prefill(2, 100, 10.0, 0.0);
    let fleet = [
        idle(0),
        Candidate {
            backlog_tokens: 200,
            ..idle(1)
        },
        Candidate {
            backlog_tokens: 200,
            ..idle(2)
        },
    ];
    assert_ne!(policy.pick(&fleet, &prompt_of(100), 0.0).unwrap().index, 0);
    assert_eq!(
        policy
            .pick(&fleet, &prompt_of(100), 900_000.0)
            .unwrap()
            .index,
        0
    );
}

/// Requests come one a millisecond; each replica works its tokens off at its own speed.
#[test]
fn shares_follow_speed() {
    let speeds = [3.0, 3.0, 1.0];
    let mut policy = router();
    let mut backlog = [0.0_f64; 3];
    let mut counts = [0_u32; 3];
    for (index, speed) in speeds.iter().enumerate() {
        policy.observe_prefill(index, 300, 300.0 / speed, 0.0);
    }
    for now_ms in 0..20_000 {
        for (index, left) in backlog.iter_mut().enumerate() {
            *left = (*left - speeds[index]).max(0.0);
            policy.observe_prefill(index, 300, 300.0 / speeds[index], f64::from(now_ms));
        }
        let fleet: Vec<Candidate> = (0..3)
            .map(|index| Candidate {
                backlog_tokens: backlog[index] as u64,
                running: u32::from(backlog[index] > 0.0),
                step_ms: 1.0,
                ..idle(index)
            })
            .collect();
        // 6.5 tokens a millisecond for a fleet that does 7.
        if now_ms % 10 == 0 {
            let pick = policy
                .pick(&fleet, &prompt_of(65), f64::from(now_ms))
                .unwrap();
            backlog[pick.index] += 65.0;
            counts[pick.index] += 1;
        }
    }
    let slow_share = f64::from(counts[2]) / f64::from(counts.iter().sum::<u32>());
    assert!(
        (0.05..0.2).contains(&slow_share),
        "the slow replica got {slow_share} of the requests"
    );
    assert!(
        backlog.iter().all(|left| *left < 500.0),
        "work piled up: {backlog:?}"
    );
}

proptest! {
    #[test]
    fn the_pick_is_a_candidate_with_a_finite_prediction(fleet in candidates(), prompt in 0..100_000_usize) {
        let pick = router().pick(&fleet, &prompt_of(prompt), 0.0).unwrap();
        prop_assert!(pick.index < fleet.len());
        prop_assert!(pick.predicted_ms.is_finite() && pick.predicted_ms >= 0.0);
    }

    #[test]
    fn more_load_never_attracts(fleet in candidates(), prompt in 0..10_000_usize, more in 1..10_000_u64) {
        let pick = router().pick(&fleet, &prompt_of(prompt), 0.0).unwrap();
        for other in (0..fleet.len()).filter(|i| *i != pick.index) {
            let mut heavier = fleet.clone();
            heavier[other].backlog_tokens += more;
            heavier[other].running += 1;
            let again = router().pick(&heavier, &prompt_of(prompt), 0.0).unwrap();
            prop_assert_ne!(again.index, other);
        }
    }

    #[test]
    fn odd_numbers_from_an_engine_do_no_harm(step_ms in prop::num::f32::ANY, took in prop::num::f64::ANY) {
        let mut policy = router();
        policy.observe_prefill(0, 10, took, 0.0);
        let pick = policy.pick(&[Candidate { step_ms, running: 3, ..idle(0) }, idle(1)], &prompt_of(10), 1.0).unwrap();
        prop_assert!(pick.predicted_ms.is_finite());
    }
}

/// How many of a burst each of two replicas gets whose engines have fitted these costs.
fn shares(costs: [StepCost; 2], burst: usize) -> [usize; 2] {
    let mut policy = router();
    let mut sent = [0; 2];
    for _ in 0..burst {
        let fleet = [0, 1].map(|index| Candidate {
            cost: costs[index],
            own_requests: sent[index],
            own_tokens: 128 * sent[index],
            ..idle(index)
        });
        let choice = policy.pick(&fleet, &prompt_of(128), 0.0);
        sent[choice.map_or(0, |choice| choice.index)] += 1;
    }
    sent
}

#[test]
fn replicas_whose_fits_differ_a_little_are_equal_and_slow_ones_are_slow() {
    // Of two engines of one core each, after four requests.
    let cost = |fixed_ms, token_ms, attended_ms| StepCost {
        fixed_ms,
        token_ms,
        attended_ms,
        request_ms: 0.0,
    };
    let measured = [cost(35.0, 1.67, 0.0048), cost(32.0, 1.16, 0.021)];
    assert_eq!(shares(measured, 12), [6, 6]);
    let slow = cost(105.0, 5.0, 0.0144);
    let [quick, slow] = shares([measured[0], slow], 100);
    assert!(slow > 0 && quick > 2 * slow, "{quick} and {slow}");
}
