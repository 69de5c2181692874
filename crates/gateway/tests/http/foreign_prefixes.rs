//! Servers elsewhere that cache prefixes: a chat goes on where it began.

use bytes::Bytes;
use scalellm_gateway::UpstreamConfig;
use serde_json::{Value, json as value};

use super::foreign::{WHOLE, gateway};
use super::support::{Reply, Stack, request, send};
use super::upstream::{Mock, before, json};

async fn server() -> Mock {
    Mock::start(|_| vec![json(WHOLE)]).await
}

/// A chat after so many turns of a few hundred bytes each.
fn chat(name: &str, turns: usize) -> Value {
    let turn = |turn: usize| {
        let said = format!("{name} says in turn {turn}: ").repeat(20);
        value!({"role": "user", "content": said})
    };
    value!({"model": "chat", "messages": (0..turns).map(turn).collect::<Vec<_>>()})
}

/// Asks, and returns which upstream answered and why.
async fn routed(stack: &Stack, body: &Value) -> (String, String) {
    let body = Bytes::from(body.to_string());
    let headers = [("x-scalellm-route", "1")];
    let reply: Reply = send(
        stack.address(),
        request("POST", "/v1/chat/completions", &headers, body),
    )
    .await;
    reply.ok();
    let route = reply.header("x-scalellm-route");
    let (name, reason) = route.split_once("; policy=upstreams; reason=").unwrap();
    (name.to_owned(), reason.to_owned())
}

#[tokio::test]
async fn a_chat_goes_on_where_it_began() {
    let servers = [server().await, server().await];
    let stack = gateway(servers.iter().map(Mock::upstream).collect()).await;
    let names = ["ann", "bob", "cid", "dot"];
    let mut homes = Vec::new();
    for name in names {
        let (home, reason) = routed(&stack, &chat(name, 2)).await;
        assert_eq!(reason, "cold");
        homes.push(home);
    }
    for turns in 3..6 {
        for (name, home) in names.iter().zip(&homes) {
            let (next, reason) = routed(&stack, &chat(name, turns)).await;
            assert_eq!((&next, &*reason), (home, "prefix"), "{name}, {turns}");
        }
    }
    let asked = servers.each_ref().map(|server| server.seen().len());
    assert_eq!(asked, [8, 8]);
    for (reason, count) in [("cold", 4.0), ("prefix", 12.0)] {
        let labels = format!("reason=\"{reason}\"");
        let chosen = stack.metric("scalellm_routed_total{", &labels).await;
        assert_eq!(chosen, count, "{reason}");
    }
}

#[tokio::test]
async fn load_alone_decides_where_that_is_wished() {
    let servers = [server().await, server().await];
    let upstreams = servers.iter().map(Mock::upstream).collect();
    let stack = Stack::start(Vec::new(), |config| {
        before(upstreams)(config);
        config.models[0].routing = "least-load".to_owned();
    })
    .await;
    for turns in 2..6 {
        let (_, reason) = routed(&stack, &chat("ann", turns)).await;
        assert_eq!(reason, "load");
    }
    let asked = servers.each_ref().map(|server| server.seen().len());
    assert_eq!(asked, [2, 2]);
}

#[tokio::test]
async fn what_was_sent_outlives_a_change_of_the_others_and_not_the_servers_end() {
    let [first, second] = [server().await, server().await];
    let watched = |mock: &Mock| UpstreamConfig {
        health_path: "/models".to_owned(),
        health_interval_s: 0.02,
        ..mock.upstream()
    };
    let stack = gateway(vec![watched(&first), watched(&second)]).await;
    let (home, _) = routed(&stack, &chat("ann", 2)).await;
    let third = server().await;
    let added = value!({"model": "chat", "upstream": {"url": third.upstream().url}});
    stack.post("/admin/v1/replicas", &added).await.ok();
    assert_eq!(
        routed(&stack, &chat("ann", 3)).await,
        (home, "prefix".to_owned())
    );
    let at = first.address;
    assert_eq!(first.seen().len(), 2);
    let up = format!("upstream=\"{}\"", first.upstream().url);
    drop(first);
    stack.wait_metric("scalellm_upstream_up{", &up, 0.0).await;
    let _again = Mock::at(at, |_| vec![json(WHOLE)]).await;
    stack.wait_metric("scalellm_upstream_up{", &up, 1.0).await;
    let (_, reason) = routed(&stack, &chat("ann", 4)).await;
    assert_eq!(reason, "cold");
}
