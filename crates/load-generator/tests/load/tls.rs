//! An https target with a certificate made here.

use std::sync::Arc;

use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use scalellm_load_generator::Plan;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

use crate::server::{Server, good_stream};

/// TLS on a port of its own, before a scripted server.
struct Secured {
    server: Server,
    port: u16,
    authority_pem: String,
    _runtime: Runtime,
}

impl Secured {
    fn start() -> Secured {
        let server = Server::start(|request| {
            assert!(request.head.contains("host: localhost"), "{}", request.head);
            good_stream(10, 2, 4)
        });
        let (config, authority_pem) = certificate_of("localhost");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("runtime");
        let listener = runtime
            .block_on(TcpListener::bind("127.0.0.1:0"))
            .expect("bind");
        let port = listener.local_addr().expect("address").port();
        let behind = server.address;
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    // A client that does not believe the certificate leaves here.
                    let Ok(mut plain) = acceptor.accept(stream).await else {
                        return;
                    };
                    let mut inner = TcpStream::connect(behind).await.expect("connect");
                    let copied = tokio::io::copy_bidirectional(&mut plain, &mut inner).await;
                    copied.map(|_| ()).unwrap_or_default();
                });
            }
        });
        Secured {
            server,
            port,
            authority_pem,
            _runtime: runtime,
        }
    }

    fn measure(&self, host: &str, tls: Value) -> Value {
        let level = json!({"concurrency": 2, "requests": 8});
        self.server.measure_with(level, |plan| {
            plan["url"] = json!(format!("https://{host}:{}/v1", self.port));
            plan["tls"] = tls.clone();
        })
    }
}

/// A server's settings with a certificate for `name`, and the authority that signed it.
fn certificate_of(name: &str) -> (ServerConfig, String) {
    let mut params = CertificateParams::new(Vec::new()).expect("names");
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let own_key = KeyPair::generate().expect("key");
    let authority = CertifiedIssuer::self_signed(params, own_key).expect("authority");
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(vec![name.to_owned()]).expect("names");
    let certificate = params.signed_by(&key, &authority).expect("certificate");
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).expect("key"),
        )
        .expect("certificate");
    (config, authority.pem())
}

#[test]
fn a_named_authority_is_believed_and_connections_are_kept() {
    let secured = Secured::start();
    let row = secured.measure("localhost", json!({"ca_pem": secured.authority_pem}));
    assert_eq!((&row["completed"], &row["failed"]), (&json!(8), &json!(0)));
    assert!(row["ttft_ms"]["p50"].as_f64().expect("TTFT") >= 10.0);
    assert_eq!(row["output_tokens"], 32);
    let connections = secured
        .server
        .connections
        .load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(connections, 2, "one for each client");
}

#[test]
fn strangers_are_refused_unless_asked_otherwise() {
    let secured = Secured::start();
    let stranger = secured.measure("localhost", json!({}));
    assert_eq!(stranger["failures"]["connect"]["count"], 8, "{stranger}");
    let message = stranger["failures"]["connect"]["example"].as_str();
    assert!(
        message.expect("example").contains("certificate"),
        "{stranger}"
    );
    // It is its name that the certificate is for.
    let elsewhere = json!({"ca_pem": secured.authority_pem});
    assert_eq!(secured.measure("127.0.0.1", elsewhere)["failed"], 8);
    let insecure = secured.measure("localhost", json!({"insecure": true}));
    assert_eq!(insecure["completed"], 8, "{insecure}");
}

#[test]
fn plain_http_at_a_tls_port_fails_and_the_run_goes_on() {
    let secured = Secured::start();
    let level = json!({"concurrency": 1, "requests": 2});
    let row = secured.server.measure_with(level, |plan| {
        plan["url"] = json!(format!("http://localhost:{}", secured.port));
    });
    assert_eq!((&row["completed"], &row["failed"]), (&json!(0), &json!(2)));
}

#[test]
fn a_bad_authority_is_refused_before_anything_is_sent() {
    let plan = json!({
        "url": "https://localhost", "endpoint": "completions", "model": "m", "max_tokens": 1,
        "prompts": [{"text": "a"}], "levels": [{"concurrency": 1, "requests": 1}],
        "tls": {"ca_pem": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
    });
    let message = Plan::from_json(&plan.to_string())
        .err()
        .expect("refused")
        .to_string();
    assert!(message.starts_with("ca_pem: "), "{message}");
}
