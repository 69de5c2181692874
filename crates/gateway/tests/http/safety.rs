//! A model's checks of requests and answers, where replicas of our own compute it.

use scalellm_fake_engine::{Faults, Settings};
use scalellm_gateway::{Config, Gateway, GatewayError, ModelConfig};
use serde_json::{Value, json};

use crate::support::{Stack, engine, ids, says, streamed_text, user};

/// A model with these hooks, in TOML.
pub fn with_hooks(hooks: &str) -> impl FnOnce(&mut Config) {
    let model: ModelConfig = toml::from_str(hooks).unwrap();
    move |config| config.models[0].safety = model.safety
}

pub async fn stack(settings: Settings, hooks: &str) -> Stack {
    Stack::start(vec![settings], with_hooks(hooks)).await
}

pub async fn decisions(stack: &Stack, hook: &str, action: &str) -> f64 {
    let labels = format!("hook=\"{hook}\",action=\"{action}\"");
    stack
        .metric("scalellm_safety_decisions_total{", &labels)
        .await
}

const SECRET: &str = "[[safety]]\nhook = 'words'\nwords = ['secret']\npatterns = ['key-\\d{4}']\n";

#[tokio::test]
async fn a_word_in_a_request_refuses_it() {
    let stack = stack(engine(), &format!("{SECRET}on = 'request'")).await;
    for reply in [
        stack.complete(json!({"prompt": ["fine", "a Secret."]})).await,
        stack.chat(json!({"messages": user("my KEY-1234, key-1234"), "stream": true})).await,
        stack.chat(json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "secret"}]}]})).await,
    ] {
        let error = reply.error(400);
        assert_eq!(error["code"], "content_filter");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("\"words\"") && !message.contains("ecret"), "{message}");
    }
    stack
        .complete(json!({"prompt": "secretly, key-123"}))
        .await
        .ok();
    assert_eq!(decisions(&stack, "words", "refuse").await, 3.0);
    assert_eq!(
        stack.metric("scalellm_rejected_total{", "safety").await,
        3.0
    );
    let ids_of = stack
        .complete(json!({"prompt": ids("secret")}))
        .await
        .error(400);
    assert_eq!(
        (&ids_of["param"], &ids_of["code"]),
        (&json!("prompt"), &json!("unsupported_field"))
    );
    stack
        .chat(json!({"prompt_token_ids": ids("secret")}))
        .await
        .error(400);
}

#[tokio::test]
async fn personal_data_never_reaches_the_engine() {
    let hooks = "[[safety]]\nhook = 'personal_data'\non = 'request'";
    let stack = stack(says("ok"), hooks).await;
    let prompt =
        "I am a@b.example, pay 4111 1111 1111 1111 or DE89370400440532013000, +49 30 123456";
    let body = stack
        .complete(json!({"prompt": prompt, "echo": true}))
        .await
        .ok();
    assert_eq!(
        body["choices"][0]["text"],
        "I am [EMAIL], pay [CARD] or [IBAN], [PHONE]ok"
    );
    let body = stack
        .chat(json!({"messages": user("a@b.example")}))
        .await
        .ok();
    assert_eq!(body["usage"]["prompt_tokens"], "[EMAIL]".len() + 2);
    assert_eq!(decisions(&stack, "personal_data", "mask").await, 5.0);
}

/// Text, finish and stop reason of each choice, streamed or not.
pub async fn said(
    stack: &Stack,
    chat: bool,
    stream: bool,
    fields: Value,
) -> Vec<(String, Value, Value)> {
    let mut ask = fields;
    ask["stream"] = stream.into();
    let n = ask["n"].as_u64().unwrap_or(1);
    let reply = match chat {
        true => {
            ask["messages"] = user("x");
            stack.chat(ask).await
        }
        false => {
            ask["prompt"] = "x".into();
            stack.complete(ask).await
        }
    };
    if stream {
        let events = reply.events();
        let last = |index: u64| {
            let choices = events
                .iter()
                .flat_map(|event| event["choices"].as_array().unwrap());
            let mut ends = choices
                .filter(|choice| choice["index"] == index && !choice["finish_reason"].is_null());
            let end = ends.next().unwrap().clone();
            assert!(ends.next().is_none());
            end
        };
        let told = |index| {
            (
                streamed_text(&events, index),
                last(index)["finish_reason"].clone(),
                last(index)["stop_reason"].clone(),
            )
        };
        (0..n).map(told).collect()
    } else {
        let body = reply.ok();
        let text = |choice: &Value| {
            choice["text"]
                .as_str()
                .or(choice["message"]["content"].as_str())
                .unwrap()
                .to_owned()
        };
        let choices = body["choices"].as_array().unwrap().iter();
        choices
            .map(|choice| {
                (
                    text(choice),
                    choice["finish_reason"].clone(),
                    choice["stop_reason"].clone(),
                )
            })
            .collect()
    }
}

pub const FORMS: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

