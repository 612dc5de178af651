//! Writes lines on a thread of its own, so that a reader that has stopped (Ctrl-S, a full pipe)
//! does not stop the program.

use crossbeam_channel::{bounded, Receiver, Sender};
use std::convert::Infallible;
use std::io::{self, BufWriter, Write};
use std::thread;
use std::time::Duration;

/// Maximum time that [`BackgroundWriter::flush`] waits for the reader.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// A **background writer** takes lines from any thread, and never waits for the reader.
#[derive(Clone)]
pub struct BackgroundWriter(Sender<Message>);

enum Message {
    Line(String),
    /// Dropped when all earlier lines are written.
    Flush(Sender<Infallible>),
}

impl BackgroundWriter {
    /// Maximum number of lines that wait for the reader. Further lines are dropped.
    pub const CAPACITY: usize = 10_000;

    /// Starts the thread. It ends when the last clone is dropped, or when the output cannot be
    /// written.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(output: impl Write + Send + 'static) -> io::Result<Self> {
        let (sender, messages) = bounded(Self::CAPACITY);
        let write = move || write_lines(output, &messages);
        thread::Builder::new().name("writer".into()).spawn(write)?;
        Ok(BackgroundWriter(sender))
    }

    /// Writes a line, or drops it.
    pub fn write_line(&self, line: String) {
        // Fails if the reader has stopped, or went away.
        let _ = self.0.try_send(Message::Line(line));
    }

    /// The number of lines that wait for the reader.
    pub fn waiting(&self) -> usize {
        self.0.len()
    }

    /// Waits until the lines are written, but a second at most.
    pub fn flush(&self) {
        let (sender, flushed) = bounded(0);
        if self.0.try_send(Message::Flush(sender)).is_ok() {
            let _ = flushed.recv_timeout(FLUSH_TIMEOUT); // disconnected, or timed out
        }
    }
}

/// For the log, which writes one line at a time.
impl Write for BackgroundWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.write_line(String::from_utf8_lossy(line).trim_end_matches('\n').into());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes lines until their sender is dropped. Flushes when no further line waits.
fn write_lines(output: impl Write, messages: &Receiver<Message>) -> io::Result<()> {
    let mut output = BufWriter::new(output);
    for message in messages {
        match message {
            Message::Line(line) => writeln!(output, "{line}")?,
            Message::Flush(sender) => {
                output.flush()?;
                drop(sender);
            }
        }
        if messages.is_empty() {
            output.flush()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::time::Instant;

    #[test]
    fn lines_are_written_in_order_and_a_flush_waits_for_them() {
        let (mut reader, writer) = io::pipe().unwrap();
        let lines = BackgroundWriter::start(writer).unwrap();
        lines.write_line("one".into());
        lines.clone().write_all(b"two\n").unwrap();
        lines.flush();
        drop(lines);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntwo\n");
    }

    #[test]
    fn a_reader_that_has_stopped_stops_nobody() {
        let (_reader, writer) = io::pipe().unwrap();
        let lines = BackgroundWriter::start(writer).unwrap();
        for _ in 0..2 * BackgroundWriter::CAPACITY {
            lines.write_line("x".repeat(100)); // more than a pipe and the queue take
        }
        let start = Instant::now();
        lines.flush();
        assert!(start.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn an_output_that_cannot_be_written_is_no_error() {
        let lines = BackgroundWriter::start(File::open("/dev/null").unwrap()).unwrap();
        lines.write_line("x".into());
        lines.flush();
        lines.write_line("y".into());
    }
}
