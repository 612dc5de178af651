//! Deadlines.

use super::error::ErrorKind;
use super::phase::Phase;
use crossbeam_channel::{bounded, Receiver};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use std::io;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

/// Deadline of a limit that is too long for an [`Instant`].
const MAX_DEADLINE: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// A **deadline** is the instant by which something must have ended, and the limit that it was made
/// from.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    instant: Instant,
    limit: Duration,
}

impl Deadline {
    /// The deadline `limit` from now.
    pub fn after(limit: Duration) -> Self {
        Deadline::at(Instant::now(), limit)
    }

    /// The deadline `limit` after `now`.
    pub fn at(now: Instant, limit: Duration) -> Self {
        Deadline {
            instant: now.checked_add(limit).unwrap_or(now + MAX_DEADLINE),
            limit,
        }
    }

    /// The deadline of the next of `parts` attempts: an equal share of the time that is left, but
    /// at most `max`.
    #[must_use]
    pub fn split(&self, parts: usize, max: Duration) -> Self {
        let parts = u32::try_from(parts).unwrap_or(u32::MAX).max(1);
        Deadline::after((self.remaining() / parts).min(max))
    }

    /// The limit that it was made from, in whole milliseconds: a share of a limit has more digits.
    pub fn limit(&self) -> Duration {
        Duration::from_millis(self.limit.as_millis().try_into().unwrap_or(u64::MAX))
    }

    /// The error that this deadline has passed in this phase.
    pub(crate) fn timed_out(&self, phase: Phase) -> ErrorKind {
        ErrorKind::TimedOut {
            limit: self.limit(),
            phase,
        }
    }

    /// The instant at which the deadline passes.
    pub fn instant(&self) -> Instant {
        self.instant
    }

    /// Waits until the file or socket is ready. Fails with `TimedOut` when the deadline passes.
    pub(crate) fn wait_for(&self, file: impl AsFd, events: PollFlags) -> io::Result<()> {
        let mut files = [PollFd::new(&file, events)];
        loop {
            let timeout = self.remaining();
            if timeout.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match poll(&mut files, Timespec::try_from(timeout).ok().as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The time that is left; zero when the deadline has passed.
    pub fn remaining(&self) -> Duration {
        self.remaining_at(Instant::now())
    }

    /// The time that is left at this instant; zero when the deadline has passed.
    pub fn remaining_at(&self, now: Instant) -> Duration {
        self.instant.saturating_duration_since(now)
    }
}

/// Runs `work` on a thread of its own. The receiver gets the result; it may be dropped before that.
///
/// # Errors
/// [`ErrorKind::NoThread`].
pub fn run_in_background<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Receiver<T>, ErrorKind> {
    let (sender, result) = bounded(1);
    let work = move || sender.send(work()); // fails if nobody waits for the result any more
    let started = thread::Builder::new().spawn(work);
    started.map_err(|error| ErrorKind::no_thread(&error))?;
    Ok(result)
}
