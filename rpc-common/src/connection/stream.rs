//! The stream under amiquip: reads by way of the frame inspector, and writes by way of the frame writer.

use super::frames::{FrameInspector, FRAME_MAX};
use super::writer::{FrameWriter, Transport};
use amiquip::IoStream;
use amq_protocol::frame::generation::gen_method_frame;
use amq_protocol::frame::{parse_frame, AMQPFrame};
use amq_protocol::protocol::connection::{AMQPMethod, StartOk};
use amq_protocol::protocol::AMQPClass;
use amq_protocol::types::AMQPValue;
use mio::unix::EventedFd;
use mio::{Evented, Poll, PollOpt, Ready, Token};
use socket2::SockRef;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

/// A non-blocking connection that amiquip's I/O thread reads and writes.
pub(crate) struct Stream {
    inspector: FrameInspector,
    writer: Arc<FrameWriter>,
    socket: TcpStream,
    has_tls: bool,
    /// `None` after the login.
    login: Option<Login>,
}

/// What amiquip's login lacks.
pub(crate) struct Login {
    /// What RabbitMQ shows in its list of connections.
    pub(crate) connection_name: String,
    /// Without heartbeats, the connection ends when the peer has acknowledged nothing of what was sent for this long.
    pub(crate) user_timeout: Duration,
}

impl Stream {
    /// Makes the transport non-blocking. Returns the writer for publishers as well.
    pub(crate) fn new(
        transport: Transport,
        inspector: FrameInspector,
        login: Login,
    ) -> io::Result<(Self, Arc<FrameWriter>)> {
        let socket = transport.socket().try_clone()?;
        socket.set_nonblocking(true)?;
        let has_tls = matches!(transport, Transport::Tls(_));
        let writer = Arc::new(FrameWriter::new(transport));
        Ok((Stream { inspector, writer: writer.clone(), socket, has_tls, login: Some(login) }, writer))
    }
}

impl Read for Stream {
    /// Reads bytes of whole frames; fails with `WouldBlock` while there are none.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.inspector.read(buffer);
            if count > 0 {
                return Ok(count);
            }
            let space = self.inspector.space();
            // Without TLS, reading does not wait for writers.
            let count = if self.has_tls { self.writer.read(space)? } else { self.socket.read(space)? };
            if count == 0 {
                return Ok(0);
            }
            self.inspector.advance(count).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
    }
}

impl Write for Stream {
    /// Takes all that amiquip writes. So each piece of it begins with a whole frame, but for the protocol header at the start,
    /// which is not a frame.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(login) = &self.login else {
            self.writer.write(bytes)?;
            self.writer.amiquip_writes.fetch_add(1, Ordering::Release);
            return Ok(bytes.len());
        };
        match parse_frame(bytes) {
            Ok((rest, AMQPFrame::Method(_, AMQPClass::Connection(AMQPMethod::StartOk(start_ok))))) => {
                self.writer.write(&[&complete(start_ok, &login.connection_name)?, rest].concat())?;
            }
            Ok((_, AMQPFrame::Method(_, AMQPClass::Connection(AMQPMethod::TuneOk(tune_ok))))) => {
                // Only without heartbeats: a user timeout also ends a connection to a live broker that reads nothing for so long.
                if tune_ok.heartbeat == 0 {
                    SockRef::from(&self.socket).set_tcp_user_timeout(Some(login.user_timeout))?;
                }
                self.login = None;
                self.writer.write(bytes)?;
            }
            _ => self.writer.write(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Encodes start-ok with more client properties. Without this capability, RabbitMQ refuses a login by closing the socket
/// after 3 s, as a broker that shuts down does.
fn complete(mut start_ok: StartOk, connection_name: &str) -> io::Result<Vec<u8>> {
    let properties = &mut start_ok.client_properties;
    properties.insert("connection_name".into(), AMQPValue::LongString(connection_name.into()));
    if let Some(AMQPValue::FieldTable(capabilities)) = properties.get_mut("capabilities") {
        capabilities.insert("authentication_failure_close".into(), AMQPValue::Boolean(true));
    }
    let mut frame = vec![0; FRAME_MAX as usize];
    let method = AMQPClass::Connection(AMQPMethod::StartOk(start_ok));
    let (_, end) = gen_method_frame((&mut frame, 0), 0, &method).map_err(|_| ErrorKind::InvalidInput)?;
    frame.truncate(end);
    Ok(frame)
}

// amiquip reads until `WouldBlock`, so that nothing decrypted stays behind in TLS.
impl Evented for Stream {
    fn register(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.socket.as_raw_fd()).register(poll, token, ready, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.socket.as_raw_fd()).reregister(poll, token, ready, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.socket.as_raw_fd()).deregister(poll)
    }
}

impl IoStream for Stream {}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::types::FieldTable;

    #[test]
    fn start_ok_gets_a_connection_name_and_a_capability_and_keeps_the_rest() {
        let entry = |name: &str| (name.to_owned(), AMQPValue::Boolean(true));
        let start_ok = |client_properties| {
            let (mechanism, response, locale) = ("PLAIN".into(), "\0me\0sesame".into(), "en_US".into());
            StartOk { client_properties, mechanism, response, locale }
        };
        let capabilities = AMQPValue::FieldTable(FieldTable::from([entry("connection.blocked")]));
        let original = start_ok(FieldTable::from([("capabilities".into(), capabilities)]));
        let capabilities = FieldTable::from([entry("authentication_failure_close"), entry("connection.blocked")]);
        let expected = start_ok(FieldTable::from([
            ("capabilities".into(), AMQPValue::FieldTable(capabilities)),
            ("connection_name".into(), AMQPValue::LongString("rpc-server".into())),
        ]));
        let frame = complete(original, "rpc-server").unwrap();
        let expected = AMQPFrame::Method(0, AMQPClass::Connection(AMQPMethod::StartOk(expected)));
        assert_eq!(parse_frame(&frame), Ok((&[][..], expected)));
    }
}
