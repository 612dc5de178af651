//! The printer: records of output in the order asked, errors on standard error, the summary and the
//! exit code.

use crate::cli::{Format, OutputOptions};
use crate::error::Error;
use crate::input::{BadInput, Input};
use crate::output::{Layout, Record};
use crate::progress::Progress;
use crate::record_writer::RecordWriter;
use crate::sink::Sink;
use crate::source::Unreadable;
use crate::summary::Summary;
use crossbeam_channel::Sender;
use rpc_client::Outcome;
use rpc_common::exit::{end_by_signal, print_message, ExitCode};
use rpc_common::sync::{lock, try_lock};
use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{Receiver, Sender as EventSender};
use std::sync::Mutex;

/// A message to the printer.
pub(crate) enum Event {
    /// Records of calls that have ended.
    Records(Vec<Record>),
    /// The event loop could not write to standard output.
    WriteError(io::Error),
    /// Bad input in place of a request, with the index of its record.
    BadInput(u64, BadInput),
    /// The rest of the input cannot be read.
    ReadError(Unreadable),
    /// This signal ends the program, when the summary of what was done is printed.
    Interrupted(i32),
    /// No call is left. (The end of the channel does not show it: the reader may still wait for
    /// input.)
    RunEnded,
}

/// The **printer** writes to standard output; nobody else does.
pub(crate) struct Printer<W> {
    output: RecordWriter<W>,
    options: OutputOptions,
    layout: Layout,
    /// Records that wait for a record before them, by index.
    waiting: BTreeMap<u64, Record>,
    /// Number of printed records. If they are ordered, this is the index of the next one.
    printed: u64,
    last_error: Option<String>,
    /// Whether records were printed that are not flushed.
    is_unflushed: bool,
    /// The largest one so far.
    exit_code: ExitCode,
    summary: Option<Summary>,
    progress: Option<Progress>,
}

impl<W: Write> Printer<W> {
    pub(crate) fn new(
        output: RecordWriter<W>,
        options: OutputOptions,
        layout: Layout,
        progress: Option<Progress>,
    ) -> Self {
        Printer {
            output,
            summary: options.summary.map(Summary::new),
            options,
            layout,
            waiting: BTreeMap::new(),
            printed: 0,
            last_error: None,
            is_unflushed: false,
            exit_code: ExitCode::Success,
            progress,
        }
    }

    pub(crate) fn print_outcomes(&mut self, outcomes: Vec<Outcome<Input>>) -> io::Result<()> {
        self.print_records(records(outcomes, self.options.format))
    }

    fn print_records(&mut self, records: Vec<Record>) -> io::Result<()> {
        records
            .into_iter()
            .try_for_each(|record| self.print_in_order(record))
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.is_unflushed = false;
        match &self.progress {
            Some(progress) if io::stdout().is_terminal() => {
                progress.suspend(|| self.output.flush())
            }
            _ => self.output.flush(),
        }
    }

    /// Prints the summary. Returns the largest exit code.
    pub(crate) fn finish(&mut self) -> io::Result<ExitCode> {
        self.flush()?;
        if let Some(progress) = &self.progress {
            progress.finish();
        }
        if let Some(summary) = &self.summary {
            summary.print();
        }
        Ok(self.exit_code)
    }

    /// Counts a record, and prints it when all records before it are printed.
    fn print_in_order(&mut self, record: Record) -> io::Result<()> {
        if let Some(summary) = &mut self.summary {
            summary.count(&record);
        }
        if let Some(progress) = &self.progress {
            progress.count(record.result.is_err());
        }
        if !self.options.unordered && record.index != self.printed {
            self.waiting.insert(record.index, record);
            return Ok(());
        }
        self.print(&record)?;
        while let Some(record) = self.waiting.remove(&self.printed) {
            self.print(&record)?;
        }
        Ok(())
    }

    fn print(&mut self, record: &Record) -> io::Result<()> {
        if let Err(error) = &record.result {
            self.flush()?; // on a terminal the error then stands where the answer would
            self.print_error(error, record.error_message(error));
        }
        record.write(&mut self.output, self.options.format, self.layout)?;
        self.output.end_record()?;
        self.is_unflushed = true;
        self.printed += 1;
        Ok(())
    }

