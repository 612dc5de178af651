//! The socket of a connection, with or without TLS, and the steps to it from a host name: DNS, TCP,
//! TLS.

use super::deadline::{run_in_background, Deadline};
use super::endpoint::Endpoint;
use super::error::ErrorKind;
use super::phase::Phase;
use super::tls::{TlsConfig, TlsStream};
use crate::text::describe_io_error;
use crossbeam_channel::RecvTimeoutError;

use socket2::SockRef;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Maximum number of bytes that the kernel holds of what it has not sent yet. More stays with us,
/// so that a server that stops sees whether the broker still takes its replies.
const MAX_UNSENT: u32 = 256 << 10;

/// A connection to the peer, with or without TLS, that does not block.
pub(crate) enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream>),
}

impl Transport {
    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Transport::Plain(socket) => socket,
            Transport::Tls(stream) => &stream.socket,
        }
    }

    /// Reads what has arrived; fails with `WouldBlock` if nothing has.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => socket.read(buffer),
            Transport::Tls(stream) => stream.read(buffer),
        }
    }

    /// Whether bytes have been read from the socket that [`read`](Self::read) has not returned.
    pub(crate) fn has_plaintext(&mut self) -> bool {
        match self {
            Transport::Plain(_) => false,
            Transport::Tls(stream) => stream.has_plaintext(),
        }
    }

    /// Writes until everything is written or the socket would block. Returns how many bytes were
    /// written.
    pub(crate) fn write_available(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written = 0;
        while written < bytes.len() {
            let result = match self {
                Transport::Plain(socket) => socket.write(&bytes[written..]),
                Transport::Tls(stream) => stream.write(&bytes[written..]),
            };
            match result {
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }
}

/// Connects to an address of an endpoint, with TLS if there is a configuration of TLS.
pub(crate) fn connect(
    endpoint: &Endpoint,
    address: SocketAddr,
    tls: Option<&TlsConfig>,
    deadline: &Deadline,
) -> Result<Transport, ErrorKind> {
    let begun = Instant::now();
    let timeout = deadline.remaining().max(Duration::from_millis(1)); // zero is an error
    let socket = TcpStream::connect_timeout(&address, timeout).map_err(|error| {
        match deadline.remaining() {
            Duration::ZERO => deadline.timed_out(Phase::OpeningTcpConnection),
            _ => unreachable(endpoint, &error),
        }
    })?;
    // Without TCP_NODELAY a call takes 44 ms.
    let configured = socket
        .set_nodelay(true)
        .and_then(|()| SockRef::from(&socket).set_tcp_notsent_lowat(MAX_UNSENT))
        .and_then(|()| socket.set_nonblocking(true));
    configured.map_err(|error| unreachable(endpoint, &error))?;
    log::debug!(
        "{address} accepted the connection, after {:.1?}",
        begun.elapsed()
    );
    let Some(config) = tls else {
        return Ok(Transport::Plain(socket));
    };
    let host = &endpoint.host;
    let begun = Instant::now();
    match TlsStream::handshake(config, host, socket, deadline) {
        Ok(stream) => {
            log::debug!(
                "{host} proved its name by a certificate, {}, after {:.1?}",
                stream.version(),
                begun.elapsed()
            );
            Ok(Transport::Tls(Box::new(stream)))
        }
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err(deadline.timed_out(Phase::TlsHandshake))
        }
        Err(error) => Err(tls_error(&error, config, host)),
    }
}

/// The addresses of an endpoint, at least one. Looks the host up on a thread of its own: nothing
/// can interrupt `getaddrinfo`. At worst the thread stays behind.
pub(crate) fn resolve(
    endpoint: &Endpoint,
    deadline: &Deadline,
) -> Result<Vec<SocketAddr>, ErrorKind> {
    if let Ok(address) = endpoint.host.parse::<IpAddr>() {
        return Ok(vec![(address, endpoint.port).into()]);
    }
    let name = (endpoint.host.clone(), endpoint.port);
    let begun = Instant::now();
    let lookup = run_in_background(move || name.to_socket_addrs().map(Vec::from_iter))?;
    let reason = match lookup.recv_deadline(deadline.instant()) {
        Ok(Ok(addresses)) if addresses.is_empty() => "no address".into(),
        Ok(Ok(addresses)) => {
            log::debug!(
                "{} is {addresses:?}, found after {:.1?}",
                endpoint.host,
                begun.elapsed()
            );
            return Ok(addresses);
        }
        Ok(Err(error)) => describe_io_error(&error),
        Err(RecvTimeoutError::Timeout) => {
            return Err(deadline.timed_out(Phase::ResolvingHostName));
        }
        Err(RecvTimeoutError::Disconnected) => "the lookup failed".into(),
    };
    // The resolver does not say that it could open no file.
    if let Err(error) = File::open("/dev/null") {
        return Err(ErrorKind::of_system(&error, ErrorKind::NotConnected));
    }
    Err(ErrorKind::NotConnected(format!(
        "cannot be resolved: {reason}: is the host name right?"
    )))
}

fn unreachable(endpoint: &Endpoint, error: &io::Error) -> ErrorKind {
    let source_name = endpoint.source_name;
    ErrorKind::of_system(error, |reason| {
        ErrorKind::NotConnected(format!(
            "cannot be reached (from {source_name}): {reason}: is RabbitMQ running there?"
        ))
    })
}

fn tls_error(error: &io::Error, config: &TlsConfig, host: &str) -> ErrorKind {
    let tls_error = error.get_ref().and_then(|inner| inner.downcast_ref());
    let is_other_protocol = matches!(tls_error, Some(rustls::Error::InvalidMessage(_)));
    if is_other_protocol || error.kind() == io::ErrorKind::UnexpectedEof {
        return ErrorKind::NotConnected(
            "did not answer with TLS (TLS is usually on port 5671)".into(),
        );
    }
    let reason = tls_error.map_or_else(
        || describe_io_error(error),
        |error| config.describe(error, host),
    );
    ErrorKind::NotConnected(format!("failed the TLS handshake: {reason}"))
}
