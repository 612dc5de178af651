//! Deadlines, and a watchdog that makes blocking calls keep them.

use crate::sync::lock;
use crate::text::format_duration;
use crossbeam_channel::{bounded, Receiver, RecvTimeoutError, Sender};
use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
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

    /// The deadline of the next of `parts` attempts: an equal share of the time that is left, but at most `max`.
    #[must_use]
    pub fn split(&self, parts: usize, max: Duration) -> Self {
        let parts = u32::try_from(parts).unwrap_or(u32::MAX).max(1);
        Deadline::after((self.remaining() / parts).min(max))
    }

    /// The limit that it was made from, for messages.
    pub fn limit(&self) -> String {
        let millis = self.limit.as_millis().try_into().unwrap_or(u64::MAX); // a share of a limit is no round number
        format_duration(Duration::from_millis(millis)).to_string()
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

/// A **watchdog** shuts a socket down when a deadline passes: every call that blocks on the socket then returns
/// within milliseconds.
///
/// amiquip's blocking calls have no timeout of their own. It is one thread for each connection, not one for each of them,
/// because starting a thread costs 0.1 ms.
#[derive(Clone)]
pub struct Watchdog {
    watched: Arc<Watched>,
    /// Wakes the thread; when the last clone is dropped, the thread ends.
    wake: Sender<()>,
}

struct Watched {
    socket: TcpStream,
    has_shut_down: AtomicBool,
    calls: Mutex<Calls>,
}

struct Calls {
    /// The deadlines of the calls that are running, by call number.
    deadlines: HashMap<u64, Instant>,
    begun: u64,
    /// When the thread wakes up by itself.
    wakes_at: Instant,
}

impl Watchdog {
    /// Starts the thread that watches this socket. It ends when the last clone of the watchdog is dropped.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        let (wake, woken) = bounded(1);
        let calls = Calls { deadlines: HashMap::new(), begun: 0, wakes_at: Instant::now() + MAX_DEADLINE };
        let watched = Arc::new(Watched { socket, has_shut_down: AtomicBool::new(false), calls: Mutex::new(calls) });
        let thread = watched.clone();
        thread::Builder::new().name("watchdog".into()).spawn(move || thread.watch(&woken))?;
        Ok(Watchdog { watched, wake })
    }

    /// Runs a call that blocks on the socket, and shuts the socket down if the call is still running at the deadline. Then the
    /// watchdog thread has removed the call's deadline, and the result is `None`, whatever the call returned.
    pub fn run_until<T>(&self, deadline: &Deadline, call: impl FnOnce() -> T) -> Option<T> {
        let number = self.add(deadline.instant);
        let result = call();
        lock(&self.watched.calls).deadlines.remove(&number).map(|_| result)
    }

    fn add(&self, deadline: Instant) -> u64 {
        let mut calls = lock(&self.watched.calls);
        calls.begun += 1;
        let number = calls.begun;
        calls.deadlines.insert(number, deadline);
        if deadline < calls.wakes_at {
            let _ = self.wake.try_send(()); // fails if the thread is about to wake up
        }
        number
    }

    /// Gives the calls that are running no longer than this deadline.
    pub fn limit_running(&self, deadline: &Deadline) {
        let mut calls = lock(&self.watched.calls);
        calls.deadlines.values_mut().for_each(|running| *running = deadline.instant.min(*running));
        let _ = self.wake.try_send(()); // fails if the thread is about to wake up
    }

    /// Shuts the socket down now.
    pub fn shut_down(&self) {
        self.watched.shut_down();
    }

    /// Whether the socket was shut down here, and not by the peer.
    pub fn has_shut_down(&self) -> bool {
        self.watched.has_shut_down.load(Ordering::Relaxed)
    }
}

impl Watched {
    fn shut_down(&self) {
        self.has_shut_down.store(true, Ordering::Relaxed);
        let _ = self.socket.shutdown(Shutdown::Both); // fails only if it is shut down already
    }

    /// Shuts the socket down each time that the deadline of a running call passes.
    fn watch(&self, woken: &Receiver<()>) {
        let mut wakes_at = Instant::now() + MAX_DEADLINE;
        while woken.recv_deadline(wakes_at) != Err(RecvTimeoutError::Disconnected) {
            let mut calls = lock(&self.calls);
            let now = Instant::now();
            if calls.deadlines.extract_if(|_, deadline| *deadline <= now).count() > 0 {
                self.shut_down();
            }
            wakes_at = calls.deadlines.values().copied().min().unwrap_or(now + MAX_DEADLINE);
            calls.wakes_at = wakes_at;
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
    fn the_deadline_of_a_running_call_can_be_made_earlier() {
        let (stream, _peer) = connect();
        let watchdog = Watchdog::new(stream.try_clone().unwrap()).unwrap();
        let (started, is_running) = bounded(1);
        let block = || {
            started.send(()).unwrap();
            (&stream).read(&mut [0]).is_ok()
        };
        let result = thread::scope(|scope| {
            let blocked = scope.spawn(|| watchdog.run_until(&Deadline::after(MAX_DEADLINE), block));
            is_running.recv().unwrap();
            watchdog.limit_running(&Deadline::after(Duration::from_millis(20)));
            blocked.join().unwrap()
        });
        assert_eq!(result, None);
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
