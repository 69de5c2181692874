//! An engine whose loop is the test itself.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use scalellm_engine_link::proto::{self, FinishReason};
use scalellm_engine_link::{
    Address, Command, EngineHandle, EngineInfo, Listener, ListenerConfig, Replica, ReplicaConfig,
    ReplicaState, StepOutput, Submission,
};

pub const EPOCH: u64 = 77;
pub const VOCAB_SIZE: u32 = 1_000;
pub const MAX_MODEL_LEN: u32 = 100_000;

pub fn info() -> EngineInfo {
    EngineInfo {
        model: "test".into(),
        epoch: EPOCH,
        vocab_size: VOCAB_SIZE,
        max_model_len: MAX_MODEL_LEN,
        max_num_seqs: 4,
        ..Default::default()
    }
}

pub fn tcp() -> Address {
    Address::Tcp("127.0.0.1:0".into())
}

/// A fresh path for a Unix socket.
pub fn unix() -> Address {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "scalellm-link-{}-{}.sock",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    Address::Unix(std::env::temp_dir().join(name))
}

pub struct Engine {
    listener: Option<Listener>,
    pub handle: EngineHandle,
}

impl Engine {
    pub fn start(address: &Address) -> Self {
        Self::start_with(address, info(), ListenerConfig::default())
    }

    pub fn start_with(address: &Address, info: EngineInfo, config: ListenerConfig) -> Self {
        let (listener, handle) =
            Listener::start_with(address, info, config).expect("a free address");
        Self {
            listener: Some(listener),
            handle,
        }
    }

    pub fn address(&self) -> Address {
        self.listener.as_ref().expect("it runs").address().clone()
    }

    /// As if its process had been killed.
    pub fn kill(mut self) {
        if let Some(listener) = self.listener.take() {
            listener.abort();
        }
    }

    pub fn close(mut self) {
        if let Some(listener) = self.listener.take() {
            listener.close();
        }
    }

    pub async fn commands(&self) -> Vec<Command> {
        commands(&self.handle).await
    }

    pub async fn command(&self) -> Command {
        let mut all = self.commands().await;
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    pub async fn submission(&self) -> Submission {
        match self.command().await {
            Command::Submit(submission) => *submission,
            other => panic!("{other:?} instead of a submit"),
        }
    }

    pub fn emit(&self, key: u64, ids: &[u32], reason: FinishReason) {
        self.handle
            .emit(vec![step(key, ids, reason)], proto::Load::default());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.take() {
            let address = listener.address().clone();
            listener.abort();
            if let Address::Unix(path) = address {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

pub fn step(key: u64, ids: &[u32], reason: FinishReason) -> StepOutput {
    let output = proto::Output {
        token_ids: ids.to_vec(),
        finish_reason: reason as i32,
        ..Default::default()
    };
    StepOutput { key, output }
}

/// Polls without holding up the test's runtime.
pub async fn commands(handle: &EngineHandle) -> Vec<Command> {
    soon("commands", async {
        loop {
            let commands = handle.poll(Duration::ZERO);
            if !commands.is_empty() {
                return commands;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
}

/// Fails the test instead of waiting for ever.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(10), future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

pub async fn reach(replica: &Replica, state: ReplicaState) {
    let mut changed = replica.changed();
    soon(&format!("{state:?}, it is {:?}", replica.state()), async {
        while replica.state() != state {
            changed.changed().await.expect("the replica lives");
        }
    })
    .await;
}

pub fn config() -> ReplicaConfig {
    ReplicaConfig {
        sessions: 1,
        backoff_min: Duration::from_millis(10),
        ..Default::default()
    }
}

pub async fn ready(address: &Address, config: ReplicaConfig) -> Arc<Replica> {
    let replica = Replica::start(address.clone(), config);
    reach(&replica, ReplicaState::Ready).await;
    replica
}

pub fn submit(prompt_ids: Vec<u32>, max_tokens: u32) -> proto::Submit {
    proto::Submit {
        prompt_ids,
        max_tokens,
        ..Default::default()
    }
}
