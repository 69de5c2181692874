//! Who has a turn, and who loses it, when all places are taken.

use std::sync::Arc;

use bytes::Bytes;
use scalellm_fake_engine::Settings;
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::accounts::{complete_as, new_key, with_database};
use crate::foreign::WHOLE;
use crate::support::{Folder, Reply, Stack, engine, open, request, send, with_model};
use crate::upstream::{Act, Mock, before, json as answer};

/// One place before a server elsewhere, which sees in what order requests have their turns.
struct Turns {
    stack: Stack,
    mock: Mock,
    go_on: Arc<Notify>,
    _folder: Folder,
}

/// A client with a key, who says who it is.
struct Client {
    name: &'static str,
    class: &'static str,
    secret: String,
}

impl Turns {
    async fn start(max_queued: usize) -> Turns {
        let go_on = Arc::new(Notify::new());
        let wait = Arc::clone(&go_on);
        let mock = Mock::start(move |seen| match seen.body.contains("holds the place") {
            true => vec![Act::Wait(Arc::clone(&wait)), answer(WHOLE)],
            false => vec![answer(WHOLE)],
        })
        .await;
        let folder = Folder::new();
        let file = folder.0.clone();
        let stack = Stack::start(Vec::new(), |config| {
            before(vec![mock.upstream()])(config);
            config.models[0].path = file;
            with_database(config);
            config.max_in_flight = 1;
            config.max_queued = max_queued;
        })
        .await;
        Turns {
            stack,
            mock,
            go_on,
            _folder: folder,
        }
    }

    async fn client(&self, name: &'static str, class: &'static str, weight: u32) -> Client {
        let key = json!({"tenant": name, "class": class, "weight": weight});
        let (_, secret) = new_key(&self.stack, key).await;
        Client {
            name,
            class,
            secret,
        }
    }

    fn ask(&self, client: &Client) -> JoinHandle<Reply> {
        let body = json!({"model": "chat", "user": client.name, "max_tokens": 50, "messages": []});
        let authorization = format!("Bearer {}", client.secret);
        let headers = [("authorization", authorization.as_str())];
        let body = Bytes::from(body.to_string());
        let asked = request("POST", "/v1/chat/completions", &headers, body);
        tokio::spawn(send(self.stack.address(), asked))
    }

    /// The only place is taken until `go_on`.
    async fn hold(&self) -> JoinHandle<Reply> {
        let holder = self.client("holds the place", "interactive", 1).await;
        let held = self.ask(&holder);
        let running = "scalellm_upstream_in_flight_requests{";
        self.stack.wait_metric(running, "", 1.0).await;
        held
    }

    /// Asks so that it waits behind those who came before.
    async fn queue(&self, client: &Client, waiting: usize) -> JoinHandle<Reply> {
        let asked = self.ask(client);
        let labels = format!("class=\"{}\"", client.class);
        let queued = "scalellm_queued_requests{";
        self.stack
            .wait_metric(queued, &labels, waiting as f64)
            .await;
        asked
    }

    /// The names of those who had their turns, in order.
    fn order(&self) -> Vec<String> {
        let name = |body: &str| {
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            body["user"].as_str().unwrap().to_owned()
        };
        self.mock
            .seen()
            .iter()
            .map(|seen| name(&seen.body))
            .collect()
    }
}

#[tokio::test]
async fn tenants_that_wait_have_turns_by_their_weights() {
    let turns = Turns::start(100).await;
    let held = turns.hold().await;
    let light = turns.client("light", "standard", 1).await;
    let heavy = turns.client("heavy", "standard", 3).await;
    // Whoever came first, and with most, has no more of it.
    let mut asked = Vec::new();
    for client in [&light, &heavy] {
        for _ in 0..12 {
            asked.push(turns.queue(client, asked.len() + 1).await);
        }
    }
    turns.go_on.notify_one();
    for reply in [held].into_iter().chain(asked) {
        reply.await.unwrap().ok();
    }
    let order = turns.order();
    assert_eq!((order.len(), order[0].as_str()), (25, "holds the place"));
    for turns in [4, 8, 12, 16] {
        let light = order[1..=turns].iter().filter(|name| *name == "light");
        let difference = light.count().abs_diff(turns / 4);
        assert!(difference <= 1, "{order:?}");
    }
}

