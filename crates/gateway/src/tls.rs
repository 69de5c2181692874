//! TLS: for clients (HTTP/1.1 and HTTP/2, by ALPN), and to servers elsewhere (HTTP/1.1).

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::config::Config;
use crate::error::GatewayError;

/// What begins TLS with clients; `None` without a certificate in the configuration.
///
/// # Errors
/// `GatewayError::Config` names the file and what is wrong with it.
pub fn acceptor(config: &Config) -> Result<Option<TlsAcceptor>, GatewayError> {
    let (Some(certificates), Some(key)) = (&config.tls_cert, &config.tls_key) else {
        return Ok(None);
    };
    let bad = |key: &str, path: &Path, what: &dyn std::fmt::Display| {
        GatewayError::Config(format!("{key}: {}: {what}", path.display()))
    };
    let chain = CertificateDer::pem_file_iter(certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad("tls_cert", certificates, &error))?;
    if chain.is_empty() {
        return Err(bad(
            "tls_cert",
            certificates,
            &"there is no certificate in it",
        ));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| bad("tls_key", key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad("tls_cert", certificates, &error))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| bad("tls_key", key, &error))?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}

/// How TLS begins with one server.
pub struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Tls {
    /// Believes the public authorities, and those in `ca_file`.
    ///
    /// # Errors
    /// What is wrong with the file or the host's name.
    pub fn new(host: &str, ca_file: Option<&Path>) -> Result<Tls, String> {
        let mut roots = RootCertStore {
            roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
        };
        if let Some(file) = ca_file {
            add_roots(&mut roots, file)
                .map_err(|reason| format!("ca_file {}: {reason}", file.display()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Tls {
            connector: TlsConnector::from(Arc::new(config)),
            name: ServerName::try_from(host.to_owned()).map_err(|error| format!("url: {error}"))?,
        })
    }

    /// # Errors
    /// The server is not who it should be, or breaks off.
    pub async fn connect(&self, tcp: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.connector.connect(self.name.clone(), tcp).await
    }
}

fn add_roots(roots: &mut RootCertStore, file: &Path) -> Result<(), String> {
    let mut added = 0;
    for certificate in CertificateDer::pem_file_iter(file).map_err(|error| error.to_string())? {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
        added += 1;
    }
    if added == 0 {
        return Err("there is no certificate in it".to_owned());
    }
    Ok(())
}
