//! What ways to an engine cost this side: the pool's sessions, which all requests share; an HTTP/2 stream for each
//! request, on one connection; a connection for each request.
//!
//! ```text
//! scalellm-fake-engine unix:/tmp/engine.sock '{"ttft_ms": 10, "tbt_ms": 10, "max_num_seqs": 4096}' &
//! cargo run --release -p scalellm-engine-link --example links unix:/tmp/engine.sock [REQUESTS_AT_ONCE [SECONDS]]
//! ```
//!
//! Each of so many clients sends a request of 128 tokens, reads 64, and sends the next. Ways take turns, three times.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use scalellm_engine_link::proto::engine_client::EngineClient;
use scalellm_engine_link::proto::{self, to_engine};
use scalellm_engine_link::{Address, Replica, ReplicaConfig, ReplicaState};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};

type Failure = Box<dyn Error + Send + Sync>;

const PROMPT_TOKENS: u32 = 128;
const OUTPUT_TOKENS: u32 = 64;
const ROUNDS: usize = 3;

#[derive(Clone)]
enum Way {
    Sessions(Arc<Replica>),
    StreamEach(Channel),
    ConnectionEach(PathBuf),
}

impl Way {
    fn name(&self) -> &'static str {
        match self {
            Way::Sessions(_) => "sessions shared by all",
            Way::StreamEach(_) => "a stream a request",
            Way::ConnectionEach(_) => "a connection a request",
        }
    }

    /// Sends one request and reads its answer; how long its first token took.
    async fn request(&self) -> Result<Duration, Failure> {
        let sent = Instant::now();
        match self {
            Way::Sessions(replica) => {
                let mut outputs = replica.submit(submit(0))?;
                let mut first = None;
                while let Some(output) = outputs.next().await {
                    output?;
                    first.get_or_insert_with(|| sent.elapsed());
                }
                first.ok_or_else(|| "no output".into())
            }
            Way::StreamEach(channel) => alone(channel.clone(), sent).await,
            Way::ConnectionEach(socket) => alone(connected(socket).await?, sent).await,
        }
    }
}

fn submit(id: u64) -> proto::Submit {
    proto::Submit {
        request: Some(proto::RequestRef { id, attempt: 0 }),
        prompt_tokens: PROMPT_TOKENS,
        prompt_ids: (0..PROMPT_TOKENS).collect(),
        max_tokens: OUTPUT_TOKENS,
        ignore_eos: true,
        sampling: Some(proto::Sampling::default()),
        ..proto::Submit::default()
    }
}

/// A request with a session to itself.
async fn alone(channel: Channel, sent: Instant) -> Result<Duration, Failure> {
    let (to_engine, messages) = mpsc::channel(2);
    let hello = proto::Hello {
        session_id: format!("{:032x}", rand::random::<u128>()),
        ..proto::Hello::default()
    };
    for message in [
        to_engine::Message::Hello(hello),
        to_engine::Message::Submit(Box::new(submit(1))),
    ] {
        let message = Some(message);
        to_engine.send(proto::ToEngine { message }).await?;
    }
    let mut engine = EngineClient::new(channel);
    let asked = engine.session(ReceiverStream::new(messages)).await?;
    let (mut frames, mut first) = (asked.into_inner(), None);
    let mut is_over = false;
    while !is_over {
        let Some(frame) = frames.message().await? else {
            return Err("the session ended before its request".into());
        };
        for output in frame.outputs {
            first.get_or_insert_with(|| sent.elapsed());
            is_over |= output.finish_reason() != proto::FinishReason::Unspecified;
        }
    }
    // The engine takes it as goodbye: it would hold a session for a reattachment otherwise.
    drop(to_engine);
    while let Ok(Some(_)) = frames.message().await {}
    first.ok_or_else(|| "no output".into())
}

async fn connected(socket: &Path) -> Result<Channel, Failure> {
    let socket = socket.to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://engine");
    Ok(endpoint.connect_with_connector(connector).await?)
}

/// Processor time of this process.
fn cpu() -> Result<Duration, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Behind the command's name, which may hold anything: user and system time in hundredths of a second.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: Result<Vec<u64>, _> = ticks.map(str::parse).collect();
    Ok(Duration::from_millis(10 * ticks?.iter().sum::<u64>()))
}

/// Until `until`, request after request.
async fn client(way: Way, until: Instant) -> Result<Vec<Duration>, Failure> {
    let mut first_tokens = Vec::new();
    while Instant::now() < until {
        first_tokens.push(way.request().await?);
    }
    Ok(first_tokens)
}

async fn measure(way: &Way, clients: usize, time: Duration) -> Result<(), Failure> {
    let (before, until) = (cpu()?, Instant::now() + time);
    let mut running: JoinSet<_> = (0..clients).map(|_| client(way.clone(), until)).collect();
    let mut first_tokens = Vec::new();
    while let Some(done) = running.join_next().await {
        first_tokens.extend(done??);
    }
    let spent = cpu()? - before;
    first_tokens.sort_unstable();
    let tokens = first_tokens.len() as f64 * f64::from(OUTPUT_TOKENS);
    let percentile = |share: f64| {
        let at = (first_tokens.len() as f64 * share) as usize;
        first_tokens[at.min(first_tokens.len() - 1)].as_secs_f64() * 1e3
    };
    println!(
        "{:<24} {:6.2} us of processor time a token, first token p50 {:6.2} p99 {:6.2} ms, {} requests",
        way.name(),
        spent.as_secs_f64() * 1e6 / tokens,
        percentile(0.5),
        percentile(0.99),
        first_tokens.len(),
    );
    Ok(())
}

async fn run(address: &str, clients: usize, time: Duration) -> Result<(), Failure> {
    let address: Address = address.parse()?;
    let Address::Unix(socket) = &address else {
        return Err("the address is no Unix socket's".into());
    };
    let replica = Replica::start(address.clone(), ReplicaConfig::default());
    let mut changes = replica.changed();
    while replica.state() != ReplicaState::Ready {
        changes.changed().await?;
    }
    let ways = [
        Way::Sessions(Arc::clone(&replica)),
        Way::StreamEach(connected(socket).await?),
        Way::ConnectionEach(socket.clone()),
    ];
    for _ in 0..ROUNDS {
        for way in &ways {
            measure(way, clients, time).await?;
        }
    }
    replica.shutdown().await;
    Ok(())
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("an engine's address is missing")?;
    let clients: usize = arguments.next().map_or(Ok(64), |given| given.parse())?;
    let seconds: f64 = arguments.next().map_or(Ok(3.0), |given| given.parse())?;
    let time = Duration::from_secs_f64(seconds);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run(&address, clients.max(1), time))
}