#[tokio::test]
async fn the_newest_of_the_lowest_class_is_given_up_for_a_higher_one() {
    let turns = Turns::start(3).await;
    let held = turns.hold().await;
    let batch = turns.client("batch", "batch", 1).await;
    let standard = turns.client("standard", "standard", 1).await;
    let interactive = turns.client("interactive", "interactive", 1).await;
    let full = async |client| {
        let reply = turns.ask(client).await.unwrap();
        assert_eq!(reply.error(503)["code"], "overloaded");
        assert!(reply.header("retry-after").parse::<u32>().unwrap() > 0);
    };
    let shed = async |waiting: JoinHandle<Reply>| {
        let reply = waiting.await.unwrap();
        let error = reply.error(503);
        assert_eq!(error["code"], "overloaded");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("of a higher class"), "{message}");
        assert!(reply.header("retry-after").parse::<u32>().unwrap() > 0);
    };
    let old = turns.queue(&batch, 1).await;
    let new = turns.queue(&batch, 2).await;
    let middle = turns.queue(&standard, 1).await;
    full(&batch).await;
    let mut served = vec![turns.queue(&interactive, 1).await];
    shed(new).await;
    assert!(!old.is_finished());
    served.push(turns.queue(&standard, 2).await);
    shed(old).await;
    // There is nobody below them, or nobody but their own.
    full(&batch).await;
    full(&standard).await;
    served.push(turns.queue(&interactive, 2).await);
    // Of the two of the lowest class that waits now, the newer one.
    shed(served.remove(1)).await;
    assert!(!middle.is_finished());
    turns.go_on.notify_one();
    for reply in [held, middle].into_iter().chain(served) {
        reply.await.unwrap().ok();
    }
    let order = ["holds the place", "interactive", "interactive", "standard"];
    assert_eq!(turns.order(), order);
    let rejected = async |reason| turns.stack.metric("scalellm_rejected_total{", reason).await;
    assert_eq!(rejected("shed").await, 3.0);
    assert_eq!(rejected("max_in_flight").await, 3.0);
}

#[tokio::test]
async fn a_batch_flood_leaves_room_for_who_waits_for_an_answer() {
    let slow = Settings {
        ttft_ms: 20.0,
        tbt_ms: 20.0,
        ..engine()
    };
    let stack = Stack::start(vec![slow], |config| {
        with_database(config);
        config.max_in_flight = 4;
        config.max_queued = 8;
    })
    .await;
    let (_, batch) = new_key(&stack, json!({"class": "batch", "tenant": "crawler"})).await;
    let (_, person) = new_key(&stack, json!({"class": "interactive"})).await;
    let flood =
        (0..32).map(|_| complete_as(&stack, &batch, json!({"prompt": "x", "max_tokens": 20})));
    let people = async {
        stack
            .wait_metric("scalellm_queued_requests{", "batch", 8.0)
            .await;
        // Batch has three of the four places; the fourth was kept.
        assert_eq!(
            stack.metric("scalellm_generations_in_flight", "").await,
            3.0
        );
        for _ in 0..3 {
            let ask = json!({"prompt": "x", "max_tokens": 1});
            complete_as(&stack, &person, ask).await.ok();
        }
    };
    let (flooded, ()) = tokio::join!(futures_util::future::join_all(flood), people);
    let served = flooded.iter().filter(|reply| reply.status == 200).count();
    let refused = flooded.iter().filter(|reply| reply.status == 503);
    assert_eq!(served, 11);
    assert!(
        refused
            .clone()
            .all(|reply| !reply.header("retry-after").is_empty())
    );
    assert_eq!(refused.count(), 21);
}

#[tokio::test]
async fn a_deadline_that_cannot_be_met_is_refused_at_once() {
    let slow = Settings {
        tbt_ms: 20.0,
        ..engine()
    };
    let stack = Stack::start(vec![slow], |config| config.max_in_flight = 1).await;
    // Two turns tell how long one takes.
    let ask = || stack.complete(json!({"prompt": "x", "max_tokens": 20}));
    let replies = tokio::join!(ask(), ask(), ask(), ask());
    for reply in [replies.0, replies.1, replies.2, replies.3] {
        reply.ok();
    }
    let last = async {
        stack
            .wait_metric("scalellm_queued_requests{", "standard", 2.0)
            .await;
        let late = json!({"prompt": "x", "max_tokens": 1, "deadline_ms": 50});
        let error = stack.complete(late).await.error(504);
        assert!(
            error["message"].as_str().unwrap().contains("predicted"),
            "{error}"
        );
    };
    let ((), ..) = tokio::join!(last, ask(), ask(), ask());
    assert_eq!(
        stack
            .metric("scalellm_rejected_total{", "deadline_predicted")
            .await,
        1.0
    );
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_gives_its_turn_on() {
    let slow = Settings {
        tbt_ms: 5.0,
        ..engine()
    };
    let stack = Stack::start(vec![slow], |config| config.max_in_flight = 1).await;
    let body = |max_tokens| {
        let body = with_model(json!({"prompt": "x", "max_tokens": max_tokens, "stream": true}));
        request(
            "POST",
            "/v1/completions",
            &[],
            Bytes::from(body.to_string()),
        )
    };
    let running = open(stack.address(), body(1000)).await;
    let leaving = open(stack.address(), body(1000));
    {
        let waiting = async {
            stack
                .wait_metric("scalellm_queued_requests{", "", 1.0)
                .await
        };
        tokio::select! {
            _ = leaving => panic!("there is no place"),
            () = waiting => {}
        }
    }
    stack
        .wait_metric("scalellm_queued_requests{", "", 0.0)
        .await;
    let next = stack.complete(json!({"prompt": "x", "max_tokens": 1}));
    let ((), next) = tokio::join!(async { drop(running) }, next);
    next.ok();
}
