//! Requests that run, and requests that wait, while the configuration changes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use scalellm_fake_engine::{FakeEngine, Settings};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::foreign::{DONE, HI};
use crate::operations::{file, from_file};
use crate::process::Process;
use crate::support::{
    Folder, Reply, metric, open, request, says, send, start_engine, streamed_text, wait_metric,
    with_model, write_model,
};
use crate::upstream::{Act, Mock, chunk, last_chunk, stream, stream_head};

/// Each part of it is like no other, so that nothing can be lost, or come twice, unseen.
fn long_text() -> String {
    (10..90).map(|n| n.to_string()).collect()
}

/// Two engines: one that takes its time for the long text, and one to change to.
struct Engines {
    folder: Folder,
    file: PathBuf,
    running: Vec<FakeEngine>,
}

impl Drop for Engines {
    /// They linger for a goodbye of their gateway, which ends with this test.
    fn drop(&mut self) {
        let running = std::mem::take(&mut self.running);
        std::thread::spawn(move || drop(running));
    }
}

impl Engines {
    fn start() -> Engines {
        let folder = Folder::new();
        write_model(&folder.0);
        let slow = Settings {
            tbt_ms: 20.0,
            ..says(&long_text())
        };
        let file = folder.0.join("gateway.toml");
        let mut engines = Engines {
            folder,
            file,
            running: Vec::new(),
        };
        for settings in [slow, says("second")] {
            let engine = start_engine(&engines.socket(engines.running.len()), settings);
            engines.running.push(engine);
        }
        engines
    }

    fn socket(&self, engine: usize) -> String {
        format!(
            "unix:{}",
            self.folder.0.join(format!("e{engine}")).display()
        )
    }

    /// Has the file name this engine alone.
    fn write_file(&self, engine: usize, more: &str) {
        let text = format!(
            "port = 0\nlog_format = 'json'\nreplica_silence_s = 30\nmax_in_flight = 1\n{more}\n\
             [[models]]\nname = 'bytes'\npath = '{}'\nreplicas = ['{}']\n",
            self.folder.0.display(),
            self.socket(engine)
        );
        std::fs::write(&self.file, text).unwrap();
    }
}

fn completion() -> Request<Full<Bytes>> {
    let asked = with_model(json!({
        "prompt": "x", "max_tokens": 500, "stream": true, "stream_options": {"include_usage": true}
    }));
    request(
        "POST",
        "/v1/completions",
        &[],
        Bytes::from(asked.to_string()),
    )
}

/// What a stream said, why it ended, and its usage.
fn told(reply: &Reply) -> (String, Value, Value) {
    let events = reply.events();
    let finish = |event: &Value| event["choices"][0]["finish_reason"].clone();
    let ends: Vec<Value> = events
        .iter()
        .map(finish)
        .filter(|finish| !finish.is_null())
        .collect();
    let usage = events.last().unwrap()["usage"].clone();
    (streamed_text(&events, 0), ends.into(), usage)
}

/// A stream that runs on the first engine and a request that waits for the only place both come to their whole ends
/// while `reload` puts the second engine in the first one's place.
async fn outlive(address: SocketAddr, engines: &Engines, reload: impl AsyncFnOnce()) {
    let (response, _connection) = open(address, completion()).await;
    let undisturbed = told(&Reply::read(response).await);
    assert_eq!(
        (&undisturbed.0, &undisturbed.1),
        (&long_text(), &json!(["stop"]))
    );
    let (response, _connection) = open(address, completion()).await;
    let waiting = tokio::spawn(send(address, completion()));
    wait_metric(address, "scalellm_queued_requests{", "", 1.0).await;
    let changed = "replica_hung_after_s = 20\nmax_queued = 1\nbatch_share = 0.1";
    engines.write_file(1, changed);
    reload().await;
    wait_metric(address, "scalellm_replica_state{", "e0", 0.0).await;
    let now = async |name| metric(address, name, "").await;
    assert_eq!(now("scalellm_generations_in_flight ").await, 1.0);
    assert_eq!(now("scalellm_queued_requests{").await, 1.0);
    let ready = "e1\",state=\"ready\"";
    wait_metric(address, "scalellm_replica_state{", ready, 1.0).await;
    // The place is taken still, and so is the queue's, which is of the new length.
    let third = send(address, completion()).await;
    assert_eq!(third.error(503)["code"], "overloaded");
    assert_eq!(told(&Reply::read(response).await), undisturbed);
    assert_eq!(told(&waiting.await.unwrap()).0, "second");
    assert_eq!(now("scalellm_replays_total{").await, 0.0);
}

