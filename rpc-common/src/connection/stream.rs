//! The stream under amiquip: reads by way of the frame inspector, and writes by way of the frame writer.

use super::frames::FrameInspector;
use super::writer::{FrameWriter, Transport};
use amiquip::IoStream;
use mio::unix::EventedFd;
use mio::{Evented, Poll, PollOpt, Ready, Token};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// A non-blocking connection that amiquip's I/O thread reads and writes.
pub(crate) struct Stream {
    inspector: FrameInspector,
    writer: Arc<FrameWriter>,
    socket: TcpStream,
    has_tls: bool,
}

impl Stream {
    /// Makes the transport non-blocking. Returns the writer for publishers as well.
    pub(crate) fn new(transport: Transport, inspector: FrameInspector) -> io::Result<(Self, Arc<FrameWriter>)> {
        let socket = transport.socket().try_clone()?;
        socket.set_nonblocking(true)?;
        let has_tls = matches!(transport, Transport::Tls(_));
        let writer = Arc::new(FrameWriter::new(transport));
        Ok((Stream { inspector, writer: writer.clone(), socket, has_tls }, writer))
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
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
