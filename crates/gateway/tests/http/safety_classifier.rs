//! Checks that a server elsewhere makes.

use serde_json::{Value, json};

use crate::safety::{FORMS, decisions, said, stack};
use crate::support::{says, user};
use crate::upstream::{Act, Mock, json as json_answer};

/// A classifier that has something against `bad`.
async fn classifier() -> Mock {
    Mock::start(|seen| {
        let text: Value = serde_json::from_str(&seen.body).unwrap();
        assert_eq!(text["model"], "judge");
        let flagged = text["input"].as_str().unwrap().contains("bad");
        vec![json_answer(
            &json!({"id": "m", "results": [{"flagged": flagged}]}).to_string(),
        )]
    })
    .await
}

fn classified(mock: &Mock, more: &str) -> String {
    let url = format!("http://{}/v1", mock.address);
    format!(
        "[[safety]]\nhook = 'classifier'\nurl = '{url}'\nmodel = 'judge'\ntimeout_s = 50\n{more}"
    )
}

#[tokio::test]
async fn a_classifier_refuses_requests() {
    let mock = classifier().await;
    let stack = stack(says("ok"), &classified(&mock, "on = 'request'")).await;
    stack.complete(json!({"prompt": "good"})).await.ok();
    let error = stack
        .chat(json!({"messages": user("too bad")}))
        .await
        .error(400);
    assert_eq!(error["code"], "content_filter");
    assert!(mock.seen()[0].head.starts_with("POST /v1/moderations "));
    assert_eq!(decisions(&stack, "classifier", "refuse").await, 1.0);
}

#[tokio::test]
async fn a_classifier_sees_an_answer_before_the_client_does() {
    let mock = classifier().await;
    let stack = stack(
        says("0123456789 is bad, it says"),
        &classified(
            &mock,
            "on = 'response'\naction = 'stop'\nevery_chars = 8\ncontext_chars = 4",
        ),
    )
    .await;
    for (chat, stream) in FORMS {
        let said = said(&stack, chat, stream, json!({"max_tokens": 100})).await;
        assert_eq!(
            said,
            vec![(
                "0123456789 is ba".to_owned(),
                json!("content_filter"),
                json!("classifier")
            )]
        );
    }
    let inputs: Vec<String> = mock
        .seen()
        .iter()
        .map(|seen| {
            serde_json::from_str::<Value>(&seen.body).unwrap()["input"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(
        inputs,
        ["01234567", "456789 is ba", "s bad, it sa"].repeat(4)
    );
}

#[tokio::test]
async fn a_classifier_that_fails_lets_all_through_or_nothing() {
    for (mode, status) in [("open", 200), ("closed", 503)] {
        let acts = [
            vec![crate::upstream::answer("500 Oops", "", "")],
            vec![json_answer("{\"no\": 1}")],
            vec![json_answer("{\"results\": []}")],
            vec![Act::Close],
            vec![Act::Hang],
        ];
        for act in acts {
            let hangs = matches!(act[..], [Act::Hang]);
            let mock = Mock::start(move |_| act.clone()).await;
            let mut hooks = classified(&mock, &format!("on = 'request'\non_failure = '{mode}'"));
            if hangs {
                hooks = hooks.replace("timeout_s = 50", "timeout_s = 0.05");
            }
            let stack = stack(says("ok"), &hooks).await;
            let reply = stack.complete(json!({"prompt": "x"})).await;
            assert_eq!(reply.status, status, "{}", reply.text());
            assert_eq!(
                decisions(&stack, "classifier", &format!("fail_{mode}")).await,
                1.0
            );
        }
    }
}