#[tokio::test]
async fn a_reload_leaves_what_runs_and_what_waits_for_a_replica() {
    let engines = Engines::start();
    engines.write_file(0, "");
    let gateway = from_file(&engines.file).await;
    let address = gateway.address();
    wait_metric(address, "scalellm_replica_state{", "state=\"ready\"", 1.0).await;
    outlive(address, &engines, async || {
        let asked = request("POST", "/admin/v1/reload", &[], Bytes::new());
        let applied = send(address, asked).await.ok();
        let changed = |engine| json!([format!("bytes: {}", engines.socket(engine))]);
        assert_eq!(
            (&applied["added"], &applied["removed"]),
            (&changed(1), &changed(0))
        );
    })
    .await;
}

#[tokio::test]
async fn a_hangup_has_the_program_reload_and_leave_what_runs_and_what_waits() {
    let engines = Engines::start();
    engines.write_file(0, "");
    let process = Process::start(&engines.file).await;
    outlive(process.address, &engines, async || {
        process.signal("HUP");
        let changed = process.wait_logged("the configuration has changed").await;
        let added = changed["added"].as_str().unwrap();
        assert!(added.contains(&engines.socket(1)), "{added}");
    })
    .await;
    engines.write_file(0, "max_in_flight = 0");
    process.signal("HUP");
    let refused = process.wait_logged("nothing was reloaded").await;
    let error = refused["error"].as_str().unwrap();
    assert!(error.contains("max_in_flight"), "{error}");
    assert_eq!(told(&send(process.address, completion()).await).0, "second");
}

#[tokio::test]
async fn a_reload_leaves_what_runs_and_what_waits_for_a_server_elsewhere() {
    let gate = Arc::new(Notify::new());
    let wait = Arc::clone(&gate);
    let old = Mock::start(move |_| {
        let (hi, done) = (chunk(HI), chunk(DONE));
        let wait = Act::Wait(Arc::clone(&wait));
        vec![stream_head(), hi.clone(), wait, hi, done, last_chunk()]
    })
    .await;
    let new = Mock::start(|_| stream(&[HI, DONE])).await;
    let folder = Folder::new();
    let path = folder.0.join("gateway.toml");
    std::fs::write(&path, file(&old, "max_in_flight = 1")).unwrap();
    let gateway = from_file(&path).await;
    let address = gateway.address();
    let ask = || {
        let body = Bytes::from(r#"{"model":"chat","stream":true}"#);
        request("POST", "/v1/chat/completions", &[], body)
    };
    gate.notify_one();
    let undisturbed = send(address, ask()).await.text();
    assert_eq!(undisturbed, [HI, HI, DONE].concat());
    let (response, _connection) = open(address, ask()).await;
    let waiting = tokio::spawn(send(address, ask()));
    wait_metric(address, "scalellm_queued_requests{", "", 1.0).await;
    let hook =
        "[[models.safety]]\nhook = 'words'\nwords = ['hi']\naction = 'mask'\non = 'response'\n";
    let changed = file(&new, "max_in_flight = 1") + hook;
    std::fs::write(&path, changed).unwrap();
    let reload = request("POST", "/admin/v1/reload", &[], Bytes::new());
    let applied = send(address, reload).await.ok();
    assert_eq!(
        applied["added"],
        json!([format!("chat: {}", new.upstream().url)])
    );
    assert_eq!(metric(address, "scalellm_queued_requests{", "").await, 1.0);
    gate.notify_one();
    // It keeps its server and its hooks; who waited gets the new ones.
    assert_eq!(Reply::read(response).await.text(), undisturbed);
    let masked = waiting.await.unwrap();
    let masked = masked.events_of("data: ");
    assert_eq!(streamed_text(&masked, 0), "[REMOVED]", "{masked:?}");
    assert_eq!((old.seen().len(), new.seen().len()), (2, 1));
}
