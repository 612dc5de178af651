//! Deadlines, and a watchdog that makes blocking calls keep them.

use crate::text::format_duration;
use crossbeam_channel::{bounded, Receiver};
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

/// The deadline of a limit that is too long for an [`Instant`].
const MAX_DEADLINE: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// A **deadline** is the instant by which something must have ended, and the limit that it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    instant: Instant,
    limit: Duration,
}

impl Deadline {
    /// The deadline `limit` from now.
    pub fn after(limit: Duration) -> Self {
        let now = Instant::now();
        Deadline { instant: now.checked_add(limit).unwrap_or(now + MAX_DEADLINE), limit }
    }

    /// The deadline of the first of `parts` steps that divide the remaining time equally; each gets at most `max`.
    #[must_use]
    pub fn split(&self, parts: usize, max: Duration) -> Self {
        let parts = u32::try_from(parts).unwrap_or(u32::MAX).max(1);
        Deadline::after((self.remaining() / parts).min(max))
    }

    /// When it passes.
    pub fn instant(&self) -> Instant {
        self.instant
    }

    /// The time that is left; zero when the deadline has passed.
    pub fn remaining(&self) -> Duration {
        self.instant.saturating_duration_since(Instant::now())
    }
}

/// The limit, for messages.
impl Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        format_duration(self.limit).fmt(f)
    }
}

/// A **watchdog** shuts a socket down when a deadline passes: every call that blocks on the socket then returns
/// within milliseconds.
///
/// amiquip's calls have no timeout of their own. It is one thread for each connection, not one for each call, because
/// starting a thread costs a cold call 0.1 ms.
pub struct Watchdog(Arc<Shared>);

struct Shared {
    socket: TcpStream,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The deadlines of the calls that are running, by call number.
    deadlines: BTreeMap<u64, Instant>,
    calls: u64,
    /// When the thread wakes up by itself; `None`: only when it is notified.
    wakes_at: Option<Instant>,
    is_dropped: bool,
}

impl Watchdog {
    /// Starts the thread that watches this socket. It ends when the watchdog is dropped.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        let shared = Shared { socket, state: Mutex::default(), changed: Condvar::new() };
        let shared = Arc::new(shared);
        let watched = shared.clone();
        thread::Builder::new().name("watchdog".into()).spawn(move || watched.run())?;
        Ok(Watchdog(shared))
    }

    /// Runs a call that blocks on the socket, and shuts the socket down if the call is still running at the deadline;
    /// then the result is `None`, whatever the call returned.
    pub fn run_until<T>(&self, deadline: &Deadline, call: impl FnOnce() -> T) -> Option<T> {
        let number = self.0.add(deadline.instant);
        let result = call();
        self.0.lock().deadlines.remove(&number).map(|_| result)
    }

    /// Shuts the socket down now.
    pub fn shut_down(&self) {
        self.0.shut_down();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.lock().is_dropped = true;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shut_down(&self) {
        let _ = self.socket.shutdown(Shutdown::Both); // fails only if it is shut down already
    }

    fn add(&self, deadline: Instant) -> u64 {
        let mut state = self.lock();
        state.calls += 1;
        let number = state.calls;
        state.deadlines.insert(number, deadline);
        if state.wakes_at.is_none_or(|wakes_at| deadline < wakes_at) {
            self.changed.notify_one();
        }
        number
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.is_dropped {
            let now = Instant::now();
            let running = state.deadlines.len();
            state.deadlines.retain(|_, deadline| *deadline > now);
            if state.deadlines.len() < running {
                self.shut_down();
            }
            state.wakes_at = state.deadlines.values().min().copied();
            state = match state.wakes_at {
                Some(wakes_at) => {
                    let woken = self.changed.wait_timeout(state, wakes_at - now);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Runs `work` on a thread of its own. The receiver gets the result; it may be dropped before that.
pub fn run_in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, result) = bounded(1);
    thread::spawn(move || sender.send(work())); // fails if nobody waits for the result any more
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    /// A connection, and the end of the peer that accepts it and sends nothing.
    fn connect() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (stream, listener.accept().unwrap().0)
    }

    /// Whether the peer can still send to this end.
    fn is_open(stream: &mut TcpStream, peer: &mut TcpStream) -> bool {
        let _ = io::Write::write_all(peer, b"x");
        stream.read(&mut [0]).is_ok_and(|count| count == 1)
    }

    #[test]
    fn a_blocked_read_returns_when_the_deadline_passes() {
        let (mut stream, mut peer) = connect();
        let watchdog = Watchdog::new(stream.try_clone().unwrap()).unwrap();
        let deadline = Deadline::after(Duration::from_millis(20));
        let result = watchdog.run_until(&deadline, || stream.read(&mut [0]));
        assert!(result.is_none());
        assert!(deadline.remaining().is_zero());
        assert!(!is_open(&mut stream, &mut peer));
    }

    #[test]
    fn a_call_that_ends_in_time_keeps_its_result_and_its_socket() {
        let (mut stream, mut peer) = connect();
        let watchdog = Watchdog::new(stream.try_clone().unwrap()).unwrap();
        let result = watchdog.run_until(&Deadline::after(Duration::from_secs(60)), || 42);
        assert_eq!(result, Some(42));
        assert!(is_open(&mut stream, &mut peer));
    }

    #[test]
    fn of_several_running_calls_the_one_whose_deadline_passes_is_ended() {
        let (stream, _peer) = connect();
        let watchdog = Watchdog::new(stream.try_clone().unwrap()).unwrap();
        let [soon, late] = [20, 60_000].map(|millis| Deadline::after(Duration::from_millis(millis)));
        assert_eq!(watchdog.run_until(&late, || ()), Some(()));
        let block = || (&stream).read(&mut [0]).is_ok();
        let results = thread::scope(|scope| {
            let blocked = [&late, &soon].map(|at| scope.spawn(|| watchdog.run_until(at, block)));
            blocked.map(|thread| thread.join().unwrap())
        });
        assert_eq!(results, [Some(true), None]);
    }
}
