//! Whether the server gives up the requests in hand. A pipe, so that a run of a program can wait
//! for it in poll(2).

use rpc_common::sync::lock;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::pipe::{pipe_with, PipeFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The pipe whose write end is closed when the requests in hand are given up.
pub(crate) struct Cancel {
    reader: OwnedFd,
    /// `None` once the requests are given up.
    writer: Mutex<Option<OwnedFd>>,
}

impl Cancel {
    pub(crate) fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Cancel {
            reader,
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Gives up the requests in hand.
    pub(crate) fn cancel(&self) {
        *lock(&self.writer) = None;
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        lock(&self.writer).is_none()
    }

    /// The read end: at its end once the requests are given up.
    pub(crate) fn reader(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    /// Waits until the requests are given up, but for this duration at most.
    pub(crate) fn wait(&self, duration: Duration) {
        let until = Instant::now().checked_add(duration);
        while !self.is_cancelled() {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return;
            }
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut files = [PollFd::new(&self.reader, PollFlags::IN)];
            let _ = poll(&mut files, timeout.as_ref()); // a signal may interrupt it
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_wait_ends_after_its_duration_or_when_the_requests_are_given_up() {
        let cancel = Cancel::new().unwrap();
        cancel.wait(Duration::from_millis(1));
        assert!(!cancel.is_cancelled());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| cancel.wait(Duration::MAX));
            cancel.cancel();
            waiting.join().unwrap();
        });
        assert!(cancel.is_cancelled());
    }
}