#[tokio::test]
async fn an_answer_ends_before_a_word_that_must_not_be_said() {
    let stack = stack(
        says("the key-12345 is a secret. yes"),
        &format!("{SECRET}on = 'response'\naction = 'stop'\nname = 'ours'"),
    )
    .await;
    for (chat, stream) in FORMS {
        let said = said(&stack, chat, stream, json!({"n": 2, "max_tokens": 100})).await;
        let expected = ("the ".to_owned(), json!("content_filter"), json!("ours"));
        assert_eq!(said, vec![expected.clone(), expected], "{chat} {stream}");
    }
    assert_eq!(decisions(&stack, "ours", "stop").await, 8.0);
    // A stop string before it ends the answer by itself, and what was held back comes out.
    let before = said(&stack, true, true, json!({"stop": ["y-1"]})).await;
    assert_eq!(
        before,
        vec![("the ke".to_owned(), json!("stop"), json!("y-1"))]
    );
    stack
        .wait_metric("scalellm_replica_in_flight_requests{", "", 0.0)
        .await;
}

#[tokio::test]
async fn an_answer_that_must_not_be_is_refused() {
    let stack = stack(says("the secret"), &format!("{SECRET}on = 'response'")).await;
    for (chat, stream) in FORMS {
        let ask = json!({"prompt": "x", "messages": user("x"), "stream": stream, "n": 2});
        let reply = if chat {
            stack.chat(ask).await
        } else {
            stack.complete(ask).await
        };
        // Before its first text an answer is refused as a whole.
        let error = if stream && reply.status == 200 {
            assert!(!reply.text().contains("sec"), "{}", reply.text());
            reply.events().last().unwrap()["error"].clone()
        } else {
            reply.error(400)
        };
        assert_eq!(error["code"], "content_filter");
    }
}

#[tokio::test]
async fn answers_are_masked_however_their_tokens_come() {
    let hooks = "[[safety]]\nhook = 'personal_data'\n[[safety]]\nhook = 'words'\nwords = ['mail']\naction = 'mask'\nmask = '***'";
    let stack = stack(says("Mail a.b@c.example or +49 30 123456"), hooks).await;
    for (chat, stream) in FORMS {
        let said = said(&stack, chat, stream, json!({"max_tokens": 100})).await;
        assert_eq!(said[0].0, "*** [EMAIL] or [PHONE]", "{chat} {stream}");
        assert_eq!(said[0].1, "stop");
    }
    let asked = json!({"prompt": "x", "max_tokens": 100, "logprobs": 1, "return_token_ids": true});
    let reply = stack.complete(asked).await;
    assert!(reply.header("x-scalellm-warning").contains("logprobs"));
    let choice = &reply.ok()["choices"][0];
    assert!(
        choice["logprobs"].is_null() && choice.get("token_ids").is_none(),
        "{choice}"
    );
}

#[tokio::test]
async fn an_answer_has_a_longest_length_and_does_not_go_in_circles() {
    let limits = "[[safety]]\nhook = 'limits'\nmax_response_chars = 7\nmax_request_chars = 5";
    let stack = stack(engine(), limits).await;
    for (chat, stream) in FORMS {
        let said = said(
            &stack,
            chat,
            stream,
            json!({"max_tokens": 100, "logprobs": null}),
        )
        .await;
        assert_eq!(
            said,
            vec![("abcdefg".to_owned(), json!("length"), json!("limits"))]
        );
    }
    let error = stack
        .complete(json!({"prompt": ["abc", "def"]}))
        .await
        .error(400);
    assert!(
        error["message"].as_str().unwrap().contains("6 characters"),
        "{error}"
    );
    let circles = "[[safety]]\nhook = 'limits'\nmax_repeats = 5\nmin_repeated_bytes = 64";
    let stack = self::stack(engine(), circles).await;
    let said = said(&stack, true, true, json!({"max_tokens": 1000})).await;
    assert_eq!(said[0].1, "repetition");
    assert_eq!(said[0].0.len(), 64);
}

#[tokio::test]
async fn a_replayed_answer_is_checked_once() {
    let dying = Settings {
        tbt_ms: 5.0,
        faults: Faults {
            die_after_outputs: Some(12),
            ..Faults::default()
        },
        ..engine()
    };
    let living = Settings {
        tbt_ms: 5.0,
        ..engine()
    };
    // Of "abcdefghijabc..." each "hijab" lies across the replica's death, or another output.
    let hooks = "[[safety]]\nhook = 'words'\npatterns = ['hijab']\naction = 'mask'\nmask = '-'";
    let stack = Stack::start(vec![dying, living], with_hooks(hooks)).await;
    let mut replays = 0;
    for _ in 0..2 {
        let reply = stack.complete(json!({"prompt": "x", "max_tokens": 40, "stream": true, "stream_options": {"include_usage": true}})).await;
        let events = reply.events();
        assert_eq!(streamed_text(&events, 0), "abcdefg-cdefg-cdefg-cdefghij");
        replays += events.last().unwrap()["usage"]["replays"]
            .as_u64()
            .unwrap_or(0);
    }
    assert_eq!(replays, 1);
    assert_eq!(decisions(&stack, "words", "mask").await, 6.0);
}

