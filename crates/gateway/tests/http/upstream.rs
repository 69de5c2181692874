//! A server elsewhere that does with each request what the test says, byte by byte.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use scalellm_gateway::{Config, ModelConfig, UpstreamConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::support::LONG;

/// What the mock does for one request, in order.
#[derive(Clone)]
pub enum Act {
    Send(Vec<u8>),
    /// Until the test lets it go on.
    Wait(Arc<Notify>),
    /// Says nothing more, and keeps the connection open until the other side closes it.
    Hang,
    Close,
    Reset,
    /// Sends this again and again while somebody takes it.
    Forever(Vec<u8>),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Request line and headers.
    pub head: String,
    pub body: String,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<String> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
    }
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    open: AtomicUsize,
    sent_bytes: AtomicUsize,
}

type Answer = dyn Fn(&Seen) -> Vec<Act> + Send + Sync;

/// Ends with the test.
pub struct Mock {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection, plain or TLS.
enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

impl Wire {
    fn bytes(&mut self) -> &mut dyn Bytes {
        match self {
            Wire::Plain(tcp) => tcp,
            Wire::Tls(tls) => tls,
        }
    }

    fn tcp(&self) -> &TcpStream {
        match self {
            Wire::Plain(tcp) => tcp,
            Wire::Tls(tls) => tls.get_ref().0,
        }
    }
}

impl Mock {
    pub async fn start(answer: impl Fn(&Seen) -> Vec<Act> + Send + Sync + 'static) -> Mock {
        Mock::serve(answer, None).await
    }

    pub async fn at(
        address: SocketAddr,
        answer: impl Fn(&Seen) -> Vec<Act> + Send + Sync + 'static,
    ) -> Mock {
        let listener = TcpListener::bind(address).await.unwrap();
        Mock::listen(listener, answer, None)
    }

    /// The same behind TLS.
    pub async fn serve(
        answer: impl Fn(&Seen) -> Vec<Act> + Send + Sync + 'static,
        tls: Option<TlsAcceptor>,
    ) -> Mock {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Mock::listen(listener, answer, tls)
    }

    fn listen(
        listener: TcpListener,
        answer: impl Fn(&Seen) -> Vec<Act> + Send + Sync + 'static,
        tls: Option<TlsAcceptor>,
    ) -> Mock {
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let for_task = Arc::clone(&shared);
        let answer: Arc<Answer> = Arc::new(answer);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let shared = Arc::clone(&for_task);
                shared.connections.fetch_add(1, Ordering::SeqCst);
                shared.open.fetch_add(1, Ordering::SeqCst);
                let (answer, tls) = (Arc::clone(&answer), tls.clone());
                tcp.set_nodelay(true).unwrap();
                connections.spawn(async move {
                    let wire = match tls {
                        None => Some(Wire::Plain(tcp)),
                        Some(tls) => tls.accept(tcp).await.ok().map(|s| Wire::Tls(Box::new(s))),
                    };
                    if let Some(wire) = wire {
                        let _ = connection(wire, &shared, &*answer).await;
                    }
                    shared.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Mock {
            address,
            shared,
            task,
        }
    }

    /// Every request that was no question about health.
    pub fn seen(&self) -> Vec<Seen> {
        let seen = self.shared.seen.lock().unwrap();
        seen.iter()
            .filter(|seen| seen.head.starts_with("POST"))
            .cloned()
            .collect()
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    pub fn sent_bytes(&self) -> usize {
        self.shared.sent_bytes.load(Ordering::SeqCst)
    }

    /// Until every connection is closed.
    pub async fn wait_closed(&self) {
        let start = Instant::now();
        while self.shared.open.load(Ordering::SeqCst) > 0 {
            assert!(start.elapsed() < LONG, "a connection stays open");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// As an upstream of a model; it is not asked for its health.
    pub fn upstream(&self) -> UpstreamConfig {
        upstream(&format!("http://{}/v1", self.address))
    }
}

/// As an upstream of a model; it is not asked for its health.
pub fn upstream(url: &str) -> UpstreamConfig {
    let text = format!("url = '{url}'\nhealth_path = ''");
    toml::from_str(&text).unwrap()
}

/// The configuration of a gateway before these alone.
pub fn before(upstreams: Vec<UpstreamConfig>) -> impl FnOnce(&mut Config) {
    move |config| {
        config.models = vec![ModelConfig {
            name: "chat".to_owned(),
            upstreams,
            ..ModelConfig::default()
        }];
    }
}

async fn connection(mut wire: Wire, shared: &Shared, answer: &Answer) -> std::io::Result<()> {
    while let Some(seen) = read_request(wire.bytes()).await? {
        shared.seen.lock().unwrap().push(seen.clone());
        for act in answer(&seen) {
            match act {
                Act::Send(bytes) => {
                    wire.bytes().write_all(&bytes).await?;
                    wire.bytes().flush().await?;
                }
                Act::Wait(gate) => gate.notified().await,
                Act::Hang => {
                    let mut byte = [0];
                    while wire.bytes().read(&mut byte).await? > 0 {}
                    return Ok(());
                }
                Act::Close => return Ok(()),
                Act::Reset => return wire.tcp().set_zero_linger(),
                Act::Forever(bytes) => loop {
                    wire.bytes().write_all(&bytes).await?;
                    shared.sent_bytes.fetch_add(bytes.len(), Ordering::SeqCst);
                },
            }
        }
    }
    Ok(())
}

async fn read_request(stream: &mut dyn Bytes) -> std::io::Result<Option<Seen>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return Ok(None),
        }
    }
    let mut seen = Seen {
        head: String::from_utf8(head).unwrap(),
        body: String::new(),
    };
    let length = seen
        .header("content-length")
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    seen.body = String::from_utf8(body).unwrap();
    Ok(Some(seen))
}

/// A whole answer of a known length.
pub fn answer(status: &str, headers: &str, body: &str) -> Act {
    Act::Send(
        format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}",
            body.len()
        )
        .into(),
    )
}

pub fn json(body: &str) -> Act {
    answer("200 OK", "content-type: application/json\r\n", body)
}

/// The head of a stream, whose parts follow in chunks.
pub fn stream_head() -> Act {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    Act::Send(head.into())
}

pub fn chunk(data: &str) -> Act {
    Act::Send(format!("{:x}\r\n{data}\r\n", data.len()).into())
}

pub fn last_chunk() -> Act {
    Act::Send(b"0\r\n\r\n".to_vec())
}

/// A stream in one chunk a part.
pub fn stream(parts: &[&str]) -> Vec<Act> {
    let parts = parts.iter().map(|part| chunk(part));
    std::iter::once(stream_head())
        .chain(parts)
        .chain([last_chunk()])
        .collect()
}
