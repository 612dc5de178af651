//! What is printed: an answer per line, in the order asked, and errors on standard error.

use crate::client::{Error, Outcome};
use crate::input::BadLine;
use crate::summary::Summary;
use rpc_common::exit::{self, Exit, ExitCode};
use rpc_common::message::escape;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{self, Write};
use std::time::Duration;
use uuid::Uuid;

/// The form of the answers on standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A line of the tutorial's, ` [.] Got 832040`; none for a call that failed.
    Text,
    /// The number alone; an empty line for a call that failed, so that lines stay aligned.
    Raw,
    /// An object for each, whether it failed or not.
    Json,
}

/// What a line of output tells.
#[derive(Debug)]
pub(crate) struct Line {
    /// What was asked; none for a bad line of input.
    n: Option<u64>,
    /// The line of standard input that it was asked by.
    asked_by: Option<u64>,
    pub(crate) result: Result<String, Error>,
    pub(crate) latency: Option<Duration>,
    correlation_id: Option<Uuid>,
}

impl Line {
    /// The line of a call of fib(n), whose answer must be a number.
    pub(crate) fn of_call(n: u64, line: Option<u64>, outcome: Outcome) -> Self {
        let result = outcome.result.and_then(|answer| read_answer(n, &answer));
        let (latency, correlation_id) = (outcome.latency, Some(outcome.correlation_id));
        Line { n: Some(n), asked_by: line, result, latency, correlation_id }
    }

    /// The line of a line of input that is no number.
    pub(crate) fn of_bad_line(bad: BadLine) -> Self {
        let asked_by = Some(bad.line);
        Line { n: None, asked_by, result: Err(bad.into()), latency: None, correlation_id: None }
    }
}

/// The decimal digits by which fib grows from one n to the next: log10 of the golden ratio.
const DIGITS_PER_N: f64 = 0.208_987_640_249_978_73;

/// An answer is a number in decimal, with no more digits than fib(n) can have.
fn read_answer(n: u64, body: &[u8]) -> Result<String, Error> {
    #[allow(clippy::cast_precision_loss)] // where it matters, no answer fits into memory
    let is_too_long = |text: &str| text.len() as f64 > n as f64 * DIGITS_PER_N + 1.0;
    let bad = |reason| Err(Error::BadReply { reply: escape(body).to_string(), reason });
    match std::str::from_utf8(body) {
        Ok("") | Err(_) => bad("no number"),
        Ok(text) if !text.bytes().all(|byte| byte.is_ascii_digit()) => bad("no number"),
        Ok(text) if is_too_long(text) => bad("longer than the answer can be"),
        Ok(text) => Ok(text.into()),
    }
}

/// Puts the lines into the order in which they were asked for, and prints them.
pub(crate) struct Printer<W> {
    output: W,
    format: Format,
    /// Whether lines are printed as they come.
    unordered: bool,
    /// Lines that came before their turn.
    early: BTreeMap<u64, Line>,
    /// The place of the line whose turn it is; how many are printed, if they have no order.
    next: u64,
    /// The largest exit code so far.
    code: ExitCode,
    /// The error that was said last.
    said: Option<String>,
    summary: Summary,
}

impl<W: Write> Printer<W> {
    pub(crate) fn new(output: W, format: Format, unordered: bool) -> Self {
        Printer {
            output,
            format,
            unordered,
            early: BTreeMap::new(),
            next: 0,
            code: ExitCode::Success,
            said: None,
            summary: Summary::new(),
        }
    }

    /// How many lines are printed, or before the first gap if they have an order.
    pub(crate) fn printed(&self) -> u64 {
        self.next
    }

    pub(crate) fn code(&self) -> ExitCode {
        self.code
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Prints the line of a place when its turn comes.
    pub(crate) fn put(&mut self, place: u64, line: Line) -> io::Result<()> {
        self.summary.count(&line);
        if self.unordered {
            self.next += 1;
            return self.print(&line);
        }
        self.early.insert(place, line);
        while let Some(line) = self.early.remove(&self.next) {
            self.print(&line)?;
            self.next += 1;
        }
        Ok(())
    }

    /// Hands on all that is printed.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }

    /// Prints the lines whose turn has not come, when those before them will not come any more.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        while !self.early.is_empty() {
            match self.early.remove(&self.next) {
                Some(line) => self.print(&line)?,
                None => self.print_gap()?,
            }
            self.next += 1;
        }
        self.flush()
    }

    fn print(&mut self, line: &Line) -> io::Result<()> {
        if let Err(error) = &line.result {
            self.output.flush()?; // on a terminal the error then stands where the answer would
            self.complain(error, line);
        }
        match (self.format, &line.result) {
            (Format::Json, _) => {
                serde_json::to_writer(&mut self.output, &Json::from(line))?;
                self.output.write_all(b"\n")
            }
            (Format::Text, Ok(number)) => writeln!(self.output, " [.] Got {number}"),
            (Format::Raw, Ok(number)) => writeln!(self.output, "{number}"),
            (_, Err(_)) => self.print_gap(),
        }
    }

    /// What stands where an answer is missing.
    fn print_gap(&mut self) -> io::Result<()> {
        match self.format {
            Format::Raw => writeln!(self.output),
            Format::Text | Format::Json => Ok(()),
        }
    }

    fn complain(&mut self, error: &Error, line: &Line) {
        match (error, line.n, line.asked_by) {
            // These concern every call, and are said once.
            (Error::NoServer { .. } | Error::Broker(_) | Error::Unheard(_), _, _)
            | (_, None, _) => {
                self.fail(error, error);
            }
            (_, Some(n), None) => self.fail(error, format_args!("fib({n}): {error}")),
            (_, Some(n), Some(line)) => {
                self.fail(error, format_args!("line {line}: fib({n}): {error}"));
            }
        }
    }

    /// Says an error, but not twice in a row.
    pub(crate) fn fail(&mut self, error: &Error, message: impl Display) {
        self.code = self.code.max(error.exit_code());
        let message = message.to_string();
        if self.said.as_ref() != Some(&message) {
            exit::complain("rpc-client", &message);
            self.said = Some(message);
        }
    }
}

