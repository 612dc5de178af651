//! Wakes a thread that waits in poll(2).

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::{read, write};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Instant;

/// A **waker** ends the wait of the one thread that waits on it. While that thread does not wait, a
/// wake is a swap of a boolean.
#[derive(Clone, Debug)]
pub struct Waker(Arc<EventFd>);

#[derive(Debug)]
struct EventFd {
    event: OwnedFd,
    is_waiting: AtomicBool,
}

impl Waker {
    /// A waker that no thread waits on yet.
    ///
    /// # Errors
    /// If the system refuses a file descriptor.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Waker(Arc::new(EventFd {
            event,
            is_waiting: AtomicBool::new(false),
        })))
    }

    /// Wakes the thread that waits. Before calling this, store the news where `is_ready` of that
    /// thread reads them: a thread that is about to sleep checks `is_ready` once more, and a thread
    /// that is awake gets no signal.
    pub fn wake(&self) {
        if self.0.is_waiting.swap(false, Ordering::SeqCst) {
            let _ = write(&self.0.event, &1u64.to_ne_bytes()); // fails if it is readable already
        }
    }

    /// Waits until it is woken, or until this instant. Returns at once if something `is_ready`.
    pub fn wait(&self, until: Option<Instant>, is_ready: &dyn Fn() -> bool) {
        self.poll(&mut [], until, is_ready);
    }

    /// As [`wait`](Self::wait), and ends when one of `files` is ready as well. A signal may end it,
    /// too.
    pub(crate) fn poll<'a, const COUNT: usize>(
        &'a self,
        files: &mut [PollFd<'a>; COUNT],
        until: Option<Instant>,
        is_ready: &dyn Fn() -> bool,
    ) {
        const MAX_FILES: usize = 3;
        self.0.is_waiting.store(true, Ordering::SeqCst);
        let until = if is_ready() {
            Some(Instant::now())
        } else {
            until
        };
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut all: [PollFd; MAX_FILES] = std::array::from_fn(|index| match files.get(index) {
            Some(file) => file.clone(),
            None => PollFd::new(&self.0.event, PollFlags::IN),
        });
        // Fails if a signal interrupts it: then nothing is ready.
        let _ = poll(&mut all[..=COUNT], timeout.as_ref());
        self.0.is_waiting.store(false, Ordering::SeqCst);
        if !all[COUNT].revents().is_empty() {
            let _ = read(&self.0.event, &mut [0; 8]); // cannot fail: it is readable
        }
        files.clone_from_slice(&all[..COUNT]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_wait_ends_when_it_is_woken_from_another_thread() {
        let waker = Waker::new().unwrap();
        let is_ready = Arc::new(AtomicBool::new(false));
        let other = waker.clone();
        let stored = is_ready.clone();
        let thread = thread::spawn(move || {
            stored.store(true, Ordering::SeqCst);
            other.wake();
        });
        while !is_ready.load(Ordering::SeqCst) {
            waker.wait(None, &|| is_ready.load(Ordering::SeqCst));
        }
        thread.join().unwrap();
    }

    #[test]
    fn a_wait_ends_at_its_time_or_at_once_if_something_is_ready() {
        let waker = Waker::new().unwrap();
        waker.wake(); // nobody waits
        let until = Instant::now() + Duration::from_millis(20);
        waker.wait(Some(until), &|| false);
        assert!(Instant::now() >= until);
        waker.wait(None, &|| true);
    }
}
