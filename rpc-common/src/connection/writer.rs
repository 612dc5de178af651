//! The one way to write to the socket of a connection: whole frames, from any thread, one caller at
//! a time.

use super::socket::Transport;
use crate::sync::lock;
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

/// A **socket writer** never waits for the peer: what the socket does not take is its **backlog**.
pub(crate) struct SocketWriter {
    state: Mutex<State>,
    has_backlog: AtomicBool,
}

struct State {
    transport: Transport,
    /// The bytes that the socket has not taken yet.
    backlog: VecDeque<u8>,
    /// Whether something was written since the latest [`SocketWriter::take_has_written`].
    has_written: bool,
    /// The error of the write that failed.
    error: Option<io::Error>,
}

impl SocketWriter {
    /// Takes a non-blocking transport.
    pub(crate) fn new(transport: Transport) -> Self {
        let state = Mutex::new(State {
            transport,
            backlog: VecDeque::new(),
            has_written: false,
            error: None,
        });
        SocketWriter {
            state,
            has_backlog: AtomicBool::new(false),
        }
    }

    /// Reads from the transport. With TLS reading and writing share their state.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        lock(&self.state).transport.read(buffer)
    }

    /// Whether the next read returns bytes that poll(2) does not know of.
    pub(crate) fn has_plaintext(&self) -> bool {
        lock(&self.state).transport.has_plaintext()
    }

    /// Whether the socket does not take everything at once.
    pub(crate) fn has_backlog(&self) -> bool {
        self.has_backlog.load(Ordering::SeqCst)
    }

    /// Number of bytes that the socket has not taken yet.
    pub(crate) fn backlog_len(&self) -> usize {
        lock(&self.state).backlog.len()
    }

    /// Takes all of these frames, and writes what the socket takes now. Returns whether a backlog
    /// has begun.
    ///
    /// # Errors
    /// When the connection has ended. The socket is shut down for writing; what the peer has sent
    /// can still be read.
    pub(crate) fn write(&self, frames: &[u8]) -> io::Result<bool> {
        let mut state = lock(&self.state);
        let had_backlog = !state.backlog.is_empty();
        let written = if had_backlog {
            0
        } else {
            state.write_available(frames)?
        };
        if written < frames.len() {
            state.backlog.extend(&frames[written..]);
            self.has_backlog.store(true, Ordering::SeqCst);
        }
        Ok(!had_backlog && written < frames.len())
    }

    /// Writes what the socket takes now of the backlog. If writing fails the backlog is dropped;
    /// reading tells how the connection ended.
    pub(crate) fn write_backlog(&self) {
        let mut state = lock(&self.state);
        let mut backlog = std::mem::take(&mut state.backlog);
        let written = state
            .write_available(backlog.make_contiguous())
            .unwrap_or(backlog.len());
        backlog.drain(..written);
        if backlog.is_empty() {
            self.has_backlog.store(false, Ordering::SeqCst); // and its memory is freed
        } else {
            state.backlog = backlog;
        }
    }

    /// Whether something was written since this was asked last.
    pub(crate) fn take_has_written(&self) -> bool {
        std::mem::take(&mut lock(&self.state).has_written)
    }

    /// The error of the write that failed, if one has.
    pub(crate) fn take_error(&self) -> Option<io::Error> {
        lock(&self.state).error.take()
    }

    /// Ends the connection.
    pub(crate) fn shut_down(&self) {
        let mut state = lock(&self.state);
        // Fails only if it is shut down already.
        let _ = state.transport.socket().shutdown(Shutdown::Both);
        state.backlog = VecDeque::new();
        self.has_backlog.store(false, Ordering::SeqCst);
    }
}

impl State {
    fn write_available(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.has_written = true;
        self.transport.write_available(bytes).inspect_err(|error| {
            // poll(2) then reports its end.
            let _ = self.transport.socket().shutdown(Shutdown::Write);
            let copy = io::Error::new(error.kind(), error.to_string());
            self.error.get_or_insert(copy);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::thread;
    use std::time::{Duration, Instant};

    fn writer() -> (SocketWriter, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        (
            SocketWriter::new(Transport::Plain(socket)),
            listener.accept().unwrap().0,
        )
    }

    #[test]
    fn what_the_socket_does_not_take_is_written_later_and_in_order() {
        let (writer, mut peer) = writer();
        // More than a socket buffers.
        let sent: Vec<u8> = (0..=255).cycle().take(64 << 20).collect();
        for piece in sent.chunks(1 << 20) {
            writer.write(piece).unwrap();
        }
        assert!(writer.has_backlog(), "the socket took everything at once");
        let reading = thread::spawn(move || {
            let mut received = Vec::new();
            peer.read_to_end(&mut received).unwrap();
            received
        });
        let start = Instant::now();
        while writer.has_backlog() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the socket takes no more"
            );
            writer.write_backlog();
            thread::yield_now();
        }
        writer.shut_down();
        assert!(reading.join().unwrap() == sent);
    }

    #[test]
    fn after_the_peer_has_gone_a_write_fails_and_says_why() {
        let (writer, peer) = writer();
        drop(peer);
        let start = Instant::now();
        while writer.write(&[0; 1000]).is_ok() {
            assert!(start.elapsed() < Duration::from_secs(60), "writes go on");
        }
        assert!(writer.take_error().is_some());
    }
}
