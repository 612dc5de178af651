//! The standard streams. Where another program has set their file to non-blocking, reads and writes
//! wait all the same: the flag belongs to the file, which a terminal and its programs share.

use rustix::event::{poll, PollFd, PollFlags};
use rustix::fs::{fcntl_getfl, OFlags};
use rustix::io::Errno;
use std::fmt;
use std::io::{self, Read, Stderr, Stdin, Stdout, Write};
use std::os::fd::AsFd;

/// A standard stream that waits.
pub struct Waiting<Stream>(Stream);

/// Standard input.
pub fn stdin() -> Waiting<Stdin> {
    Waiting(io::stdin())
}

/// Standard output.
pub fn stdout() -> Waiting<Stdout> {
    Waiting(io::stdout())
}

/// Standard error.
pub fn stderr() -> Waiting<Stderr> {
    Waiting(io::stderr())
}

/// Checks that standard output can be written: the standard library ignores it if it cannot, as in
/// `1</dev/null`.
///
/// # Errors
/// It is open for reading only.
pub fn check_stdout() -> io::Result<()> {
    let mode = fcntl_getfl(io::stdout())? & OFlags::ACCMODE;
    if mode == OFlags::RDONLY {
        return Err(Errno::BADF.into());
    }
    Ok(())
}

impl<Stream: AsFd> Waiting<Stream> {
    /// Calls `io` until it need not wait.
    fn wait_for<T>(
        &mut self,
        flags: PollFlags,
        mut io: impl FnMut(&mut Stream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match io(&mut self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let _ = poll(&mut [PollFd::new(&self.0, flags)], None); // a signal may interrupt it
                }
                result => return result,
            }
        }
    }
}

impl<Stream: AsFd + Read> Read for Waiting<Stream> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::IN, |stream| stream.read(buffer))
    }
}

impl<Stream: AsFd + Write> Write for Waiting<Stream> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::OUT, |stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wait_for(PollFlags::OUT, Write::flush)
    }

    /// Writes the text at once, so that other threads do not write between its parts.
    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        self.write_all(text.to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_setfl;
    use std::thread;

    #[test]
    fn a_pipe_that_does_not_block_is_waited_for() {
        let (reader, writer) = io::pipe().unwrap();
        fcntl_setfl(&reader, OFlags::NONBLOCK).unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let bytes = vec![b'x'; 1 << 20]; // more than the pipe takes
        thread::scope(|scope| {
            scope.spawn(|| Waiting(writer).write_all(&bytes).unwrap());
            let mut read = Vec::new();
            Waiting(reader).read_to_end(&mut read).unwrap();
            assert!(read == bytes);
        });
    }
}
