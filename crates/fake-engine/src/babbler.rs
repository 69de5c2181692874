//! The worst of peers: accepts connections and talks nonsense.

use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use scalellm_engine_link::Address;

pub(crate) enum Babbler {
    Unix(UnixListener),
    Tcp(TcpListener),
}

pub(crate) fn bind(address: &Address) -> io::Result<(Babbler, Address)> {
    match address {
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok((Babbler::Unix(listener), address.clone()))
        }
        Address::Tcp(host_port) => {
            let listener = TcpListener::bind(host_port)?;
            listener.set_nonblocking(true)?;
            let address = Address::Tcp(listener.local_addr()?.to_string());
            Ok((Babbler::Tcp(listener), address))
        }
        Address::File(_) => Err(io::ErrorKind::InvalidInput.into()),
    }
}

impl Babbler {
    pub(crate) fn run(self, stop: &AtomicBool) {
        let nonsense: Vec<u8> = (0..512u32)
            .map(|i| (i.wrapping_mul(167) >> 2) as u8)
            .collect();
        while !stop.load(Ordering::Relaxed) {
            let connection: io::Result<Box<dyn Write>> = match &self {
                Babbler::Unix(listener) => listener
                    .accept()
                    .map(|(socket, _)| Box::new(socket) as Box<dyn Write>),
                Babbler::Tcp(listener) => listener
                    .accept()
                    .map(|(socket, _)| Box::new(socket) as Box<dyn Write>),
            };
            match connection {
                // The peer may have hung up already: the next one comes.
                Ok(mut socket) => drop(socket.write_all(&nonsense)),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}
