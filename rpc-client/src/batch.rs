//! A batch of numbers: feeds them to the client and prints the answers in the order asked.

use crate::client::{Client, Config, Error, Outcome};
use rpc_common::exit::{self, Exit, ExitCode};
use rpc_common::message::escape;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{self, Write};
use std::thread;

/// What to ask, and how to print the answers.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The numbers n of fib(n).
    pub numbers: Vec<u64>,
    /// How often each number is asked for.
    pub repeat: u64,
    /// The form of the answers.
    pub format: Format,
    /// Nothing on standard error but errors.
    pub quiet: bool,
}

/// The form of the answers on standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A line of the tutorial's, ` [.] Got 832040`; none for a call that failed.
    Text,
    /// The number alone; an empty line for a call that failed, so that lines stay aligned.
    Raw,
}

/// Asks for every number of the batch and prints the answers to `output`, in order. Returns the
/// largest exit code of the calls.
///
/// # Errors
/// [`Error::Broker`] when the broker is not to be had, [`Error::Output`] when `output` fails.
pub fn run(batch: Batch, config: Config, output: impl Write) -> Result<ExitCode, Error> {
    let mut printer = Printer::new(output, batch.format);
    let (feed, requests) = crossbeam_channel::bounded(config.in_flight.get());
    let announce = batch.format == Format::Text && !batch.quiet;
    // Not joined: where the run ends before its input does, the thread ends at its next request.
    thread::spawn(move || {
        let each = |n| (0..batch.repeat).map(move |_| n);
        for n in batch.numbers.into_iter().flat_map(each) {
            if announce {
                let _ = writeln!(io::stderr(), " [x] Requesting fib({n})"); // nobody has to read it
            }
            if feed.send(n.to_string().into_bytes()).is_err() {
                return;
            }
        }
    });
    match Client::new(config).run(&requests, &mut |outcomes| printer.print(outcomes)) {
        Ok(()) => {}
        Err(error @ Error::Broker(_)) => {
            printer.finish().map_err(Error::Output)?;
            printer.fail(&error, &error);
        }
        Err(error) => return Err(error),
    }
    Ok(printer.code)
}

/// Puts the outcomes into the order in which they were asked for.
struct Printer<W> {
    output: W,
    format: Format,
    /// Outcomes that came before their turn.
    early: BTreeMap<u64, Outcome>,
    /// The index of the outcome whose turn it is.
    next: u64,
    /// The largest exit code so far.
    code: ExitCode,
    said_no_server: bool,
}

impl<W: Write> Printer<W> {
    fn new(output: W, format: Format) -> Self {
        let early = BTreeMap::new();
        Printer { output, format, early, next: 0, code: ExitCode::Success, said_no_server: false }
    }

    fn print(&mut self, outcomes: Vec<Outcome>) -> io::Result<()> {
        self.early.extend(outcomes.into_iter().map(|outcome| (outcome.index, outcome)));
        while let Some(outcome) = self.early.remove(&self.next) {
            self.print_one(outcome)?;
            self.next += 1;
        }
        self.output.flush()
    }

    /// Prints the outcomes whose turn has not come, when those before them will not come any more.
    fn finish(&mut self) -> io::Result<()> {
        while !self.early.is_empty() {
            match self.early.remove(&self.next) {
                Some(outcome) => self.print_one(outcome)?,
                None => self.print_gap()?,
            }
            self.next += 1;
        }
        self.output.flush()
    }

    /// What stands where an answer is missing.
    fn print_gap(&mut self) -> io::Result<()> {
        match self.format {
            Format::Text => Ok(()),
            Format::Raw => writeln!(self.output),
        }
    }

    fn print_one(&mut self, outcome: Outcome) -> io::Result<()> {
        match outcome.result.and_then(|answer| read_answer(&answer)) {
            Ok(number) => match self.format {
                Format::Text => writeln!(self.output, " [.] Got {number}"),
                Format::Raw => writeln!(self.output, "{number}"),
            },
            Err(error) => {
                self.output.flush()?; // on a terminal the error then stands where the answer would
                match error {
                    // The same for every n, and said once.
                    Error::NoServer { .. } if self.said_no_server => {}
                    Error::NoServer { .. } => {
                        self.said_no_server = true;
                        self.fail(&error, &error);
                    }
                    _ => self
                        .fail(&error, format_args!("fib({}): {error}", escape(&outcome.request))),
                }
                self.print_gap()
            }
        }
    }

    fn fail(&mut self, error: &Error, message: impl Display) {
        self.code = self.code.max(error.exit_code());
        exit::complain("rpc-client", message);
    }
}

/// An answer is a number in decimal, however large.
fn read_answer(body: &[u8]) -> Result<String, Error> {
    match std::str::from_utf8(body) {
        Ok(text) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
            Ok(text.into())
        }
        _ => Err(Error::BadReply(escape(body).to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(index: u64, answer: &str) -> Outcome {
        Outcome { index, request: index.to_string().into(), result: Ok(answer.into()) }
    }

    fn printed(format: Format, batches: Vec<Vec<Outcome>>) -> (String, ExitCode) {
        let mut output = Vec::new();
        let mut printer = Printer::new(&mut output, format);
        for outcomes in batches {
            printer.print(outcomes).unwrap();
        }
        let code = printer.code;
        (String::from_utf8(output).unwrap(), code)
    }

    #[test]
    fn answers_are_printed_in_the_order_asked() {
        let batches = vec![vec![outcome(2, "22"), outcome(0, "0")], vec![outcome(1, "11")]];
        assert_eq!(printed(Format::Raw, batches), ("0\n11\n22\n".into(), ExitCode::Success));
    }

    #[test]
    fn a_failed_call_is_an_empty_line_raw_and_none_as_text() {
        let batches = || vec![vec![outcome(0, "1"), outcome(1, "NaN"), outcome(2, "3")]];
        assert_eq!(printed(Format::Raw, batches()), ("1\n\n3\n".into(), ExitCode::RemoteError));
        assert_eq!(
            printed(Format::Text, batches()),
            (" [.] Got 1\n [.] Got 3\n".into(), ExitCode::RemoteError)
        );
    }

    #[test]
    fn what_was_answered_is_printed_even_if_the_run_ends_before_its_turn() {
        for (format, expected) in
            [(Format::Raw, "0\n\n22\n"), (Format::Text, " [.] Got 0\n [.] Got 22\n")]
        {
            let mut output = Vec::new();
            let mut printer = Printer::new(&mut output, format);
            printer.print(vec![outcome(2, "22"), outcome(0, "0")]).unwrap();
            printer.finish().unwrap();
            assert_eq!(String::from_utf8(output).unwrap(), expected);
        }
    }

    #[test]
    fn an_answer_is_digits_and_nothing_else() {
        assert_eq!(read_answer(b"0").unwrap(), "0");
        for body in [&b""[..], b"NaN", b"-1", b"1\n", b" 1", b"\xff"] {
            assert!(matches!(read_answer(body), Err(Error::BadReply(_))), "{body:?}");
        }
    }
}
