//! Deadlines that hold, even around blocking calls that know none.

use crate::duration;
use crossbeam_channel::{bounded, never, select, Receiver};
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

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
}

/// A **watchdog** ends what blocks on a socket when a deadline passes: it shuts the socket down, and
/// whatever blocks on it returns within milliseconds.
///
/// amiquip's calls know no deadline, not even to time out in the end. This is why ours hold.
pub struct Watchdog(Arc<Watch>);

struct Watch {
    socket: TcpStream,
    state: Mutex<Guarded>,
    changed: Condvar,
}

/// What is guarded.
#[derive(Default)]
struct Guarded {
    /// The deadlines that may not pass, by number.
    armed: BTreeMap<u64, Instant>,
    numbers: u64,
    /// When the watchdog looks again, unless it is told to; never, if none.
    looks_at: Option<Instant>,
    over: bool,
}

impl Watchdog {
    /// A watchdog over this socket, for as long as it lives.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        let watch = Watch { socket, state: Mutex::default(), changed: Condvar::new() };
        let watch = Arc::new(watch);
        let watching = watch.clone();
        thread::Builder::new().name("watchdog".into()).spawn(move || watching.run())?;
        Ok(Watchdog(watch))
    }

    /// Runs a call that blocks on the socket, in what is left of the deadline.
    ///
    /// # Errors
    /// [`Expired`] when the socket was shut down, whatever the call returned.
    pub fn guard<T>(&self, deadline: &Deadline, call: impl FnOnce() -> T) -> Result<T, Expired> {
        let number = self.0.arm(deadline.at);
        let result = call();
        match self.0.state().armed.remove(&number) {
            Some(_) => Ok(result),
            None => Err(Expired),
        }
    }

    /// The same, and passes on what comes meanwhile and may explain why the call takes so long.
    ///
    /// # Errors
    /// As [`Watchdog::guard`].
    pub fn guard_listening<T, Notice: Send>(
        &self,
        deadline: &Deadline,
        notices: &Receiver<Notice>,
        on_notice: impl FnMut(Notice) + Send,
        call: impl FnOnce() -> T,
    ) -> Result<T, Expired> {
        let (done, is_done) = bounded::<()>(0);
        thread::scope(|scope| {
            scope.spawn(move || listen(notices, on_notice, &is_done));
            let result = self.guard(deadline, call);
            drop(done);
            result
        })
    }

    /// Shuts the socket down: whatever blocks on it ends.
    pub fn shut_down(&self) {
        self.0.shut_down();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.state().over = true;
        self.0.changed.notify_one();
    }
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, Guarded> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shut_down(&self) {
        let _ = self.socket.shutdown(Shutdown::Both); // fails only when it is down already
    }

    fn arm(&self, at: Instant) -> u64 {
        let mut state = self.state();
        state.numbers += 1;
        let number = state.numbers;
        state.armed.insert(number, at);
        if state.looks_at.is_none_or(|looks_at| at < looks_at) {
            self.changed.notify_one(); // else it looks in time, and one more wake-up is saved
        }
        number
    }

    fn run(&self) {
        let mut state = self.state();
        while !state.over {
            let now = Instant::now();
            let guarded = state.armed.len();
            state.armed.retain(|_, at| *at > now);
            if state.armed.len() < guarded {
                self.shut_down();
            }
            state.looks_at = state.armed.values().min().copied();
            state = match state.looks_at {
                Some(at) => {
                    let waited = self.changed.wait_timeout(state, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

fn listen<T>(notices: &Receiver<T>, mut on_notice: impl FnMut(T), is_done: &Receiver<()>) {
    let (mut open, closed) = (notices, never());
    loop {
        select! {
            recv(is_done) -> _ => return,
            recv(open) -> notice => match notice {
                Ok(notice) => on_notice(notice),
                Err(_) => open = &closed,
            },
        }
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
        let watchdog = Watchdog::new(stream.try_clone().unwrap()).unwrap();
        let deadline = Deadline::after(Duration::from_millis(20));
        let result = watchdog.guard(&deadline, || stream.read(&mut [0]));
        assert!(matches!(result, Err(Expired)));
        assert!(deadline.remaining().is_zero());
    }

    #[test]
    fn a_call_that_ends_in_time_keeps_its_result_and_its_socket() {
        let (peer, stream) = silent_peer();
        let watchdog = Watchdog::new(stream.try_clone().unwrap()).unwrap();
        let result = watchdog.guard(&Deadline::after(Duration::from_secs(60)), || 42);
        assert_eq!(result, Ok(42));
        assert!(peer.accept().is_ok());
        assert!(stream.peer_addr().is_ok());
    }

    /// Of deadlines that are armed in any order and at once, each that passes ends its own call.
    #[test]
    fn the_first_deadline_of_many_holds() {
        let (_peer, stream) = silent_peer();
        let watchdog = Watchdog::new(stream.try_clone().unwrap()).unwrap();
        let [soon, late] =
            [20, 60_000].map(|millis| Deadline::after(Duration::from_millis(millis)));
        assert_eq!(watchdog.guard(&late, || ()), Ok(()));
        let block = || (&stream).read(&mut [0]).is_ok();
        let results = thread::scope(|scope| {
            let blocked = [&late, &soon].map(|at| scope.spawn(|| watchdog.guard(at, block)));
            blocked.map(|thread| thread.join().unwrap())
        });
        assert_eq!(results, [Ok(true), Err(Expired)]);
    }
}
