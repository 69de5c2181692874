//! The other ways in: TLS and a Unix socket.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use scalellm_gateway::{Config, Gateway, ModelConfig};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use super::operations::{WHOLE, file, from_file};
use super::support::{Folder, Reply, Stack, request};
use super::upstream::{Mock, before, json as answer};

/// A certificate for localhost in two files, and the connector that believes it.
fn certificate(folder: &Path) -> TlsConnector {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn clients_speak_tls_and_a_new_certificate_is_taken_up() {
    let mock = Mock::start(|_| vec![answer(WHOLE)]).await;
    let folder = Folder::new();
    let path = folder.0.join("gateway.toml");
    let connector = certificate(&folder.0);
    let tls = format!(
        "tls_cert = '{0}/cert.pem'\ntls_key = '{0}/key.pem'",
        folder.0.display()
    );
    std::fs::write(&path, file(&mock, &tls)).unwrap();
    let gateway = from_file(&path).await;
    let name = || ServerName::try_from("localhost").unwrap();
    let connect = async |connector: &TlsConnector| {
        let tcp = TcpStream::connect(gateway.address()).await.unwrap();
        connector.connect(name(), tcp).await
    };
    let stream = connect(&connector).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    let task = tokio::spawn(connection);
    let mut asked = request(
        "POST",
        "/v1/chat/completions",
        &[],
        Bytes::from(r#"{"model":"chat"}"#),
    );
    *asked.uri_mut() = "https://localhost/v1/chat/completions".parse().unwrap();
    asked.headers_mut().remove("host");
    let reply = Reply::read(sender.send_request(asked).await.unwrap()).await;
    assert_eq!(reply.text(), WHOLE);
    let renewed = certificate(&folder.0);
    assert!(connect(&renewed).await.is_err());
    let mut asked: hyper::Request<Full<Bytes>> =
        request("POST", "/admin/v1/reload", &[], Bytes::new());
    *asked.uri_mut() = "https://localhost/admin/v1/reload".parse().unwrap();
    asked.headers_mut().remove("host");
    let reloaded = Reply::read(sender.send_request(asked).await.unwrap()).await;
    assert_eq!(reloaded.status, 200, "{}", reloaded.text());
    assert!(connect(&renewed).await.is_ok());
    assert!(connect(&connector).await.is_err());
    task.abort();
}

#[tokio::test]
async fn half_a_tls_greeting_is_closed() {
    let mock = Mock::start(|_| vec![answer(WHOLE)]).await;
    let folder = Folder::new();
    let path = folder.0.join("gateway.toml");
    let _ = certificate(&folder.0);
    let tls = format!(
        "header_timeout_s = 0.1\ntls_cert = '{0}/cert.pem'\ntls_key = '{0}/key.pem'",
        folder.0.display()
    );
    std::fs::write(&path, file(&mock, &tls)).unwrap();
    let gateway = from_file(&path).await;
    let tcp = TcpStream::connect(gateway.address()).await.unwrap();
    tcp.readable().await.unwrap();
    assert_eq!(tcp.try_read(&mut [0; 8]).unwrap(), 0);
}

#[tokio::test]
async fn a_unix_socket_is_another_way_in() {
    let mock = Mock::start(|_| vec![answer(WHOLE)]).await;
    let folder = Folder::new();
    let socket = folder.0.join("http.sock");
    // What a killed process leaves behind is in nobody's way.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let stack = Stack::start(Vec::new(), |config| {
        before(vec![mock.upstream()])(config);
        config.unix_socket = Some(socket.clone());
    })
    .await;
    let stream = UnixStream::connect(&socket).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let task = tokio::spawn(connection);
    let asked = request("GET", "/admin/v1/replicas", &[], Bytes::new());
    let reply = Reply::read(sender.send_request(asked).await.unwrap()).await;
    assert_eq!(reply.ok()["models"][0]["model"], "chat");
    task.abort();
    let config = Config {
        port: 0,
        unix_socket: Some(socket.clone()),
        models: vec![ModelConfig {
            name: "x".to_owned(),
            upstreams: vec![mock.upstream()],
            ..ModelConfig::default()
        }],
        ..Config::default()
    };
    assert!(Gateway::start(config).await.is_err(), "the socket is taken");
    drop(stack);
}