#[tokio::test]
async fn what_hooks_did_is_in_the_usage() {
    let stack = Stack::start(vec![says("the secret key-1234")], |config| {
        with_hooks("[[safety]]\nhook = 'words'\nwords = ['secret']\naction = 'mask'\n[[safety]]\nhook = 'words'\nname = 'keys'\npatterns = ['key-\\d{4}']\naction = 'stop'")(config);
        let file = config.models[0].path.join("accounts.db");
        config.database_url = Some(format!("sqlite:{}", file.display()));
        config.usage_interval_s = 0.02;
        config.database_timeout_s = 30.0;
    })
    .await;
    let start = std::time::Instant::now();
    while stack
        .complete(json!({"prompt": "x", "max_tokens": 3}))
        .await
        .status
        == 503
    {
        assert!(start.elapsed() < crate::support::LONG);
    }
    stack
        .complete(json!({"prompt": "key-1234"}))
        .await
        .error(400);
    stack
        .complete(json!({"prompt": "x", "max_tokens": 100}))
        .await
        .ok();
    loop {
        let usage = stack
            .get("/admin/v1/usage?group_by=safety,outcome")
            .await
            .ok();
        let mut rows: Vec<String> = usage["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| format!("{} {} {}", row["safety"], row["outcome"], row["requests"]))
            .collect();
        rows.sort();
        if rows
            == [
                "\"\" \"ok\" 1",
                "\"refuse:keys\" \"error\" 1",
                "\"stop:keys\" \"ok\" 1",
            ]
        {
            break;
        }
        assert!(start.elapsed() < crate::support::LONG, "{rows:?}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn bad_hooks_end_the_start_and_name_the_key() {
    let folder = crate::support::Folder::new();
    let file = folder.0.join("safety.toml");
    let told = |file: &std::path::Path, hooks: &str| {
        std::fs::write(file, hooks).unwrap();
        let text = format!(
            "port = 0\n[[models]]\nname = 'chat'\nsafety_file = '{}'\nupstreams = [{{url = 'http://127.0.0.1:1'}}]",
            file.display()
        );
        Config::from_toml(&text)
    };
    for (hooks, says) in [
        ("[[safety]]\nhook = 'wards'", "unknown variant `wards`"),
        ("[[safety]]\nwords = ['a']", "missing field `hook`"),
        (
            "[[safety]]\nhook = 'words'\nwrods = ['a']",
            "unknown field `wrods`",
        ),
        (
            "[[safety]]\nhook = 'words'\nwords = ['a']\naction = 'burn'",
            "unknown variant `burn`",
        ),
        ("[[hooks]]\nhook = 'words'", "unknown field `hooks`"),
        (
            "[[safety]]\nhook = 'words'\nwords = ['a']\n[[safety]]\nhook = 'words'\nwords = ['b']",
            "safety[1].name: \"words\" is used twice",
        ),
        (
            "[[safety]]\nhook = 'words'\nwords = ['a']\nname = 'ä'",
            "safety[0].name: got \"ä\"",
        ),
        (
            "[[safety]]\nhook = 'words'\npatterns = ['a+']",
            "safety[0].patterns[0]: got \"a+\"",
        ),
        (
            "[[safety]]\nhook = 'personal_data'\nkinds = []",
            "safety[0].kinds: got none",
        ),
        (
            "[[safety]]\nhook = 'personal_data'\nkinds = ['shoe']",
            "unknown variant `shoe`",
        ),
        (
            "[[safety]]\nhook = 'limits'",
            "safety[0]: needed is max_request_chars",
        ),
        (
            "[[safety]]\nhook = 'classifier'\nurl = 'x'",
            "safety[0].url: got \"x\"",
        ),
        (
            "[[safety]]\nhook = 'classifier'\nurl = 'http://x'\naction = 'mask'",
            "safety[0].action: got \"mask\"",
        ),
        (
            "[[safety]]\nhook = 'classifier'\nurl = 'http://x'\ntimeout_s = 0",
            "safety[0].timeout_s: got 0",
        ),
        (
            "[[safety]]\nhook = 'classifier'\nurl = 'http://x'\napi_key_env = 'NO_SUCH_KEY_HERE'",
            "safety[0].api_key_env: NO_SUCH_KEY_HERE",
        ),
    ] {
        let error = match Gateway::start(told(&file, hooks).unwrap()).await {
            Err(GatewayError::Config(message)) => message,
            Err(other) => panic!("{hooks}: {other}"),
            Ok(_) => panic!("{hooks} is taken"),
        };
        assert!(
            error.contains(says) && error.contains("safety.toml"),
            "{error}"
        );
    }
}
