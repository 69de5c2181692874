//! A model whose token ids are bytes, engines that speak it, a gateway before them, and a client.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use scalellm_engine_link::Address;
use scalellm_fake_engine::{FakeEngine, Output, Settings};
use scalellm_gateway::{Config, Gateway, ModelConfig};
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// The end-of-sequence id; ids below it are bytes.
pub const EOS: u32 = 256;
pub const VOCAB: u32 = 260;
/// Waits that a passing test never reaches.
pub const LONG: Duration = Duration::from_secs(60);

/// A folder that is removed with its last user.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!(
            "scalellm-http-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// GPT-2's printable stand-in for each byte.
fn byte_names() -> Vec<char> {
    let mut spare = 256_u32;
    (0..=255_u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                spare += 1;
                char::from_u32(spare - 1).unwrap()
            }
        })
        .collect()
}

/// Byte-level BPE without merges: one token a byte.
pub fn write_model(folder: &Path) {
    let vocab: serde_json::Map<String, Value> = byte_names()
        .into_iter()
        .enumerate()
        .map(|(id, name)| (name.to_string(), id.into()))
        .collect();
    let special = |(index, content): (usize, &str)| {
        json!({"id": 256 + index, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let names = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"];
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": names.into_iter().enumerate().map(special).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    let template = "{% for m in messages %}{% if m.role == 'boom' %}{{ raise_exception('no') }}{% endif %}\
                    <|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    std::fs::write(
        folder.join("config.json"),
        json!({"eos_token_id": EOS, "vocab_size": VOCAB}).to_string(),
    )
    .unwrap();
}

/// Engine settings for the byte model.
pub fn engine() -> Settings {
    Settings {
        vocab_size: VOCAB,
        max_model_len: 2048,
        eos_token_ids: vec![EOS],
        output: Output::Fixed {
            ids: ids("abcdefghij"),
        },
        ..Settings::default()
    }
}

pub fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// An engine that says `text` and then ends.
pub fn says(text: &str) -> Settings {
    Settings {
        output: Output::Fixed { ids: ids(text) },
        eos_after: Some(text.len() as u32),
        ..engine()
    }
}

/// A gateway before engines; all end when it is dropped.
pub struct Stack {
    pub gateway: Gateway,
    pub engines: Vec<Option<FakeEngine>>,
    pub folder: Folder,
}

impl Drop for Stack {
    /// Engines linger for their gateway's goodbye, which this test's runtime is not there to say.
    fn drop(&mut self) {
        let engines = std::mem::take(&mut self.engines);
        std::thread::spawn(move || drop(engines));
    }
}

impl Stack {
    pub async fn one(settings: Settings) -> Stack {
        Stack::start(vec![settings], |_| {}).await
    }

    /// Starts engines and the gateway, and waits until all are ready.
    pub async fn start(engines: Vec<Settings>, change: impl FnOnce(&mut Config)) -> Stack {
        let folder = Folder::new();
        write_model(&folder.0);
        let sockets: Vec<String> = (0..engines.len())
            .map(|i| format!("unix:{}", folder.0.join(format!("e{i}")).display()))
            .collect();
        let engines = engines
            .into_iter()
            .zip(&sockets)
            .map(|(settings, socket)| Some(start_engine(socket, settings)))
            .collect();
        let mut config = Config {
            port: 0,
            // A machine that is busy with other tests must not look like a dead engine.
            replica_silence_s: 30.0,
            replica_hung_after_s: 30.0,
            models: vec![ModelConfig {
                name: "bytes".to_owned(),
                aliases: vec!["alias".to_owned()],
                path: folder.0.clone(),
                replicas: sockets,
                ..ModelConfig::default()
            }],
            ..Config::default()
        };
        change(&mut config);
        let stack = Stack {
            gateway: Gateway::start(config).await.unwrap(),
            engines,
            folder,
        };
        stack.wait_ready().await;
        stack
    }

    /// Until every replica whose engine runs is ready.
    pub async fn wait_ready(&self) {
        let running = self
            .engines
            .iter()
            .filter(|engine| engine.is_some())
            .count();
        self.wait_metric("scalellm_replica_state{", "state=\"ready\"", running as f64)
            .await;
    }

    pub fn address(&self) -> SocketAddr {
        self.gateway.address()
    }

    pub fn socket(&self, engine: usize) -> String {
        format!(
            "unix:{}",
            self.folder.0.join(format!("e{engine}")).display()
        )
    }

    /// What clients are told of an engine; operators are told whose name it is.
    pub async fn name(&self, engine: usize) -> String {
        let listed = self.get("/admin/v1/replicas").await.ok();
        let replicas = listed["models"][0]["replicas"].as_array().unwrap();
        let is_it = |replica: &&Value| replica["address"] == self.socket(engine);
        let name = replicas.iter().find(is_it).unwrap()["name"].as_str();
        name.unwrap().to_owned()
    }

    pub async fn get(&self, path: &str) -> Reply {
        send(self.address(), request("GET", path, &[], Bytes::new())).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        send(
            self.address(),
            request("POST", path, &[], Bytes::from(body.to_string())),
        )
        .await
    }

    pub async fn complete(&self, fields: Value) -> Reply {
        self.post("/v1/completions", &with_model(fields)).await
    }

    pub async fn chat(&self, fields: Value) -> Reply {
        self.post("/v1/chat/completions", &with_model(fields)).await
    }

    /// Sum of the metric's lines that hold both texts.
    pub async fn metric(&self, name: &str, labels: &str) -> f64 {
        metric(self.address(), name, labels).await
    }

    pub async fn wait_metric(&self, name: &str, labels: &str, value: f64) {
        wait_metric(self.address(), name, labels, value).await;
    }
}

/// As [`Stack::metric`].
pub async fn metric(address: SocketAddr, name: &str, labels: &str) -> f64 {
    let asked = request("GET", "/metrics", &[], Bytes::new());
    let text = send(address, asked).await.text();
    text.lines()
        .filter(|line| line.starts_with(name) && line.contains(labels))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}

/// Until the metric, as [`Stack::metric`] sums it up, has this value.
pub async fn wait_metric(address: SocketAddr, name: &str, labels: &str, value: f64) {
    let start = Instant::now();
    loop {
        let now = metric(address, name, labels).await;
        if now == value {
            return;
        }
        assert!(
            start.elapsed() < LONG,
            "{name} {labels} is {now}, not {value}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn start_engine(socket: &str, settings: Settings) -> FakeEngine {
    let address: Address = socket.parse().unwrap();
    FakeEngine::start(&address, settings).unwrap()
}

pub fn with_model(mut fields: Value) -> Value {
    let map = fields.as_object_mut().unwrap();
    map.entry("model").or_insert("bytes".into());
    fields
}

pub fn request(
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Request<Full<Bytes>> {
    let mut builder = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost");
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(Full::new(body)).unwrap()
}

/// One request on a connection of its own, which closes when the response is dropped.
pub async fn open(
    address: SocketAddr,
    request: Request<Full<Bytes>>,
) -> (Response<Incoming>, Connection) {
    let tcp = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(tcp)).await.unwrap();
    let task = Connection(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let response = tokio::time::timeout(LONG, sender.send_request(request))
        .await
        .unwrap()
        .unwrap();
    (response, task)
}

/// Dropping it closes the client's socket.
pub struct Connection(tokio::task::JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> Reply {
    let (response, _connection) = open(address, request).await;
    Reply::read(response).await
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub async fn read(response: Response<Incoming>) -> Reply {
        let (parts, body) = response.into_parts();
        let body = tokio::time::timeout(LONG, body.collect())
            .await
            .unwrap()
            .unwrap()
            .to_bytes();
        Reply {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// The JSON of a successful answer.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The `error` object; checks the envelope's form.
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.header("content-type"), "application/json");
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        check_envelope(&body)
    }

    /// The JSON of each line that begins so.
    pub fn events_of(&self, begin: &str) -> Vec<Value> {
        let text = self.text();
        let data = text.lines().filter_map(|line| line.strip_prefix(begin));
        data.filter(|data| *data != "[DONE]")
            .filter_map(|data| serde_json::from_str(data).ok())
            .collect()
    }

    /// The JSON of each event; the framing is checked, and that `[DONE]` ends a stream unless an error did.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), "text/event-stream");
        let text = self.text();
        let frames = text
            .strip_suffix("\n\n")
            .expect("the stream ends with a whole frame")
            .split("\n\n");
        let mut data: Vec<&str> = frames
            .map(|frame| frame.strip_prefix("data: ").expect("a data line"))
            .collect();
        assert!(data.iter().all(|line| !line.contains('\n')));
        if *data.last().unwrap() == "[DONE]" {
            data.pop();
        } else {
            check_envelope(&serde_json::from_str(data.last().unwrap()).unwrap());
        }
        data.into_iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

fn check_envelope(body: &Value) -> Value {
    let error = &body["error"];
    assert!(
        error["message"].as_str().is_some_and(|m| !m.is_empty()),
        "{body}"
    );
    assert!(error["type"].is_string(), "{body}");
    assert!(
        error.get("param").is_some() && error.get("code").is_some(),
        "{body}"
    );
    error.clone()
}

/// All text of one choice of a stream, chat or completion.
pub fn streamed_text(events: &[Value], choice: u64) -> String {
    events
        .iter()
        .flat_map(|event| event["choices"].as_array().cloned().unwrap_or_default())
        .filter(|part| part["index"] == choice)
        .map(|part| {
            part["delta"]["content"]
                .as_str()
                .or(part["text"].as_str())
                .unwrap_or("")
                .to_owned()
        })
        .collect()
}

pub fn user(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}
