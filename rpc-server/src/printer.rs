//! Prints lines on a thread of its own: a reader of standard output that stops reading does not stop the server.

use crossbeam_channel::{bounded, Receiver, Sender};
use std::io::{self, BufWriter, Write};
use std::thread;
use std::time::Duration;

/// How many lines may wait for the reader. Further ones are dropped.
const MAX_WAITING: usize = 10_000;

/// How long the end of the program waits for the reader.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) struct Printer {
    lines: Sender<String>,
    /// Disconnected when the thread has ended.
    printed: Receiver<()>,
}

impl Printer {
    /// # Panics
    /// When the system refuses a thread.
    pub(crate) fn start() -> Self {
        let (lines, waiting) = bounded(MAX_WAITING);
        let (sender, printed) = bounded(0);
        let print = move || {
            if let Err(error) = write_lines(&waiting) {
                log::debug!("cannot write to standard output: {error}");
            }
            drop(sender);
        };
        thread::Builder::new().name("printer".into()).spawn(print).expect("the system provides a thread");
        Printer { lines, printed }
    }

    /// Prints a line, or drops it.
    pub(crate) fn print(&self, line: String) {
        let _ = self.lines.try_send(line); // fails if the reader stopped, or went away
    }

    /// Waits until the lines are printed, but not long for a reader that has stopped.
    pub(crate) fn finish(self) {
        drop(self.lines);
        let _ = self.printed.recv_timeout(FINISH_TIMEOUT); // disconnected, or timed out
    }
}

/// Writes lines until their sender is dropped. Flushes when no further line waits.
fn write_lines(lines: &Receiver<String>) -> io::Result<()> {
    let mut stdout = BufWriter::new(io::stdout());
    for line in lines {
        writeln!(stdout, "{line}")?;
        if lines.is_empty() {
            stdout.flush()?;
        }
    }
    Ok(())
}
