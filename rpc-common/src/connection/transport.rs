//! What carries the bytes of a connection: a TCP socket, with or without TLS.

use super::tls::describe_tls_error;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::TcpStream;
use std::sync::Arc;

/// A connection to the peer, with or without TLS.
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

    /// Writes until everything is written or the socket would block. Returns how many bytes were written.
    pub(crate) fn write_available(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written = 0;
        while written < bytes.len() {
            let result = match self {
                Transport::Plain(socket) => socket.write(&bytes[written..]),
                Transport::Tls(stream) => stream.write(&bytes[written..]),
            };
            match result {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => socket.read(buffer),
            Transport::Tls(stream) => stream.read(buffer),
        }
    }
}

/// A TCP connection with TLS.
pub(crate) struct TlsStream {
    connection: ClientConnection,
    socket: TcpStream,
    /// Plaintext that is encrypted but not yet reported as written; the caller passes the same bytes again.
    unreported: usize,
}

impl TlsStream {
    /// Does the TLS handshake on a blocking socket. The peer's certificate must be signed by a trusted CA, be valid
    /// now, and match `host`, a host name or an IP address.
    ///
    /// # Errors
    /// With a [`rustls::Error`] inside, where TLS itself failed.
    pub(crate) fn handshake(config: ClientConfig, host: &str, mut socket: TcpStream) -> io::Result<Self> {
        let host = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let mut connection = ClientConnection::new(Arc::new(config), host).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        Ok(TlsStream { connection, socket, unreported: 0 })
    }

    fn receive(&mut self) -> io::Result<()> {
        self.connection.read_tls(&mut self.socket)?;
        match self.connection.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => Err(io::Error::new(ErrorKind::InvalidData, describe_tls_error(&error, ""))),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.receive()?,
                // The peer closed the socket without close_notify.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                result => return result,
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.unreported == 0 {
            self.unreported = self.connection.writer().write(bytes)?;
        }
        while self.connection.wants_write() {
            if let Err(error) = self.connection.write_tls(&mut self.socket) {
                return Err(self.explain_write_error(error));
            }
        }
        Ok(mem::take(&mut self.unreported))
    }

    /// A broker that refuses our certificate sends an alert and closes the socket. The alert can still be read when
    /// writing fails.
    fn explain_write_error(&mut self, error: io::Error) -> io::Error {
        if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) {
            if let Err(cause) = self.receive() {
                if cause.kind() == ErrorKind::InvalidData {
                    return cause;
                }
            }
        }
        error
    }
}