    /// Prints an error, but not the same one twice in a row.
    fn print_error(&mut self, error: &Error, message: String) {
        self.exit_code = self.exit_code.max(error.exit_code());
        if self.last_error.as_ref() != Some(&message) {
            let print = || print_message("rpc-client", &message);
            self.progress
                .as_ref()
                .map_or_else(print, |progress| progress.suspend(print));
            self.last_error = Some(message);
        }
    }
}

/// Lets the reader of the input read on: each permit allows it `requests_per_permit` requests.
pub(crate) struct Permits {
    sender: Sender<()>,
    requests_per_permit: u64,
    given: u64,
}

impl Permits {
    pub(crate) fn new(sender: Sender<()>, requests_per_permit: u64) -> Self {
        Permits {
            sender,
            requests_per_permit,
            given: 0,
        }
    }

    /// Gives a permit for as many records as it allows.
    fn give_for(&mut self, printed: u64) {
        let earned = printed / self.requests_per_permit;
        for _ in self.given..earned {
            let _ = self.sender.try_send(()); // fails if all input is read
        }
        self.given = earned;
    }
}

/// The printer of many calls, shared by its thread, which may wait for the reader of standard
/// output, and the event loop, which must not.
pub(crate) struct SharedPrinter<W> {
    shared: Mutex<(Printer<W>, Permits)>,
    format: Format,
    sink: Sink,
}

/// Maximum number of bytes that are printed at once on the event loop's thread.
const MAX_AT_ONCE: usize = 4096;

impl<W: Write> SharedPrinter<W> {
    pub(crate) fn new(printer: Printer<W>, permits: Permits) -> Self {
        let format = printer.options.format;
        let sink = Sink::of_stdout();
        SharedPrinter {
            shared: Mutex::new((printer, permits)),
            format,
            sink,
        }
    }

    /// Prints until the run has ended. Returns the largest exit code.
    ///
    /// # Errors
    /// The output cannot be written.
    pub(crate) fn print_all(&self, events: &Receiver<Event>) -> io::Result<ExitCode> {
        loop {
            // What is printed can be read while nothing else happens.
            let event = events.try_recv().or_else(|_| {
                lock(&self.shared).0.flush()?;
                Ok::<_, io::Error>(events.recv().unwrap_or(Event::RunEnded))
            })?;
            let (printer, permits) = &mut *lock(&self.shared);
            match event {
                Event::Records(records) => printer.print_records(records)?,
                Event::WriteError(error) => return Err(error),
                Event::BadInput(index, bad_input) => {
                    printer.print_in_order(Record::from_bad_input(index, bad_input))?;
                }
                Event::ReadError(error) => {
                    let error = Error::BadInput(error.into());
                    printer.print_error(&error, error.to_string());
                }
                Event::Interrupted(signal) => {
                    printer.finish()?;
                    end_by_signal(signal);
                }
                // If the run ended early, bad lines of input may still wait behind a number that
                // was not called.
                Event::RunEnded => return printer.finish(),
            }
            permits.give_for(printer.printed);
        }
    }

    /// Prints outcomes at once if that cannot block, else leaves them to the printer's thread. To
    /// wake that thread costs one of three context switches of a call, when calls are made one at a
    /// time.
    pub(crate) fn print(&self, outcomes: Vec<Outcome<Input>>, events: &EventSender<Event>) {
        let records = records(outcomes, self.format);
        let event = match try_lock(&self.shared) {
            Some(mut shared)
                if shared.0.can_print_at_once(&records) && self.sink.takes_output(MAX_AT_ONCE) =>
            {
                let (printer, permits) = &mut *shared;
                let Err(error) = printer
                    .print_records(records)
                    .and_then(|()| printer.flush())
                else {
                    return permits.give_for(printer.printed);
                };
                Event::WriteError(error)
            }
            _ => Event::Records(records),
        };
        let _ = events.send(event); // fails if the printer has ended
    }
}

fn records(outcomes: Vec<Outcome<Input>>, format: Format) -> Vec<Record> {
    outcomes
        .into_iter()
        .map(|outcome| Record::from_outcome(outcome, format))
        .collect()
}

