//! The socket of a connection, with or without TLS, and the one way to write to it: whole frames, for amiquip's I/O
//! thread and for all publishers.

use super::tls::TlsStream;
use crate::sync::lock;
use mio::unix::EventedFd;
use mio::{Events, Poll, PollOpt, Ready, Token};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread;

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
    fn write_available(&mut self, bytes: &[u8]) -> io::Result<usize> {
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
}

/// A **frame writer** takes whole frames from any thread, one caller at a time, and never waits for the peer.
pub(crate) struct FrameWriter {
    state: Mutex<State>,
    /// How often amiquip has written since the login.
    pub(crate) amiquip_writes: AtomicU64,
}

struct State {
    transport: Transport,
    /// What the socket has not taken yet. If it is not empty, a thread drains it.
    backlog: VecDeque<u8>,
}

impl FrameWriter {
    /// Takes a non-blocking transport.
    pub(crate) fn new(transport: Transport) -> Self {
        let state = Mutex::new(State { transport, backlog: VecDeque::new() });
        FrameWriter { state, amiquip_writes: AtomicU64::new(0) }
    }

    /// Reads from the transport. With TLS reading and writing share their state.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut lock(&self.state).transport {
            Transport::Plain(socket) => socket.read(buffer),
            Transport::Tls(stream) => stream.read(buffer),
        }
    }

    /// Takes all of these frames, and writes what the socket takes now.
    ///
    /// # Errors
    /// When the connection has ended. It is shut down, so that reading from it fails, too.
    pub(crate) fn write(self: &Arc<Self>, frames: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        if !state.backlog.is_empty() {
            state.backlog.extend(frames); // a thread drains it
            return Ok(());
        }
        let result = self.write_or_start_thread(&mut state, frames);
        if result.is_err() {
            state.shut_down();
        }
        result
    }

    fn write_or_start_thread(self: &Arc<Self>, state: &mut State, frames: &[u8]) -> io::Result<()> {
        let written = state.transport.write_available(frames)?;
        if written < frames.len() {
            state.backlog.extend(&frames[written..]);
            let writer = self.clone();
            thread::Builder::new().name("backlog".into()).spawn(move || {
                if writer.drain_backlog().is_err() {
                    lock(&writer.state).shut_down();
                }
            })?;
        }
        Ok(())
    }

    /// Writes the backlog as the socket takes it, until it is empty.
    fn drain_backlog(&self) -> io::Result<()> {
        let poll = Poll::new()?;
        let fd = lock(&self.state).transport.socket().as_raw_fd();
        poll.register(&EventedFd(&fd), Token(0), Ready::writable(), PollOpt::level())?;
        loop {
            poll.poll(&mut Events::with_capacity(1), None)?;
            let mut state = lock(&self.state);
            let State { transport, backlog } = &mut *state;
            let written = transport.write_available(backlog.as_slices().0)?;
            backlog.drain(..written);
            if backlog.is_empty() {
                return Ok(());
            }
        }
    }
}

impl State {
    fn shut_down(&mut self) {
        let _ = self.transport.socket().shutdown(Shutdown::Both); // fails only if it is shut down already
        self.backlog.clear();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    /// A writer, and the peer that it writes to.
    pub(crate) fn writer() -> (Arc<FrameWriter>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        (Arc::new(FrameWriter::new(Transport::Plain(socket))), listener.accept().unwrap().0)
    }

    fn has_backlog(writer: &FrameWriter) -> bool {
        !lock(&writer.state).backlog.is_empty()
    }

    #[test]
    fn what_the_socket_does_not_take_is_written_later_and_in_order() {
        let (writer, mut peer) = writer();
        let sent: Vec<u8> = (0..=255).cycle().take(64 << 20).collect(); // more than a socket buffers
        for piece in sent.chunks(1 << 20) {
            writer.write(piece).unwrap();
        }
        assert!(has_backlog(&writer), "the socket took everything at once");
        drop(writer);
        peer.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut received = Vec::new();
        peer.read_to_end(&mut received).unwrap();
        assert!(received == sent);
    }

    #[test]
    fn a_backlog_is_dropped_with_its_connection() {
        let (writer, peer) = writer();
        writer.write(&vec![0; 64 << 20]).unwrap();
        drop(peer);
        let start = Instant::now();
        while Arc::strong_count(&writer) > 1 {
            assert!(start.elapsed() < Duration::from_secs(60), "the thread does not end");
            thread::yield_now();
        }
        assert!(!has_backlog(&writer));
    }
}
