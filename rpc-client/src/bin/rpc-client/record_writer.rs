//! The writer of standard output: it writes whole records, so that a signal that ends the program
//! while the reader is slow does not leave a part of a number, which a script would take for the
//! number.
//!
//! The system writes up to `PIPE_BUF` bytes to a pipe at once or not at all, see pipe(7). Records
//! are written in such pieces. While a longer record is written, SIGINT and SIGTERM wait for its
//! end, a second at most.

use crate::signals::{DefaultAction, Postponement};
use crate::sink::Sink;
use rustix::pipe::PIPE_BUF;
use std::io::{self, Write};

/// Writes records to `output`. Each record is written by [`Write`], and ends with
/// [`RecordWriter::end_record`].
pub(crate) struct RecordWriter<W> {
    output: W,
    /// Whole records, and then the start of the next one; `PIPE_BUF` bytes at most.
    buffer: Vec<u8>,
    /// Length in bytes of the whole records in the buffer.
    whole: usize,
    /// Whether a part of the record that has begun is written, because it is longer than the buffer.
    is_partly_written: bool,
    postponement: Postponement,
}

impl<W: Write> RecordWriter<W> {
    /// The default action of signals is postponed until a long record is written; without one, the
    /// caller handles the signals.
    pub(crate) fn new(output: W, default_action: Option<DefaultAction>) -> Self {
        RecordWriter {
            output,
            buffer: Vec::with_capacity(PIPE_BUF),
            whole: 0,
            is_partly_written: false,
            postponement: Postponement::of(default_action),
        }
    }

    /// Ends a record, which is written with the next ones, or by a flush.
    pub(crate) fn end_record(&mut self) -> io::Result<()> {
        if self.is_partly_written {
            self.begin_part(self.buffer.len());
            self.flush()?;
            self.is_partly_written = false;
            self.postponement.end();
        }
        self.whole = self.buffer.len();
        Ok(())
    }

    fn write_whole_records(&mut self) -> io::Result<()> {
        if self.whole > 0 {
            self.output.write_all(&self.buffer[..self.whole])?;
            self.buffer.drain(..self.whole);
            self.whole = 0;
        }
        Ok(())
    }

    /// Prepares for writing the next `len` bytes of a record that is longer than the buffer.
    fn begin_part(&mut self, len: usize) {
        self.is_partly_written = true;
        if !Sink::of_stdout().takes_output(len) {
            self.postponement.begin();
        }
    }
}

impl<W: Write> Write for RecordWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() > PIPE_BUF {
            self.write_whole_records()?;
        }
        if self.buffer.len() + bytes.len() > PIPE_BUF {
            self.begin_part(self.buffer.len() + bytes.len());
            self.output.write_all(&self.buffer)?;
            self.buffer.clear();
        }
        if bytes.len() > PIPE_BUF {
            return self.output.write(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.whole = 0;
        self.output.write_all(&self.buffer)?;
        self.buffer.clear();
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps each write.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if !bytes.is_empty() {
                self.0.push(bytes.to_vec());
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn records_that_fit_are_written_whole_in_pieces_that_a_pipe_takes_at_once() {
        for len in [1, 7, 1_000, PIPE_BUF - 1, PIPE_BUF] {
            let mut writer = RecordWriter::new(Writes::default(), None);
            let record = vec![b'7'; len - 1];
            let count = 3 * PIPE_BUF / len;
            for _ in 0..count {
                writer.write_all(&record).unwrap();
                writer.write_all(b"\n").unwrap();
                writer.end_record().unwrap();
            }
            writer.flush().unwrap();
            let pieces = writer.output.0;
            assert!(pieces.iter().all(|piece| piece.len() <= PIPE_BUF));
            assert!(pieces.iter().all(|piece| piece.len() % len == 0));
            assert_eq!(pieces.concat().len(), count * len);
        }
    }

    #[test]
    fn a_long_record_comes_after_the_records_before_it_and_is_flushed_at_its_end() {
        let mut writer = RecordWriter::new(Writes::default(), None);
        writer.write_all(b"13\n").unwrap();
        writer.end_record().unwrap();
        let long = [b'7'; 3 * PIPE_BUF];
        for part in [&long[..1], &long, b"\n"] {
            writer.write_all(part).unwrap();
        }
        writer.end_record().unwrap();
        writer.write_all(b"21\n").unwrap();
        writer.end_record().unwrap();
        let expected = [&b"13\n"[..], &long[..1], &long, b"\n"];
        assert_eq!(writer.output.0, expected);
        writer.flush().unwrap();
        assert_eq!(writer.output.0.last().unwrap(), b"21\n");
    }
}
