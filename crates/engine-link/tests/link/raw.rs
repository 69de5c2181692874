//! The protocol by hand, for what the client would never send.

use scalellm_engine_link::Address;
use scalellm_engine_link::proto::engine_client::EngineClient;
use scalellm_engine_link::proto::{self, FromEngine, ToEngine, to_engine::Message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::support::soon;

pub struct Raw {
    pub send: mpsc::Sender<ToEngine>,
    pub receive: tonic::Streaming<FromEngine>,
}

pub async fn channel(address: &Address) -> Channel {
    let Address::Tcp(host_port) = address else {
        panic!("TCP only")
    };
    Endpoint::from_shared(format!("http://{host_port}"))
        .expect("an address")
        .connect()
        .await
        .expect("a listener")
}

impl Raw {
    /// Says hello; the Welcome is the first frame still to be received.
    pub async fn connect(address: &Address, session_id: &str, last_sequence: Option<u64>) -> Self {
        let hello = proto::Hello {
            session_id: session_id.into(),
            last_sequence,
            kv_events: true,
        };
        Self::open(address, Message::Hello(hello))
            .await
            .expect("a session")
    }

    pub async fn open(address: &Address, first: Message) -> Result<Self, tonic::Status> {
        let (send, messages) = mpsc::channel(1_024);
        send.send(ToEngine {
            message: Some(first),
        })
        .await
        .expect("room");
        let mut client = EngineClient::new(channel(address).await);
        let receive = client
            .session(ReceiverStream::new(messages))
            .await?
            .into_inner();
        Ok(Self { send, receive })
    }

    pub async fn send(&self, message: Message) {
        self.send
            .send(ToEngine {
                message: Some(message),
            })
            .await
            .expect("the stream lives");
    }

    pub async fn frame(&mut self) -> FromEngine {
        soon("a frame", self.receive.message())
            .await
            .expect("no error")
            .expect("not the end")
    }

    /// The next frame with a number.
    pub async fn numbered(&mut self) -> FromEngine {
        loop {
            let frame = self.frame().await;
            if frame.sequence > 0 {
                return frame;
            }
        }
    }

    pub async fn welcome(&mut self) -> proto::Welcome {
        self.frame()
            .await
            .welcome
            .expect("the first frame is Welcome")
    }
}

pub fn request(id: u64, attempt: u32) -> Option<proto::RequestRef> {
    Some(proto::RequestRef { id, attempt })
}

/// A small request in order.
pub fn good(id: u64) -> proto::Submit {
    proto::Submit {
        request: request(id, 0),
        prompt_tokens: 3,
        prompt_ids: vec![1, 2, 3],
        max_tokens: 10,
        ..Default::default()
    }
}
