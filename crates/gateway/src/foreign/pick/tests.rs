use scalellm_routing::SentPrefixes;
use serde_json::{Value, json};

use super::*;
use crate::foreign::asked::Asked;

fn candidates(of: &[(u32, usize)]) -> Vec<Candidate> {
    of.iter()
        .enumerate()
        .map(|(index, (weight, in_flight))| Candidate {
            index,
            id: index as u64,
            weight: *weight,
            in_flight: *in_flight,
            sent: 0.0,
        })
        .collect()
}

#[test]
fn turns_are_shared_by_weight() {
    let mut due = Vec::new();
    let weights = [(0, 5), (2, 1)];
    let turns: Vec<usize> = (0..12)
        .filter_map(|_| next_turn(&mut due, &weights))
        .collect();
    assert_eq!(turns, [0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0]);
    assert_eq!(next_turn(&mut due, &[]), None);
}

#[test]
fn the_one_with_the_fewest_unanswered_for_its_weight_is_next() {
    for (of, next) in [
        (&[(1, 3), (1, 2), (1, 5)][..], 1),
        (&[(3, 5), (1, 2)], 0),
        (&[(3, 7), (1, 2)], 1),
        (&[(1, 0), (100, 1)], 0),
    ] {
        let picked = Picker::default().pick(&candidates(of), None, false);
        assert_eq!(picked, Some((next, Reason::Load)), "{of:?}");
    }
    assert_eq!(Picker::default().pick(&[], Some(1), false), None);
    let only = Picker::default().pick(&candidates(&[(1, 900)]), Some(1), false);
    assert_eq!(only, Some((0, Reason::Only)));
}

#[test]
fn weights_hold_for_prompts_that_all_begin_alike() {
    for (weights, at_once) in [
        ([70, 30], 8),
        ([25, 75], 64),
        ([3, 1], 8),
        ([300, 100], 200),
    ] {
        let picker = Picker::default();
        let mut servers = candidates(&weights.map(|weight| (weight, 0)));
        let mut running = std::collections::VecDeque::new();
        let mut got = [0_u32; 2];
        for _ in 0..4000 {
            if running.len() == at_once {
                let ended: usize = running.pop_front().unwrap();
                servers[ended].in_flight -= 1;
            }
            let (next, _) = picker.pick(&servers, None, true).unwrap();
            servers[next].in_flight += 1;
            servers[next].sent = 0.9;
            running.push_back(next);
            got[next] += 1;
        }
        let wanted = 4000.0 * f64::from(weights[0]) / f64::from(weights[0] + weights[1]);
        let off = (f64::from(got[0]) - wanted).abs() / wanted;
        assert!(off < 0.15, "{weights:?}, {at_once} at once: {got:?}");
    }
}

#[test]
fn a_session_stays_until_its_upstream_has_far_more_to_do() {
    let picker = Picker::default();
    let idle = candidates(&[(1, 0); 4]);
    for session in 0..100 {
        let (own, reason) = picker.pick(&idle, Some(session), false).unwrap();
        assert_eq!(reason, Reason::Session);
        let mut busy = idle.clone();
        busy[own].in_flight = 4;
        let stays = picker.pick(&busy, Some(session), false);
        assert_eq!(stays, Some((own, Reason::Session)));
        busy[own].in_flight = 5;
        let (other, reason) = picker.pick(&busy, Some(session), false).unwrap();
        assert_eq!(reason, Reason::Moved);
        assert_ne!(other, own);
    }
    let used: std::collections::BTreeSet<_> = (0..100)
        .filter_map(|session| picker.pick(&idle, Some(session), false))
        .map(|(index, _)| index)
        .collect();
    assert_eq!(used.len(), 4);
}

/// Servers that remember what they were sent, and how many requests each has to answer.
struct Servers {
    picker: Picker,
    all: Vec<(SentPrefixes, usize)>,
}

impl Servers {
    fn idle(count: usize) -> Servers {
        Servers {
            picker: Picker::default(),
            all: (0..count).map(|_| Default::default()).collect(),
        }
    }

    /// Sends a request, which is not answered before the test takes its count back.
    fn send(&mut self, body: &Value) -> (usize, Reason) {
        let body = body.to_string();
        let prompt = Asked::read(body.as_bytes()).unwrap().prompt;
        let prompt = prompt.prefixes(body.as_bytes());
        let loads: Vec<_> = self.all.iter().map(|(_, load)| (1, *load)).collect();
        let mut candidates = candidates(&loads);
        for (candidate, (sent, _)) in candidates.iter_mut().zip(&self.all) {
            candidate.sent = sent.share(&prompt);
        }
        let by_prefix = !prompt.is_empty();
        let picked = self.picker.pick(&candidates, None, by_prefix).unwrap();
        let (sent, in_flight) = &mut self.all[picked.0];
        sent.remember(&prompt);
        *in_flight += 1;
        picked
    }

