//! A TCP proxy that breaks things: what a network, a stopped process or a killed one look like from outside.

use std::sync::Arc;

use scalellm_engine_link::Address;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub struct Proxy {
    pub address: Address,
    /// Connections of an older generation are broken.
    generation: Arc<watch::Sender<u64>>,
    frozen: Arc<watch::Sender<bool>>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn start(upstream: &Address) -> Self {
        let Address::Tcp(upstream) = upstream.clone() else {
            panic!("TCP only")
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = Address::Tcp(listener.local_addr().expect("bound").to_string());
        let generation = Arc::new(watch::Sender::new(0));
        let frozen = Arc::new(watch::Sender::new(false));
        let (generations, freezes) = (generation.clone(), frozen.clone());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let upstream = upstream.clone();
                let mut cut = generations.subscribe();
                let (up, down) = (freezes.subscribe(), freezes.subscribe());
                connections.spawn(async move {
                    let Ok(server) = TcpStream::connect(&upstream).await else {
                        return;
                    };
                    let (client_read, client_write) = client.into_split();
                    let (server_read, server_write) = server.into_split();
                    tokio::select! {
                        _ = cut.changed() => {}
                        () = forward(client_read, server_write, up) => {}
                        () = forward(server_read, client_write, down) => {}
                    }
                });
            }
        });
        Self {
            address,
            generation,
            frozen,
            task,
        }
    }

    /// Breaks the connections; new ones are taken.
    pub fn cut(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// Bytes go nowhere any more; connections stay.
    pub fn freeze(&self, frozen: bool) {
        self.frozen.send_replace(frozen);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut frozen: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else {
            return;
        };
        if frozen.wait_for(|frozen| !frozen).await.is_err() || read == 0 {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
