//! The lines of standard output: what they say, and their formats.

use crate::cli::Format;
use crate::error::Error;
use crate::input::{BadLine, Input};
use rpc_client::Outcome;
use rpc_common::text::escape;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::io::{self, Write};
use std::time::Duration;
use uuid::Uuid;

/// A **line** of output: how a call ended, or a bad line of input.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) index: u64,
    /// None for a bad line of input.
    input: Option<Input>,
    pub(crate) result: Result<String, Error>,
    pub(crate) latency: Option<Duration>,
    correlation_id: Option<Uuid>,
}

impl Line {
    pub(crate) fn from_outcome(outcome: Outcome<Input>) -> Self {
        let input = outcome.context;
        let result = outcome.result.map_err(Error::Call);
        Line {
            index: input.index,
            input: Some(input),
            result: result.and_then(|reply| parse_answer(input.n, reply.body)),
            latency: outcome.latency,
            correlation_id: Some(outcome.correlation_id),
        }
    }

    pub(crate) fn from_bad_line(index: u64, bad_line: BadLine) -> Self {
        let result = Err(bad_line.into());
        Line { index, input: None, result, latency: None, correlation_id: None }
    }

    /// Writes the line, if the format has one for it.
    pub(crate) fn write(&self, output: &mut impl Write, format: Format) -> io::Result<()> {
        match (format, &self.result) {
            (Format::Json, _) => {
                serde_json::to_writer(&mut *output, self)?;
                output.write_all(b"\n")
            }
            (Format::Text, Ok(answer)) => writeln!(output, " [.] Got {answer}"),
            // Parsing has replaced `Auto`.
            (Format::Raw | Format::Auto, Ok(answer)) => writeln!(output, "{answer}"),
            (Format::Raw | Format::Auto, Err(_)) => writeln!(output),
            (Format::Text, Err(_)) => Ok(()),
        }
    }

    /// The message for standard error: the error, and the call that it belongs to.
    pub(crate) fn error_message(&self, error: &Error) -> String {
        match self.input {
            None => error.to_string(),
            Some(_) if error.concerns_every_call() => error.to_string(),
            Some(Input { n, line: None, .. }) => format!("fib({n}): {error}"),
            Some(Input { n, line: Some(line), .. }) => format!("line {line}: fib({n}): {error}"),
        }
    }
}

/// log10 of the golden ratio: by this many digits fib(n) grows from one n to the next.
const DIGITS_PER_N: f64 = 0.208_987_640_249_978_73;

/// An answer is a decimal number with no more digits than fib(n) can have.
fn parse_answer(n: u64, reply: Vec<u8>) -> Result<String, Error> {
    #[allow(clippy::cast_precision_loss)] // where it matters, no answer fits into memory
    let is_too_long = reply.len() as f64 > n as f64 * DIGITS_PER_N + 1.0;
    let problem = if reply.is_empty() || !reply.iter().all(u8::is_ascii_digit) {
        "not a number"
    } else if is_too_long {
        "longer than the answer can be"
    } else {
        return Ok(String::from_utf8(reply).expect("digits are UTF-8"));
    };
    Err(Error::BadReply { reply: escape(&reply).to_string(), problem })
}

/// Milliseconds, to the microsecond.
#[allow(clippy::cast_precision_loss)] // 2^53 µs are 285 years
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1_000.0
}

/// The object of a line in JSON.
impl Serialize for Line {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_map(None)?;
        if let Some(input) = &self.input {
            object.serialize_entry("n", &input.n)?;
        }
        match &self.result {
            // A string, because the numbers of many JSON parsers are not exact.
            Ok(answer) => object.serialize_entry("result", answer)?,
            Err(error) => {
                if let Error::BadLine(bad_line) = error {
                    object.serialize_entry("input", &bad_line.text)?;
                }
                let error = JsonError { code: error.code(), message: error.to_string() };
                object.serialize_entry("error", &error)?;
            }
        }
        if let Some(latency) = self.latency {
            object.serialize_entry("latency_ms", &millis(latency))?;
        }
        if let Some(id) = self.correlation_id {
            object.serialize_entry("correlation_id", &id)?;
        }
        object.end()
    }
}

#[derive(Serialize)]
struct JsonError<'a> {
    code: &'a str,
    message: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::fib::fib;
    use rpc_common::message::NumberError;

    fn written(line: &Line, format: Format) -> String {
        let mut output = Vec::new();
        line.write(&mut output, format).unwrap();
        String::from_utf8(output).unwrap()
    }

    fn line(n: u64, input_line: Option<u64>, reply: &str) -> Line {
        Line::from_outcome(Outcome {
            context: Input { index: 0, n, line: input_line },
            correlation_id: Uuid::nil(),
            latency: Some(Duration::from_micros(1_500)),
            result: Ok(reply.to_owned().into()),
        })
    }

    fn bad_line() -> Line {
        let problem = NumberError::Malformed;
        Line::from_bad_line(0, BadLine { line: 2, text: "a\"b".into(), problem })
    }

    #[test]
    fn a_failed_call_is_an_empty_line_as_raw_and_no_line_as_text() {
        let (answered, failed) = (line(7, None, "13"), line(7, None, "NaN"));
        assert_eq!(written(&answered, Format::Raw), "13\n");
        assert_eq!(written(&failed, Format::Raw), "\n");
        assert_eq!(written(&answered, Format::Text), " [.] Got 13\n");
        assert_eq!(written(&failed, Format::Text), "");
    }

    #[test]
    fn json_is_one_object_for_each_call_and_bad_line() {
        let id = "00000000-0000-0000-0000-000000000000";
        let expected = format!("{{\"n\":7,\"result\":\"13\",\"latency_ms\":1.5,\"correlation_id\":\"{id}\"}}\n");
        assert_eq!(written(&line(7, None, "13"), Format::Json), expected);
        let message = "the reply '?' is not a number: does another program serve this queue?";
        let expected = format!(
            "{{\"n\":8,\"error\":{{\"code\":\"bad-reply\",\"message\":\"{message}\"}},\
             \"latency_ms\":1.5,\"correlation_id\":\"{id}\"}}\n"
        );
        assert_eq!(written(&line(8, None, "?"), Format::Json), expected);
        let expected = format!(
            "{{\"input\":\"a\\\"b\",\"error\":{{\"code\":\"usage\",\"message\":\"line 2: 'a\\\"b' is {}\"}}}}\n",
            NumberError::Malformed
        );
        assert_eq!(written(&bad_line(), Format::Json), expected);
    }

    #[test]
    fn a_message_names_the_call_and_its_line_of_input() {
        let message = |line: Line| line.error_message(line.result.as_ref().unwrap_err());
        let error = "the reply '' is not a number: does another program serve this queue?";
        assert_eq!(message(line(7, None, "")), format!("fib(7): {error}"));
        assert_eq!(message(line(7, Some(3), "")), format!("line 3: fib(7): {error}"));
        assert!(message(bad_line()).starts_with("line 2: 'a\"b' is "));
    }

    #[test]
    fn an_answer_is_a_number_and_not_longer_than_it_can_be() {
        for n in (0..2_000).chain([1_000_000]) {
            let answer = fib(n).to_string();
            assert_eq!(parse_answer(n, answer.clone().into()).unwrap(), answer);
            let longer = answer + "00";
            assert!(parse_answer(n, longer.clone().into()).is_err(), "fib({n}) = {longer}");
        }
        for reply in [&b""[..], b"NaN", b"-1", b"1\n", b" 1", b"\xff"] {
            assert!(parse_answer(30, reply.into()).is_err(), "{reply:?}");
        }
    }
}