    /// The same, answered at once.
    fn ask(&mut self, body: &Value) -> (usize, Reason) {
        let picked = self.send(body);
        self.all[picked.0].1 -= 1;
        picked
    }
}

/// A chat after so many turns of some hundred bytes each, beginning with so many bytes that all chats have in common.
fn chat(name: &str, turns: usize, shared_bytes: usize) -> Value {
    let said = |turn: usize| format!("{name} says in turn {turn}: ").repeat(40);
    let mut messages = vec![json!({"role": "system", "content": "s".repeat(shared_bytes)})];
    for turn in 0..turns {
        messages.push(json!({"role": "user", "content": said(turn)}));
        messages.push(json!({"role": "assistant", "content": format!("I see, {name}.")}));
    }
    messages.push(json!({"role": "user", "content": said(turns)}));
    json!({"model": "m", "messages": messages, "stream": true})
}

#[test]
fn a_chats_next_turn_goes_where_its_last_went_and_other_chats_elsewhere() {
    let mut servers = Servers::idle(3);
    let names = ["ann", "bob", "cid", "dot", "eve", "fay"];
    let first: Vec<_> = names.map(|name| servers.ask(&chat(name, 0, 0))).into();
    assert!(first.iter().all(|(_, reason)| *reason == Reason::Cold));
    for server in 0..3 {
        assert_eq!(first.iter().filter(|(at, _)| *at == server).count(), 2);
    }
    for turns in 1..6 {
        for (name, (at, _)) in names.iter().zip(&first) {
            let next = servers.ask(&chat(name, turns, 0));
            assert_eq!(next, (*at, Reason::Prefix), "{name}, {turns}");
        }
    }
}

#[test]
fn a_prefix_that_all_share_is_soon_everywhere() {
    let mut servers = Servers::idle(3);
    let picked: Vec<_> = (0..60)
        .map(|name| servers.send(&chat(&name.to_string(), 0, 16_000)))
        .collect();
    let (first, _) = picked[0];
    assert_eq!(picked[0].1, Reason::Cold);
    assert!(
        picked[1..4]
            .iter()
            .all(|one| *one == (first, Reason::Prefix))
    );
    assert!(
        picked
            .iter()
            .any(|(at, reason)| *at != first && *reason == Reason::Spread)
    );
    let loads: Vec<_> = servers.all.iter().map(|(_, load)| *load).collect();
    assert_eq!(loads, [20, 20, 20]);
}

#[test]
fn the_less_is_saved_the_sooner_load_decides() {
    for (shared_bytes, beside, goes_on) in [
        (600, 0, true),
        (600, 1, false),
        (16_000, 1, true),
        (16_000, 2, true),
        (16_000, 3, false),
    ] {
        let mut servers = Servers::idle(2);
        let (at, _) = servers.ask(&chat("ann", 0, shared_bytes));
        servers.all[at].1 = beside;
        let (other, reason) = servers.ask(&chat("bob", 6, shared_bytes));
        let expected = if goes_on {
            Reason::Prefix
        } else {
            Reason::Spread
        };
        assert_eq!(
            (other == at, reason),
            (goes_on, expected),
            "{shared_bytes}, {beside}"
        );
    }
}

#[test]
fn other_tools_or_another_salt_are_another_prefix() {
    let with = |key: &str, value: Value| {
        let mut body = chat("ann", 4, 0);
        body[key] = value;
        body
    };
    let tools = |name: &str| {
        with(
            "tools",
            json!([{"type": "function", "function": {"name": name}}]),
        )
    };
    let mut servers = Servers::idle(2);
    for (body, reason) in [
        (tools("add"), Reason::Cold),
        (tools("add"), Reason::Prefix),
        (tools("sub"), Reason::Cold),
        (chat("ann", 4, 0), Reason::Cold),
        (with("cache_salt", json!("a")), Reason::Cold),
        (with("cache_salt", json!("a")), Reason::Prefix),
        (with("cache_salt", json!("b")), Reason::Cold),
        (with("temperature", json!(0.5)), Reason::Prefix),
        (json!({"prompt": "ann ".repeat(300)}), Reason::Cold),
        (json!({"prompt": "ann ".repeat(400)}), Reason::Prefix),
        (json!({"messages": "ann ".repeat(300)}), Reason::Cold),
        (json!({"messages": "ann"}), Reason::Load),
    ] {
        assert_eq!(servers.ask(&body).1, reason, "{body}");
    }
}

#[test]
fn a_session_is_asked_for_before_a_prefix() {
    let picker = Picker::default();
    let mut idle = candidates(&[(1, 0); 4]);
    let (own, _) = picker.pick(&idle, Some(1), true).unwrap();
    let other = (own + 1) % 4;
    idle[other].sent = 1.0;
    assert_eq!(
        picker.pick(&idle, Some(1), true),
        Some((own, Reason::Session))
    );
    idle[own].in_flight = 5;
    assert_eq!(
        picker.pick(&idle, Some(1), true),
        Some((other, Reason::Moved))
    );
}
