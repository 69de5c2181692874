//! What the stand-alone program logs: one line a request, and never what was asked or answered.

use bytes::Bytes;
use http_body_util::BodyExt;
use scalellm_fake_engine::{FakeEngine, Faults, Settings};
use serde_json::{Value, json};

use crate::foreign::WHOLE;
use crate::process::{Process, event};
use crate::support::{Folder, Reply, engine, open, request, says, start_engine, user, write_model};
use crate::upstream::{Act, Mock, answer, chunk, json as answer_json, last_chunk, stream_head};

const CHAT: &str = "/v1/chat/completions";

/// A program before engines of our own, "bytes" with a well one and "failing" with one that fails, and before a
/// server elsewhere, "chat".
struct Scene {
    process: Process,
    engines: Vec<FakeEngine>,
    _folder: Folder,
}

impl Scene {
    async fn start(says: &str, upstream: &Mock, more: &str, hooks: &str) -> Scene {
        let folder = Folder::new();
        write_model(&folder.0);
        let socket = |name: &str| format!("unix:{}", folder.0.join(name).display());
        let well = self::says(says);
        let failing = Settings {
            faults: Faults {
                error_after: Some(1),
                ..Faults::default()
            },
            ..engine()
        };
        let own = |name: &str| {
            format!(
                "[[models]]\nname = '{name}'\npath = '{}'\nreplicas = ['{}']\n{hooks}",
                folder.0.display(),
                socket(name)
            )
        };
        let text = format!(
            "port = 0\nlog_format = 'json'\nreplica_silence_s = 30\nreplica_hung_after_s = 30\n{more}\n\
             {}{}[[models]]\nname = 'chat'\n[[models.upstreams]]\nurl = '{}'\nhealth_path = ''\n{hooks}",
            own("bytes"),
            own("failing"),
            upstream.upstream().url
        );
        let file = folder.0.join("gateway.toml");
        std::fs::write(&file, text).unwrap();
        let engines = vec![
            start_engine(&socket("bytes"), well),
            start_engine(&socket("failing"), failing),
        ];
        Scene {
            process: Process::start(&file).await,
            engines,
            _folder: folder,
        }
    }

    async fn chat(&self, model: &str, mut fields: Value) -> Reply {
        fields["model"] = model.into();
        self.process.send("POST", CHAT, &fields.to_string()).await
    }

    /// What is answered to this body, from a client with the key.
    async fn raw(&self, path: &str, body: &str) -> String {
        let bearer = format!("Bearer {KEY}");
        let headers = [("authorization", bearer.as_str())];
        let body = Bytes::from(body.to_owned());
        let asked = request("POST", path, &headers, body);
        let (response, _connection) = open(self.process.address, asked).await;
        // An answer of a server elsewhere may break off.
        let whole = response.into_body().collect().await;
        whole.map_or_else(
            |_| String::new(),
            |whole| String::from_utf8_lossy(&whole.to_bytes()).into_owned(),
        )
    }

    /// Everything that the program wrote until its end.
    async fn end(self) -> Vec<String> {
        let lines = self.process.end().await;
        drop(self.engines);
        lines
    }
}

fn of_access(lines: &[String]) -> Vec<Value> {
    let events = lines.iter().map(|line| event(line).expect(line));
    events.filter(|event| event["target"] == "access").collect()
}

