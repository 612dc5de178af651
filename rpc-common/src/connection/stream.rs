//! The stream under amiquip: reads by way of the frame inspector, and writes by way of the frame writer.

use super::channel::Channels;
use super::frames::FrameInspector;
use super::transport::Transport;
use super::writer::FrameWriter;
use amiquip::IoStream;
use mio::unix::EventedFd;
use mio::{Evented, Poll, PollOpt, Ready, Token};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// A non-blocking connection that amiquip's I/O thread reads and writes.
pub(crate) struct Stream {
    writer: Arc<FrameWriter>,
    /// Without TLS: the socket, so that reading does not wait for writers.
    plain: Option<TcpStream>,
    inspector: FrameInspector,
    saw_frame: Arc<AtomicBool>,
}

impl Stream {
    /// Makes the transport non-blocking. `saw_frame` is set when the peer has sent a frame.
    pub(crate) fn new(transport: Transport, channels: Arc<Channels>, saw_frame: Arc<AtomicBool>) -> io::Result<Self> {
        transport.socket().set_nonblocking(true)?;
        let plain = match &transport {
            Transport::Plain(socket) => Some(socket.try_clone()?),
            Transport::Tls(_) => None,
        };
        let writer = Arc::new(FrameWriter::new(transport));
        Ok(Stream { writer, plain, inspector: FrameInspector::new(channels), saw_frame })
    }

    pub(crate) fn writer(&self) -> Arc<FrameWriter> {
        self.writer.clone()
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
            let count = match &mut self.plain {
                Some(socket) => socket.read(space)?,
                None => self.writer.read(space)?,
            };
            if count == 0 {
                return Ok(0);
            }
            let inspected = self.inspector.advance(count);
            if inspected.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))? {
                self.saw_frame.store(true, Ordering::Relaxed);
            }
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
        EventedFd(&self.writer.fd()).register(poll, token, ready, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.writer.fd()).reregister(poll, token, ready, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.writer.fd()).deregister(poll)
    }
}

impl IoStream for Stream {}
