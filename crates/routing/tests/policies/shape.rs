use scalellm_routing::{Candidate, Policy, Reason, Request, Router, StepCost};

use crate::support::{idle, prompt_of};

/// Eight devices as one wide replica and four narrow ones: a wide step is shorter, and grows faster.
fn fleet(on_wide: u32, on_each_narrow: u32) -> Vec<Candidate> {
    let wide = Candidate {
        tensor_parallel_size: 4,
        running: on_wide,
        cost: StepCost {
            fixed_ms: 4.0,
            token_ms: 0.02,
            attended_ms: 0.0,
            request_ms: 0.3,
        },
        ..idle(0)
    };
    let narrow = (1..5).map(|index| Candidate {
        tensor_parallel_size: 1,
        running: on_each_narrow,
        cost: StepCost {
            fixed_ms: 10.0,
            token_ms: 0.06,
            attended_ms: 0.0,
            request_ms: 0.34,
        },
        ..idle(index)
    });
    std::iter::once(wide).chain(narrow).collect()
}

fn reason(fleet: &[Candidate], request: &Request<'_>) -> Reason {
    let mut router = Router::new(Policy::Shape);
    let choice = router.pick(fleet, request, 0.0);
    choice.expect("there are replicas").reason
}

/// 4 + 0.32 n and 10 + 0.4 n / 4 meet at 27.3.
#[test]
fn short_work_goes_wide_below_the_concurrency_at_which_narrow_ones_win() {
    for (on_wide, expected) in [
        (0, Reason::Wide),
        (26, Reason::Wide),
        (27, Reason::Narrow),
        (60, Reason::Narrow),
    ] {
        assert_eq!(
            reason(&fleet(on_wide, 0), &prompt_of(100)),
            expected,
            "{on_wide}"
        );
    }
}

#[test]
fn long_prompts_and_batch_work_go_to_narrow_replicas() {
    assert_eq!(reason(&fleet(0, 0), &prompt_of(20_000)), Reason::Narrow);
    let batch = Request {
        batch: true,
        ..prompt_of(100)
    };
    assert_eq!(reason(&fleet(0, 0), &batch), Reason::Narrow);
}

#[test]
fn replicas_of_one_width_are_chosen_by_load() {
    let fleet = fleet(0, 1);
    assert_eq!(reason(&fleet[1..], &prompt_of(100)), Reason::Load);
}

#[test]
fn a_wide_replica_that_is_better_at_any_load_keeps_short_work() {
    let mut fleet = fleet(60, 60);
    fleet[0].cost.request_ms = 0.0;
    assert_eq!(reason(&fleet, &prompt_of(100)), Reason::Wide);
}

#[test]
fn a_lonely_request_is_at_one_narrow_replica_and_not_at_a_part_of_each() {
    let mut fleet = fleet(0, 0);
    // 9.95 + 0.32 against 10 + 0.4, though 10 + 0.4 / 4 is less.
    fleet[0].cost.fixed_ms = 9.95;
    assert_eq!(reason(&fleet, &prompt_of(1)), Reason::Wide);
    fleet[0].running = 4;
    assert_eq!(reason(&fleet, &prompt_of(1)), Reason::Narrow);
}

#[test]
fn what_was_never_measured_is_tried() {
    let mut wide_unknown = fleet(0, 0);
    wide_unknown[0].cost = StepCost::default();
    assert_eq!(reason(&wide_unknown, &prompt_of(100)), Reason::Wide);
    wide_unknown[0].running = 1;
    assert_eq!(reason(&wide_unknown, &prompt_of(100)), Reason::Narrow);
    let mut narrow_unknown = fleet(0, 0);
    for narrow in &mut narrow_unknown[1..] {
        narrow.cost = StepCost::default();
    }
    assert_eq!(reason(&narrow_unknown, &prompt_of(100)), Reason::Wide);
    narrow_unknown[0].running = 1;
    assert_eq!(reason(&narrow_unknown, &prompt_of(100)), Reason::Narrow);
}

#[test]
fn what_has_run_nothing_for_minutes_is_tried_again() {
    let mut router = Router::new(Policy::Shape);
    let mut fleet = fleet(0, 0);
    for replica in &mut fleet {
        replica.steps = 100;
    }
    let mut reason = |fleet: &[Candidate], at_ms: f64| {
        let choice = router.pick(fleet, &prompt_of(100), at_ms);
        choice.expect("there are replicas").reason
    };
    let mut slow_wide = fleet.clone();
    slow_wide[0].cost.fixed_ms = 40.0;
    assert_eq!(reason(&slow_wide, 0.0), Reason::Narrow);
    // Once a minute one comes, to narrow ones.
    for minute in 1..5 {
        slow_wide[1].steps += 1;
        assert_eq!(
            reason(&slow_wide, f64::from(minute) * 60_000.0),
            Reason::Narrow
        );
    }
    assert_eq!(reason(&slow_wide, 301_000.0), Reason::Wide);
    slow_wide[0].steps += 1;
    assert_eq!(reason(&slow_wide, 302_000.0), Reason::Narrow);
}

#[test]
fn one_narrow_replica_that_was_not_measured_hides_no_others() {
    let mut fleet = fleet(5, 0);
    fleet[1].cost = StepCost::default();
    assert_eq!(reason(&fleet, &prompt_of(100)), Reason::Wide);
}