#[tokio::test]
async fn every_request_is_one_line_of_json() {
    let mock = Mock::start(|_| vec![answer_json(WHOLE)]).await;
    let scene = Scene::start("well", &mock, "", "").await;
    let ask = json!({"messages": user("x")});
    let ids = [
        scene.chat("bytes", ask.clone()).await,
        scene.chat("chat", ask.clone()).await,
        scene.chat("failing", ask.clone()).await,
        scene.chat("none", ask).await,
        scene.chat("bytes", json!({"messages": "x"})).await,
        scene.process.send("GET", "/v1/models", "").await,
        scene.process.send("GET", "/health", "").await,
    ]
    .map(|reply| reply.header("x-request-id").to_owned());
    let lines = scene.end().await;
    let told = of_access(&lines);
    let of = |id: &String| {
        let mut one = told.iter().filter(|event| event["request_id"] == **id);
        let first = one.next();
        assert!(one.next().is_none(), "{id} is told twice");
        first
    };
    let [own, elsewhere, failed, unknown, wrong, listed, probed] = ids.each_ref().map(of);
    // Whoever watches the gateway is told at debug level.
    assert_eq!((probed, told.len()), (None, 6));
    let own = own.unwrap();
    for (name, value) in [
        ("level", json!("INFO")),
        ("method", json!("POST")),
        ("path", json!(CHAT)),
        ("status", json!(200)),
        ("outcome", json!("ok")),
        ("model", json!("bytes")),
        ("prompt_tokens", json!(3)),
        ("cached_tokens", json!(0)),
        ("output_tokens", json!(5)),
        ("finish", json!("stop")),
        ("replays", json!(0)),
    ] {
        assert_eq!(own[name], value, "{name} of {own}");
    }
    assert!(own["replica"].as_str().unwrap().ends_with("/bytes"));
    assert!(own["timestamp"].is_string() && own.get("error").is_none());
    let stages = own["stages"].as_str().unwrap();
    assert!(stages.contains("first;dur=") && stages.contains("total;dur="));
    let says =
        |event: Option<&Value>, names: [&str; 4]| names.map(|name| event.unwrap()[name].clone());
    let four = ["status", "outcome", "model", "code"];
    for (event, values) in [
        (elsewhere, json!([200, "ok", "chat", null])),
        (failed, json!([500, "error", "failing", "internal_error"])),
        (unknown, json!([404, "error", null, "model_not_found"])),
        (listed, json!([200, "ok", null, null])),
    ] {
        assert_eq!(Value::from(says(event, four).to_vec()), values);
    }
    assert_eq!(
        json!(
            says(
                elsewhere,
                ["prompt_tokens", "cached_tokens", "output_tokens", "replica"]
            )[..3]
        ),
        json!([5, 3, 2])
    );
    assert!(
        failed.unwrap()["error"]
            .as_str()
            .is_some_and(|error| !error.is_empty())
    );
    // What is wrong with a request is told to who sent it.
    let named = ["status", "code", "param", "error"];
    assert_eq!(
        json!(says(wrong, named)),
        json!([400, null, "messages", null])
    );
}

/// Words that nothing else says; what is asked, what is answered, and whom a client is.
const ASKED: &str = "heliotrope";
const ANSWERED: &str = "quicksilver";
const KEY: &str = "sk-cornflower";

/// What the server elsewhere does by the number that a request's `user` has.
fn misbehave(body: &str) -> Vec<Act> {
    let event = |text: &str| {
        format!(
            "data: {}\n\n",
            json!({"choices": [{"index": 0, "delta": {"content": text}}]})
        )
    };
    let asked: Value = serde_json::from_str(body).unwrap();
    match asked["user"].as_str().unwrap() {
        "whole" => vec![answer_json(&WHOLE.replace("hi", ANSWERED))],
        "stream" => vec![
            stream_head(),
            chunk(&event(ANSWERED)),
            chunk("data: [DONE]\n\n"),
            last_chunk(),
        ],
        "error event" => vec![
            stream_head(),
            chunk(&event(ANSWERED)),
            chunk(&format!(
                "data: {{\"error\":{{\"message\":\"{ANSWERED}\"}}}}\n\n"
            )),
            last_chunk(),
        ],
        "no JSON" => vec![answer_json(ANSWERED)],
        "no HTTP" => vec![Act::Send(format!("{ANSWERED}\r\n\r\n").into()), Act::Close],
        "no chunk" => vec![
            stream_head(),
            chunk(&event(ANSWERED)),
            Act::Send(format!("{ANSWERED}\r\n").into()),
            Act::Close,
        ],
        "no header" => vec![
            Act::Send(format!("HTTP/1.1 200 OK\r\ncontent-length: {ANSWERED}\r\n\r\n").into()),
            Act::Close,
        ],
        status => vec![answer(
            status,
            "content-type: application/json\r\n",
            &format!("{{\"error\":\"{ANSWERED}\"}}"),
        )],
    }
}