/// Milliseconds, to the microsecond.
#[allow(clippy::cast_precision_loss)] // 2^53 µs are 285 years
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1_000.0
}

/// A line as JSON.
#[derive(Serialize)]
struct Json<'a> {
    /// The number n of fib(n) that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<u64>,
    /// In its place, the line of input that is no number.
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<&'a str>,
    /// fib(n) in decimal: a string, because JSON's numbers are not exact.
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a str>,
    /// In its place, why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<JsonError<'a>>,
    /// From the first publish of the request to the end of the call, if it was published.
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<f64>,
    /// By which the call is found in the server's log, and on the wire.
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<Uuid>,
}

#[derive(Serialize)]
struct JsonError<'a> {
    code: &'a str,
    message: String,
}

impl<'a> From<&'a Line> for Json<'a> {
    fn from(line: &'a Line) -> Self {
        let Line { n, asked_by: _, result, latency, correlation_id } = line;
        let input = match result {
            Err(Error::BadLine(bad)) => Some(&*bad.input),
            _ => None,
        };
        let error = |error: &'a Error| JsonError { code: error.code(), message: error.to_string() };
        Json {
            n: *n,
            input,
            result: result.as_deref().ok(),
            error: result.as_ref().err().map(error),
            latency_ms: latency.map(millis),
            correlation_id: *correlation_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(n: u64, answer: &str) -> Line {
        let (latency, correlation_id) = (Some(Duration::from_micros(1_500)), Some(Uuid::nil()));
        Line {
            n: Some(n),
            asked_by: None,
            result: read_answer(n, answer.as_bytes()),
            latency,
            correlation_id,
        }
    }

    fn printed(format: Format, unordered: bool, lines: Vec<(u64, Line)>) -> (String, ExitCode) {
        let mut output = Vec::new();
        let mut printer = Printer::new(&mut output, format, unordered);
        for (place, line) in lines {
            printer.put(place, line).unwrap();
        }
        printer.finish().unwrap();
        let code = printer.code;
        (String::from_utf8(output).unwrap(), code)
    }

    #[test]
    fn answers_are_printed_in_the_order_asked() {
        let lines = || vec![(2, line(9, "34")), (0, line(7, "13")), (1, line(8, "21"))];
        assert_eq!(
            printed(Format::Raw, false, lines()),
            ("13\n21\n34\n".into(), ExitCode::Success)
        );
        assert_eq!(printed(Format::Raw, true, lines()), ("34\n13\n21\n".into(), ExitCode::Success));
    }

    #[test]
    fn a_failed_call_is_an_empty_line_raw_and_none_as_text() {
        let lines = || vec![(0, line(1, "1")), (1, line(2, "NaN")), (2, line(3, "2"))];
        let code = ExitCode::RemoteError;
        assert_eq!(printed(Format::Raw, false, lines()), ("1\n\n2\n".into(), code));
        assert_eq!(
            printed(Format::Text, false, lines()),
            (" [.] Got 1\n [.] Got 2\n".into(), code)
        );
    }

    #[test]
    fn what_was_answered_is_printed_even_if_the_run_ends_before_its_turn() {
        let lines = || vec![(2, line(8, "21")), (0, line(7, "13"))];
        assert_eq!(printed(Format::Raw, false, lines()).0, "13\n\n21\n");
        assert_eq!(printed(Format::Text, false, lines()).0, " [.] Got 13\n [.] Got 21\n");
    }

    #[test]
    fn json_is_an_object_a_line() {
        let bad = BadLine {
            line: 2,
            input: "a\"b".into(),
            reason: rpc_common::message::NumberError::Malformed,
        };
        let lines = vec![(0, line(7, "13")), (1, Line::of_bad_line(bad)), (2, line(8, "?"))];
        let id = "00000000-0000-0000-0000-000000000000";
        let expected = format!(
            r#"{{"n":7,"result":"13","latency_ms":1.5,"correlation_id":"{id}"}}
{{"input":"a\"b","error":{{"code":"usage","message":"line 2: 'a\"b' is not a natural number in decimal digits, 20 at most"}}}}
{{"n":8,"error":{{"code":"bad-reply","message":"bad reply: '?' is no number: does another program serve this queue?"}},"latency_ms":1.5,"correlation_id":"{id}"}}
"#
        );
        assert_eq!(printed(Format::Json, false, lines), (expected, ExitCode::Usage));
    }

    #[test]
    fn an_answer_is_digits_and_no_more_than_there_can_be() {
        for n in (0..2_000).chain([1_000_000]) {
            let answer = rpc_common::fib::fib(n).to_string();
            assert_eq!(read_answer(n, answer.as_bytes()).unwrap(), answer);
            let longer = answer + "00";
            assert!(read_answer(n, longer.as_bytes()).is_err(), "fib({n}) = {longer}");
        }
        for body in [&b""[..], b"NaN", b"-1", b"1\n", b" 1", b"\xff"] {
            assert!(matches!(read_answer(30, body), Err(Error::BadReply { .. })), "{body:?}");
        }
    }
}
