//! The steps from a host name to a connected transport: DNS, TCP, TLS.

use super::deadline::{run_in_background, Deadline, Watchdog};
use super::endpoint::Endpoint;
use super::error::ErrorKind;
use super::tls::{describe_tls_error, TlsStream};
use super::writer::Transport;
use crate::text::describe_io_error;
use crossbeam_channel::RecvTimeoutError;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// The largest times of a TCP keepalive that Linux accepts, in seconds.
const MAX_KEEPALIVE: u16 = 32_767;

/// Connects to an address of an endpoint, with TLS if its URL says so. The socket is blocking.
pub(crate) fn connect(
    endpoint: &Endpoint,
    address: SocketAddr,
    deadline: &Deadline,
) -> Result<(Transport, Watchdog), ErrorKind> {
    let begun = Instant::now();
    let timeout = deadline.remaining().max(Duration::from_millis(1)); // zero is an error
    let socket = TcpStream::connect_timeout(&address, timeout).map_err(|error| match deadline.remaining() {
        Duration::ZERO => ErrorKind::TimedOut(deadline.limit(), "opening the TCP connection"),
        _ => unreachable(endpoint, &error),
    })?;
    let watchdog = configure(&socket, endpoint.heartbeat).map_err(|error| unreachable(endpoint, &error))?;
    log::debug!("{address} accepted the connection, after {:.1?}", begun.elapsed());
    let Some(files) = &endpoint.tls else { return Ok((Transport::Plain(socket), watchdog)) };
    let (config, host, begun) = (files.client_config()?, &endpoint.host, Instant::now());
    match watchdog.run_until(deadline, || TlsStream::handshake(config, host, socket)) {
        Some(Ok(stream)) => {
            log::debug!("{host} proved its name by a certificate, {}, after {:.1?}", stream.version(), begun.elapsed());
            Ok((Transport::Tls(Box::new(stream)), watchdog))
        }
        Some(Err(error)) => Err(tls_error(&error, host)),
        None => Err(ErrorKind::TimedOut(deadline.limit(), "waiting for the TLS handshake")),
    }
}

/// The addresses of an endpoint, at least one. Looks the host up on a thread of its own: nothing can interrupt
/// `getaddrinfo`. At worst the thread stays behind.
pub(crate) fn resolve(endpoint: &Endpoint, deadline: &Deadline) -> Result<Vec<SocketAddr>, ErrorKind> {
    if let Ok(address) = endpoint.host.parse::<IpAddr>() {
        return Ok(vec![(address, endpoint.port).into()]);
    }
    let (name, begun) = ((endpoint.host.clone(), endpoint.port), Instant::now());
    let lookup = run_in_background(move || name.to_socket_addrs().map(Vec::from_iter));
    let reason = match lookup.recv_deadline(deadline.instant()) {
        Ok(Ok(addresses)) if addresses.is_empty() => "no address".into(),
        Ok(Ok(addresses)) => {
            log::debug!("{} is {addresses:?}, found after {:.1?}", endpoint.host, begun.elapsed());
            return Ok(addresses);
        }
        Ok(Err(error)) => describe_io_error(&error),
        Err(RecvTimeoutError::Timeout) => {
            return Err(ErrorKind::TimedOut(deadline.limit(), "resolving the host name"));
        }
        Err(RecvTimeoutError::Disconnected) => "the lookup failed".into(),
    };
    Err(ErrorKind::NotConnected(format!("cannot be resolved: {reason}: is the host name right?")))
}

fn unreachable(endpoint: &Endpoint, error: &io::Error) -> ErrorKind {
    let (source_name, reason) = (endpoint.source_name, describe_io_error(error));
    ErrorKind::NotConnected(format!("cannot be reached (from {source_name}): {reason}: is RabbitMQ running there?"))
}

/// Sets the socket's options, and starts a watchdog for it.
///
/// The kernel notices a dead peer after two heartbeats, for a broker that sends none: it probes after one of silence, then
/// twice, half a heartbeat apart.
fn configure(socket: &TcpStream, heartbeat: u16) -> io::Result<Watchdog> {
    socket.set_nodelay(true)?; // amiquip's `open` does not set it: 44 ms a call
    let seconds = |number: u16| Duration::from_secs(number.clamp(1, MAX_KEEPALIVE).into());
    let keepalive = TcpKeepalive::new().with_time(seconds(heartbeat)).with_interval(seconds(heartbeat / 2));
    SockRef::from(socket).set_tcp_keepalive(&keepalive.with_retries(2))?;
    Watchdog::new(socket.try_clone()?)
}

fn tls_error(error: &io::Error, host: &str) -> ErrorKind {
    let tls_error = error.get_ref().and_then(|inner| inner.downcast_ref());
    let is_other_protocol = matches!(tls_error, Some(rustls::Error::InvalidMessage(_)));
    if is_other_protocol || error.kind() == io::ErrorKind::UnexpectedEof {
        return ErrorKind::NotConnected("did not answer with TLS (TLS is usually on port 5671)".into());
    }
    let reason = tls_error.map_or_else(|| describe_io_error(error), |error| describe_tls_error(error, host));
    ErrorKind::NotConnected(format!("failed the TLS handshake: {reason}"))
}
