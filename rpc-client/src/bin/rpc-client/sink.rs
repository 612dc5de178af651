//! The file of standard output, and whether it takes output without blocking.

use rustix::fs::{fstat, FileType};
use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_getpipe_size;
use std::io::{self, IsTerminal};

/// The kind of standard output, as far as it says whether writing blocks.
pub(crate) enum Sink {
    /// A file, or /dev/null.
    File,
    /// A pipe of this many bytes, which other programs may write to, too.
    Pipe(usize),
    /// A terminal, or anything else that may stop at any time.
    Other,
}

impl Sink {
    pub(crate) fn of_stdout() -> Self {
        let stdout = io::stdout();
        let Ok(status) = fstat(&stdout) else {
            return Sink::Other;
        };
        match FileType::from_raw_mode(status.st_mode) {
            FileType::RegularFile => Sink::File,
            FileType::CharacterDevice if !stdout.is_terminal() => Sink::File,
            FileType::Fifo => fcntl_getpipe_size(&stdout).map_or(Sink::Other, Sink::Pipe),
            _ => Sink::Other,
        }
    }

    /// Whether it takes `len` bytes without blocking. Half of a pipe is left to those who write at
    /// the same time.
    pub(crate) fn takes_output(&self, len: usize) -> bool {
        match self {
            Sink::File => true,
            Sink::Pipe(size) => {
                let takes = |unread| unread + len as u64 <= *size as u64;
                ioctl_fionread(io::stdout())
                    .is_ok_and(|unread| takes(unread) && unread <= *size as u64 / 2)
            }
            Sink::Other => false,
        }
    }
}
