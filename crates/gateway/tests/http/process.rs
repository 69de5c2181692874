//! The stand-alone program as a process of its own, and what it logs.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::Value;

use crate::support::{LONG, Reply, request, send};

const PROGRAM: &str = env!("CARGO_BIN_EXE_scalellm-gateway");

/// A program that logs in JSON. It ends with the test.
pub struct Process {
    child: Child,
    pub address: SocketAddr,
    /// What it has written on standard output and standard error.
    lines: Arc<Mutex<Vec<String>>>,
    readers: Vec<thread::JoinHandle<()>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines that `pipe` gives, until it ends.
fn collect(
    pipe: impl Read + Send + 'static,
    lines: &Arc<Mutex<Vec<String>>>,
) -> thread::JoinHandle<()> {
    let lines = Arc::clone(lines);
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
            lines.lock().unwrap().push(line);
        }
    })
}

impl Process {
    /// Starts it with that file, and waits until every model can be computed.
    pub async fn start(file: &Path) -> Process {
        let mut child = Command::new(PROGRAM)
            .arg("--config")
            .arg(file)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = Arc::default();
        let readers = vec![
            collect(child.stdout.take().unwrap(), &lines),
            collect(child.stderr.take().unwrap(), &lines),
        ];
        let mut process = Process {
            child,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            lines,
            readers,
        };
        let listening = process.wait_logged("listening").await;
        process.address = listening["address"].as_str().unwrap().parse().unwrap();
        let start = Instant::now();
        while process.send("GET", "/ready", "").await.status != 200 {
            assert!(start.elapsed() < LONG);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process
    }

    pub async fn send(&self, method: &str, path: &str, body: &str) -> Reply {
        let body = Bytes::from(body.to_owned());
        send(self.address, request(method, path, &[], body)).await
    }

    /// The first event with that message.
    pub async fn wait_logged(&self, message: &str) -> Value {
        let start = Instant::now();
        loop {
            let lines = self.lines.lock().unwrap().clone();
            let mut events = lines.iter().filter_map(|line| event(line));
            if let Some(found) = events.find(|event| event["message"] == message) {
                return found;
            }
            assert!(start.elapsed() < LONG, "{message:?} is not in {lines:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(
            Command::new("sh")
                .args(["-c", &kill])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Has it drain and end; everything that it wrote.
    pub async fn end(mut self) -> Vec<String> {
        self.signal("TERM");
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LONG);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for reader in std::mem::take(&mut self.readers) {
            reader.join().unwrap();
        }
        std::mem::take(&mut *self.lines.lock().unwrap())
    }
}

/// The JSON object of a line.
pub fn event(line: &str) -> Option<Value> {
    serde_json::from_str(line).ok().filter(Value::is_object)
}
