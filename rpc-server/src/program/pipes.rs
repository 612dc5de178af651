//! Reads from and writes to the pipes of a program, without waiting, and waits for them.

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use std::io::{self, ErrorKind, Read};
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// Maximum number of bytes that are read at a time.
pub(crate) const READ_SIZE: usize = 16 << 10;

/// Waits until one of the files is ready, but no longer than `until`. Says which are ready.
pub(crate) fn wait_ready<const N: usize>(
    files: [Option<(BorrowedFd, PollFlags)>; N],
    until: Instant,
) -> [bool; N] {
    let Some((any, _)) = files.iter().flatten().next() else {
        return [false; N]; // the callers have a file while they wait
    };
    // Without flags, the system reports of `any` what it reports where `any` is polled.
    let mut polled = files.map(|file| {
        let (fd, flags) = file.unwrap_or((*any, PollFlags::empty()));
        PollFd::from_borrowed_fd(fd, flags)
    });
    let timeout = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
    if poll(&mut polled, timeout.as_ref()).is_err() {
        return [false; N]; // interrupted by a signal
    }
    let mut ready = [false; N];
    for (index, polled) in polled.iter().enumerate() {
        ready[index] = files[index].is_some() && !polled.revents().is_empty();
    }
    ready
}

/// Reads once from a pipe. Closes it at its end.
pub(crate) fn read(pipe: &mut Option<impl Read>, on_bytes: impl FnOnce(&[u8])) {
    let mut buffer = [0; READ_SIZE];
    match pipe.as_mut().map(|pipe| pipe.read(&mut buffer)) {
        Some(Ok(len @ 1..)) => on_bytes(&buffer[..len]),
        Some(Err(error)) if is_not_ready(&error) => {}
        _ => *pipe = None,
    }
}

pub(crate) fn is_not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
