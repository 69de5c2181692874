//! Takes an address before anything is started, so that a wrong one is an error of the caller.

use std::io;
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::address::Address;

pub(super) enum Bound {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// Binds, and gives back the address with the real port where 0 was asked for.
pub(super) fn bind(address: &Address) -> io::Result<(Bound, Address)> {
    match address {
        Address::Unix(path) => {
            let listener = bind_unix(path).map_err(|error| with_address(address, &error))?;
            listener.set_nonblocking(true)?;
            Ok((Bound::Unix(listener), address.clone()))
        }
        Address::Tcp(host_port) => {
            let listener =
                TcpListener::bind(host_port).map_err(|error| with_address(address, &error))?;
            listener.set_nonblocking(true)?;
            let bound = Address::Tcp(listener.local_addr()?.to_string());
            Ok((Bound::Tcp(listener), bound))
        }
        Address::File(_) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{address}: an engine listens at unix:PATH or HOST:PORT"),
        )),
    }
}

fn with_address(address: &Address, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{address}: {error}"))
}

/// Replaces the socket file of a dead process; a live one's address is in use.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "a file that is not a socket is there",
                ));
            }
            match UnixStream::connect(path) {
                Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path)?;
                    UnixListener::bind(path)
                }
                _ => Err(error),
            }
        }
        bound => bound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_dead_socket_is_replaced() {
        let folder = std::env::temp_dir().join(format!("scalellm-bind-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("engine.sock");
        let address = Address::Unix(path.clone());
        let first = bind(&address).expect("a free path");
        let error = bind(&address).map(|_| ()).expect_err("it is alive");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("engine.sock"), "{error}");
        drop(first);
        assert!(path.exists(), "as a killed process leaves it");
        drop(bind(&address).expect("the dead one is replaced"));
        std::fs::remove_file(&path).expect("remove");
        std::fs::write(&path, b"precious").expect("write");
        assert_eq!(
            bind(&address).map(|_| ()).expect_err("a file").kind(),
            io::ErrorKind::AddrInUse
        );
        assert_eq!(std::fs::read(&path).expect("read"), b"precious");
        std::fs::remove_dir_all(&folder).expect("clean up");
    }

    #[test]
    fn port_zero_gives_a_real_one() {
        let (bound, address) = bind(&Address::Tcp("127.0.0.1:0".into())).expect("a free port");
        assert_ne!(address.to_string(), "127.0.0.1:0");
        let error = bind(&address).map(|_| ()).expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(bound);
    }
}