impl<W> Printer<W> {
    /// Whether these records can be printed without the printer's thread: errors, progress, and
    /// records that wait for others or are many are left to it.
    fn can_print_at_once(&self, records: &[Record]) -> bool {
        let len = records
            .iter()
            .map(|record| record.max_len(self.options.format))
            .sum::<Option<usize>>();
        self.progress.is_none()
            && self.waiting.is_empty()
            && !self.is_unflushed
            && len.is_some_and(|len| len <= MAX_AT_ONCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use crate::input::Origin;
    use crate::source::Source;
    use clap::Parser;
    use crossbeam_channel::bounded;
    use rpc_client::Request;
    use rpc_common::fib::NumberError;
    use rpc_common::message::{Answer, ErrorCode, Failure};
    use std::sync::mpsc;
    use uuid::Uuid;

    fn answered(index: u64, answer: &str) -> Event {
        ended(index, Ok(answer.to_owned().into()))
    }

    fn failed(index: u64) -> Event {
        let failure = Failure::new(ErrorCode::Internal, "no");
        ended(index, Err(rpc_client::Error::Failed(failure)))
    }

    fn ended(index: u64, result: Result<Answer, rpc_client::Error>) -> Event {
        let context = Input {
            index,
            origin: Origin::Number { n: 90, line: None },
        };
        let request = Request {
            context,
            body: Vec::new(),
        };
        let correlation_id = Uuid::nil();
        let latency = None;
        Event::Records(records(
            vec![Outcome {
                request,
                correlation_id,
                latency,
                result,
            }],
            Format::Raw,
        ))
    }

    fn bad_line(index: u64) -> Event {
        let problem = NumberError::Malformed;
        Event::BadInput(
            index,
            BadInput::NotANumber {
                line: 1,
                text: "x".into(),
                problem,
            },
        )
    }

    fn print(
        output: impl Write,
        options: &[&str],
        events: Vec<Event>,
        permits: &Sender<()>,
    ) -> io::Result<ExitCode> {
        let cli = Cli::parse_from([&["rpc-client", "1"], options].concat());
        let (sender, receiver) = mpsc::channel();
        for event in events {
            sender.send(event).unwrap();
        }
        sender.send(Event::RunEnded).unwrap();
        let permits = Permits::new(permits.clone(), 2);
        SharedPrinter::new(
            Printer::new(
                RecordWriter::new(output, None),
                cli.output,
                Layout::Batch,
                None,
            ),
            permits,
        )
        .print_all(&receiver)
    }

    fn printed(options: &[&str], events: Vec<Event>) -> (String, ExitCode) {
        let mut output = Vec::new();
        let code = print(&mut output, options, events, &bounded(9).0).unwrap();
        (String::from_utf8(output).unwrap(), code)
    }

    #[test]
    fn records_are_printed_in_the_order_asked() {
        let events = || {
            vec![
                answered(2, "34"),
                bad_line(1),
                answered(0, "13"),
                answered(3, "55"),
            ]
        };
        assert_eq!(
            printed(&["-o", "raw"], events()),
            ("13\n\n34\n55\n".into(), ExitCode::Usage)
        );
    }

    #[test]
    fn unordered_records_are_printed_as_they_come() {
        let options = ["-o", "json", "--unordered"];
        let (output, _) = printed(&options, vec![answered(1, "21"), answered(0, "13")]);
        assert!(output.find("\"21\"") < output.find("\"13\""), "{output}");
    }

    #[test]
    fn the_largest_exit_code_counts() {
        let unreadable = || Event::ReadError(Source::StandardInput.too_large());
        for (events, code) in [
            (vec![answered(0, "13")], ExitCode::Success),
            (
                vec![answered(0, "13"), failed(1), answered(2, "21")],
                ExitCode::RemoteError,
            ),
            (vec![unreadable(), failed(0)], ExitCode::Usage),
        ] {
            assert_eq!(printed(&["-o", "text"], events).1, code);
        }
    }

    #[test]
    fn the_reader_gets_a_permit_when_records_are_printed_not_when_they_wait() {
        for (indexes, count) in [(vec![1, 2, 3], 0), (vec![1, 2, 3, 0], 2), (vec![0], 0)] {
            let (permits, reader_permits) = bounded(9);
            let events = indexes.iter().map(|index| answered(*index, "13")).collect();
            print(Vec::new(), &[], events, &permits).unwrap();
            assert_eq!(reader_permits.len(), count, "{indexes:?}");
        }
    }

    #[test]
    fn a_failed_write_ends_the_printer() {
        let full: &mut [u8] = &mut [0; 4];
        let events = vec![answered(0, "13"), answered(1, "21")];
        assert!(print(full, &["-o", "raw"], events, &bounded(9).0).is_err());
    }
}
