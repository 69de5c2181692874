//! An HTTP/1.1 server that answers each request with a script of bytes, waits and faults.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use scalellm_load_generator::{Plan, Report, Run};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

#[derive(Clone)]
pub enum Step {
    Send(Vec<u8>),
    Wait(u64),
    /// Close in order (FIN).
    Close,
    /// Break the connection (RST).
    Reset,
    Hang,
}

pub struct Request {
    /// Counted over all connections, from 0.
    pub number: usize,
    pub head: String,
    pub body: Value,
}

type Script = dyn Fn(&Request) -> Vec<Step> + Send + Sync;

pub struct Server {
    pub address: SocketAddr,
    pub connections: Arc<AtomicUsize>,
    _runtime: Runtime,
}

impl Server {
    pub fn start(script: impl Fn(&Request) -> Vec<Step> + Send + Sync + 'static) -> Server {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("runtime");
        let listener = runtime
            .block_on(TcpListener::bind("127.0.0.1:0"))
            .expect("bind");
        let address = listener.local_addr().expect("address");
        let script: Arc<Script> = Arc::new(script);
        let requests = Arc::new(AtomicUsize::new(0));
        let connections = Arc::new(AtomicUsize::new(0));
        let accepted = Arc::clone(&connections);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(stream, Arc::clone(&script), Arc::clone(&requests)));
            }
        });
        Server {
            address,
            connections,
            _runtime: runtime,
        }
    }

    /// A plan of one level for this server; `change` edits its JSON.
    pub fn plan(&self, level: Value, change: impl Fn(&mut Value)) -> Plan {
        let mut plan = json!({
            "url": format!("http://{}", self.address), "endpoint": "completions", "model": "m",
            "max_tokens": 16, "prompts": [{"token_ids": [1, 2, 3]}], "levels": [level],
        });
        change(&mut plan);
        Plan::from_json(&plan.to_string()).expect("plan")
    }

    /// Runs one level to its end; returns its JSON row.
    pub fn measure(&self, level: Value) -> Value {
        self.measure_with(level, |_| {})
    }

    pub fn measure_with(&self, level: Value, change: impl Fn(&mut Value)) -> Value {
        row(finish(Run::start(self.plan(level, change)).expect("run")))
    }
}

/// `number` sends at equal gaps of `gap_ms`, the first at once.
pub fn every_ms(gap_ms: f64, number: usize) -> Vec<f64> {
    (0..number).map(|at| at as f64 * gap_ms / 1e3).collect()
}

/// Waits for a run's end.
pub fn finish(mut run: Run) -> Report {
    run.wait(Duration::from_secs(60))
        .expect("the run ends")
        .expect("report")
}

pub fn row(report: Report) -> Value {
    let report = serde_json::to_value(report).expect("JSON");
    report["levels"][0].clone()
}

async fn serve(mut stream: TcpStream, script: Arc<Script>, requests: Arc<AtomicUsize>) {
    let mut bytes = Vec::new();
    while let Some((head, body)) = read_request(&mut stream, &mut bytes).await {
        let number = requests.fetch_add(1, Ordering::Relaxed);
        let body = serde_json::from_slice(&body).expect("the generator sends JSON");
        for step in script(&Request { number, head, body }) {
            match step {
                Step::Send(bytes) if stream.write_all(&bytes).await.is_err() => return,
                Step::Send(_) => {}
                Step::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                Step::Close => return,
                Step::Reset => return stream.set_zero_linger().expect("linger"),
                Step::Hang => std::future::pending().await,
            }
        }
    }
}

async fn read_request(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            let whole = end + 4 + length.expect("length").parse::<usize>().expect("number");
            if bytes.len() >= whole {
                let rest = bytes.split_off(whole);
                let body = std::mem::replace(bytes, rest).split_off(end + 4);
                return Some((head, body));
            }
        }
        if stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// One piece of a chunked body.
pub fn piece(data: &str) -> Step {
    Step::Send(format!("{:x}\r\n{data}\r\n", data.len()).into_bytes())
}

/// The head of a chunked answer of this content type.
pub fn head(content_type: &str) -> Step {
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    Step::Send(head.into_bytes())
}

pub fn end() -> Step {
    Step::Send(b"0\r\n\r\n".to_vec())
}

/// The event of one token.
pub fn token() -> Step {
    piece("data: {\"choices\":[{\"text\":\" a\",\"finish_reason\":null}]}\n\n")
}

/// A whole, good stream: `ttft_ms`, then `tokens` tokens `tbt_ms` apart, usage, `[DONE]`.
pub fn good_stream(ttft_ms: u64, tbt_ms: u64, tokens: usize) -> Vec<Step> {
    let mut steps = vec![head("text/event-stream"), Step::Wait(ttft_ms), token()];
    for _ in 1..tokens {
        steps.extend([Step::Wait(tbt_ms), token()]);
    }
    steps.push(piece(
        "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\n\n",
    ));
    steps.push(piece(&format!(
        "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":{tokens}}}}}\n\n"
    )));
    steps.extend([piece("data: [DONE]\n\n"), end()]);
    steps
}
