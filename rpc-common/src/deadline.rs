//! Deadlines that hold, even around blocking calls that know none.

use crate::duration;
use crossbeam_channel::{bounded, never, select, Receiver};
use std::fmt::{self, Display};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// As good as never, and an instant on every system.
const FAR_AWAY: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// A **deadline** is the instant by which something has to have ended, and the limit it came from.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// The deadline `limit` from now.
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        let now = Instant::now();
        Deadline { at: now.checked_add(limit).unwrap_or(now + FAR_AWAY), limit }
    }

    /// The deadline of the first of `parts` things, which share alike what is left of this one, but get
    /// `most` at the most.
    #[must_use]
    pub fn share(&self, parts: usize, most: Duration) -> Self {
        let parts = u32::try_from(parts).unwrap_or(u32::MAX).max(1);
        Deadline::after((self.remaining() / parts).min(most))
    }

    /// When it passes.
    #[must_use]
    pub fn instant(&self) -> Instant {
        self.at
    }

    /// What is left of it; zero when it has passed.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Runs a call that blocks on `socket`; a watchdog shuts the socket down when the deadline
    /// passes, and whatever blocks on it returns within milliseconds.
    ///
    /// amiquip's calls know no deadline, not even to time out in the end. This is why ours holds.
    ///
    /// # Errors
    /// [`Expired`] when the socket was shut down, whatever the call returned.
    pub fn guard<T>(&self, socket: &TcpStream, call: impl FnOnce() -> T) -> Result<T, Expired> {
        self.guard_listening(socket, &never(), |()| {}, call)
    }

    /// The same, and passes on what comes meanwhile and may explain why the call takes so long.
    ///
    /// # Errors
    /// As [`Deadline::guard`].
    pub fn guard_listening<T, Notice: Send>(
        &self,
        socket: &TcpStream,
        notices: &Receiver<Notice>,
        mut on_notice: impl FnMut(Notice) + Send,
        call: impl FnOnce() -> T,
    ) -> Result<T, Expired> {
        let (disarm, disarmed) = bounded::<()>(0);
        thread::scope(|scope| {
            let watchdog = scope.spawn(move || {
                let (mut open, closed) = (notices, never());
                loop {
                    select! {
                        recv(disarmed) -> _ => return false,
                        recv(open) -> notice => match notice {
                            Ok(notice) => on_notice(notice),
                            Err(_) => open = &closed,
                        },
                        default(self.remaining()) => {
                            let _ = socket.shutdown(Shutdown::Both); // fails only when it is down already
                            return true;
                        }
                    }
                }
            });
            let result = call();
            drop(disarm);
            match watchdog.join() {
                Ok(false) => Ok(result),
                _ => Err(Expired),
            }
        })
    }
}

/// Does something that may take long in a thread of its own, to be waited for together with other
/// things, or not at all.
pub fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, result) = bounded(1);
    thread::spawn(move || sender.send(work())); // that nobody waits any more is no error
    result
}

/// The deadline passed, and the socket was shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired;

/// A **phase** is the part of a call that a deadline ran out in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Looking up the addresses of the broker's host.
    Resolve,
    /// Opening the TCP connection.
    Connect,
    /// The TLS handshake.
    Tls,
    /// The AMQP handshake, from the protocol header to the broker's first word.
    Handshake,
    /// The rest of the handshake, to connection.open-ok. RabbitMQ takes its time to refuse a password.
    Login,
    /// Opening a channel.
    Channel,
    /// Declaring a queue.
    Declare,
    /// Starting a consumer.
    Consume,
    /// Looking at a queue, to see whether it is there and who consumes it.
    Look,
}

impl Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Resolve => "resolving the host name",
            Phase::Connect => "opening the TCP connection",
            Phase::Tls => "the TLS handshake",
            Phase::Handshake => "the AMQP handshake",
            Phase::Login => "the login",
            Phase::Channel => "opening a channel",
            Phase::Declare => "declaring a queue",
            Phase::Consume => "starting a consumer",
            Phase::Look => "looking at a queue",
        })
    }
}

/// The limit, for messages.
impl Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        duration::display(self.limit).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    /// A peer that accepts and says nothing.
    fn silent_peer() -> (TcpListener, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener, stream)
    }

    #[test]
    fn a_blocked_read_returns_when_the_deadline_passes() {
        let (_peer, mut stream) = silent_peer();
        let socket = stream.try_clone().unwrap();
        let deadline = Deadline::after(Duration::from_millis(20));
        let result = deadline.guard(&socket, || stream.read(&mut [0]));
        assert!(matches!(result, Err(Expired)));
        assert!(deadline.remaining().is_zero());
    }

    #[test]
    fn a_call_that_ends_in_time_keeps_its_result_and_its_socket() {
        let (peer, stream) = silent_peer();
        let result = Deadline::after(Duration::from_secs(60)).guard(&stream, || 42);
        assert_eq!(result, Ok(42));
        assert!(peer.accept().is_ok());
        assert!(stream.peer_addr().is_ok());
    }
}