const BEHAVIOURS: [&str; 10] = [
    "whole",
    "stream",
    "error event",
    "no JSON",
    "no HTTP",
    "no chunk",
    "no header",
    "400 Bad Request",
    "500 Internal Server Error",
    "503 Service Unavailable",
];

/// Bodies that hold what is asked, good and bad.
fn bodies() -> Vec<String> {
    let mut bodies = vec![
        json!({"messages": user(ASKED)}),
        json!({"messages": user(ASKED), "stream": true}),
        json!({"messages": user(ASKED), "stop": ["k"]}),
        json!({"messages": user(&ASKED.repeat(300))}),
        json!({"messages": ASKED}),
        json!({"messages": [ASKED]}),
        json!({"messages": [{"role": ASKED, "content": ASKED}]}),
        json!({"messages": [{"role": "boom", "content": ASKED}]}),
        json!({"messages": [{"role": "user", "content": [{"type": ASKED, "text": ASKED}]}]}),
        json!({"messages": user(ASKED), "stop": {"a": ASKED}}),
        json!({"messages": user(ASKED), "temperature": ASKED}),
        json!({"messages": user(ASKED), "logit_bias": {ASKED: 1}}),
        json!({"messages": user(ASKED), "response_format": ASKED}),
        json!({"messages": user(ASKED), "prompt": ASKED, ASKED: ASKED}),
        json!({"messages": user(&format!("{ASKED} forbidden"))}),
        json!({"prompt": ASKED}),
        json!({"prompt": ASKED, "stream": true, "echo": true, "logprobs": 1}),
        json!({"prompt": {ASKED: ASKED}}),
        json!({"prompt": [ASKED, 1]}),
        json!({"prompt": [1, ASKED]}),
        json!({"prompt": format!("{ASKED} forbidden")}),
    ]
    .into_iter()
    .map(|body| body.to_string())
    .collect::<Vec<_>>();
    bodies.push(json!(ASKED).to_string());
    bodies.push(format!("{{\"messages\": {ASKED}"));
    bodies.push(format!(
        "{{\"messages\": [], \"{ASKED}\": 1, \"{ASKED}\": 2}}"
    ));
    bodies
}

const HOOKS: &str = "[[models.safety]]\nhook = 'words'\nwords = ['forbidden']\non = 'request'\n\
    [[models.safety]]\nhook = 'words'\nname = 'answers'\nwords = ['quicksilver']\non = 'response'\naction = 'mask'\n";

#[tokio::test]
async fn what_is_asked_and_answered_is_never_logged() {
    let settings = format!("log_level = 'trace'\napi_keys = ['{KEY}']");
    for hooks in ["", HOOKS] {
        let mock = Mock::start(|seen| misbehave(&seen.body)).await;
        let scene = Scene::start(ANSWERED, &mock, &settings, hooks).await;
        let mut answers = String::new();
        for body in bodies() {
            for model in ["bytes", "failing"] {
                let named = body.replacen('{', &format!("{{\"model\": \"{model}\", "), 1);
                for path in [CHAT, "/v1/completions", "/tokenize"] {
                    answers += &scene.raw(path, &named).await;
                }
            }
        }
        for behaviour in BEHAVIOURS {
            for stream in [false, true] {
                let asked = json!({"model": "chat", "user": behaviour, "stream": stream, "messages": user(ASKED)});
                answers += &scene.raw(CHAT, &asked.to_string()).await;
            }
        }
        let came = |behaviour| {
            let told = format!("\"user\":\"{behaviour}\"");
            mock.seen().iter().any(|seen| seen.body.contains(&told))
        };
        assert!(BEHAVIOURS.into_iter().all(came));
        let unknown = json!({"model": ASKED, "messages": user(ASKED)});
        answers += &scene.raw(CHAT, &unknown.to_string()).await;
        // Whoever asked is told.
        assert!(answers.contains(ASKED) && answers.contains(ANSWERED));
        let lines = scene.end().await;
        assert!(
            lines
                .iter()
                .any(|line| line.contains("\"level\":\"TRACE\""))
        );
        for secret in [ASKED, ANSWERED, KEY] {
            let told: Vec<_> = lines.iter().filter(|line| line.contains(secret)).collect();
            assert!(told.is_empty(), "{secret}: {told:#?}");
        }
    }
}
