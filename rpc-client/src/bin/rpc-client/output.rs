//! The records of standard output, one for each call: their formats. `check_number` turns a reply
//! to a number that is not a number into an error.

use crate::cli::Format;
use crate::error::Error;
use crate::input::{BadInput, Input, Origin};
use base64::prelude::{Engine, BASE64_STANDARD};
use rpc_client::{Error as CallError, Outcome, Request};
use rpc_common::message::{Answer, Failure};
use rpc_common::text::{escape, escape_text, is_control};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::ser::Formatter;
use std::io::{self, Write};
use std::str;
use std::time::Duration;
use uuid::Uuid;

/// The number of lines of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One: that of a single call, whose answer is printed as it is.
    Single,
    /// One for each call of a batch.
    Batch,
}

/// A **record** of output: how a call ended, or bad input. It is one line, but the reply to data
/// may have several, or no end of a line.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) index: u64,
    /// None for bad input.
    origin: Option<Origin>,
    /// The body of the request; empty unless the format is JSON, so that it takes no memory while
    /// the record waits.
    request: Vec<u8>,
    pub(crate) result: Result<Answer, Error>,
    pub(crate) latency: Option<Duration>,
    correlation_id: Option<Uuid>,
}

impl Record {
    pub(crate) fn from_outcome(outcome: Outcome<Input>, format: Format) -> Self {
        let Request {
            context: Input { index, origin },
            body,
        } = outcome.request;
        let result = outcome.result.map_err(Error::Call);
        Record {
            index,
            origin: Some(origin),
            request: if format == Format::Json {
                body
            } else {
                Vec::new()
            },
            result: match origin {
                Origin::Number { n, .. } => result.and_then(|answer| check_number(n, answer)),
                _ => result,
            },
            latency: outcome.latency,
            correlation_id: Some(outcome.correlation_id),
        }
    }

    pub(crate) fn from_bad_input(index: u64, bad_input: BadInput) -> Self {
        let result = Err(bad_input.into());
        Record {
            index,
            origin: None,
            request: Vec::new(),
            result,
            latency: None,
            correlation_id: None,
        }
    }

    /// Upper bound of the record's length in bytes; `None` for an error.
    pub(crate) fn max_len(&self, format: Format) -> Option<usize> {
        const MAX_ESCAPED: usize = 10; // as \u{10ffff}
        const MAX_LABEL: usize = 512;
        let answer = self.result.as_ref().ok()?;
        let content_type = answer.content_type.as_ref().map_or(0, String::len);
        Some(match format {
            Format::Raw => answer.body.len() + 1,
            _ => MAX_ESCAPED * (answer.body.len() + self.request.len() + content_type) + MAX_LABEL,
        })
    }

    /// Writes the record, if the format has one for it.
    pub(crate) fn write(
        &self,
        output: &mut impl Write,
        format: Format,
        layout: Layout,
    ) -> io::Result<()> {
        match (format, &self.result) {
            (Format::Json, _) => {
                self.serialize(&mut serde_json::Serializer::with_formatter(
                    &mut *output,
                    TerminalSafe,
                ))?;
                output.write_all(b"\n")
            }
            (Format::Text, Ok(answer)) => self.write_text(output, &answer.body, layout),
            (Format::Text, Err(_)) => Ok(()),
            // Parsing has replaced `Auto`.
            (Format::Raw | Format::Auto, Ok(answer)) => {
                output.write_all(&answer.body)?;
                let is_data = !matches!(self.origin, Some(Origin::Number { .. }));
                if layout == Layout::Single && is_data {
                    Ok(())
                } else {
                    output.write_all(b"\n")
                }
            }
            (Format::Raw | Format::Auto, Err(_)) if layout == Layout::Single => Ok(()),
            // The lines stay aligned with the input.
            (Format::Raw | Format::Auto, Err(_)) => output.write_all(b"\n"),
        }
    }

    fn write_text(&self, output: &mut impl Write, answer: &[u8], layout: Layout) -> io::Result<()> {
        match self.origin {
            Some(Origin::Number { .. }) if layout == Layout::Single => {
                output.write_all(b" [.] Got ")?;
            }
            Some(Origin::Number { n, .. }) => write!(output, " [.] fib({n}) = ")?,
            _ => {}
        }
        write!(output, "{}", escape_text(answer))?;
        if answer.ends_with(b"\n") {
            return Ok(());
        }
        output.write_all(b"\n")
    }

    /// The message for standard error: the error, and the call that it belongs to.
    pub(crate) fn error_message(&self, error: &Error) -> String {
        let label = self
            .origin
            .filter(|_| !error.concerns_every_call())
            .and_then(Origin::label);
        label.map_or_else(|| error.to_string(), |label| format!("{label}: {error}"))
    }
}

/// log10 of the golden ratio: the digits by which fib(n) grows from one n to the next.
const DIGITS_PER_N: f64 = 0.208_987_640_249_978_73;

/// An answer is a decimal number with no more digits than fib(n) can have.
fn check_number(n: u64, answer: Answer) -> Result<Answer, Error> {
    let reply = &answer.body;
    #[allow(clippy::cast_precision_loss)] // where it matters, no answer fits into memory
    let is_too_long = reply.len() as f64 > n as f64 * DIGITS_PER_N + 1.0;
    let problem = if reply.is_empty() || !reply.iter().all(u8::is_ascii_digit) {
        "not a number"
    } else if is_too_long {
        "longer than the answer can be"
    } else {
        return Ok(answer);
    };
    Err(Error::BadReply {
        reply: escape(reply).to_string(),
        problem,
    })
}

/// Milliseconds, to the microsecond.
#[allow(clippy::cast_precision_loss)] // 2^53 µs are 285 years
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1_000.0
}

/// The JSON object of a record.
impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_map(None)?;
        match &self.origin {
            Some(Origin::Number { n, .. }) => object.serialize_entry("n", n)?,
            Some(_) => serialize_bytes(&mut object, ["data", "data_base64"], &self.request)?,
            None => {}
        }
        let is_number = matches!(self.origin, Some(Origin::Number { .. }));
        match &self.result {
            Ok(answer) => {
                // Numbers, too, are strings, because those of many JSON parsers are not exact.
                serialize_bytes(&mut object, ["result", "result_base64"], &answer.body)?;
                if let (Some(content_type), false) = (&answer.content_type, is_number) {
                    object.serialize_entry("content_type", content_type)?;
                }
            }
            Err(error) => {
                if let Error::BadInput(BadInput::NotANumber { text, .. }) = error {
                    object.serialize_entry("input", text)?;
                }
                object.serialize_entry("error", &JsonError::from(error))?;
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

/// Adds bytes by the first name if they are UTF-8, else as base64 by the second one.
fn serialize_bytes<M: SerializeMap>(
    object: &mut M,
    [name, base64]: [&str; 2],
    bytes: &[u8],
) -> Result<(), M::Error> {
    match str::from_utf8(bytes) {
        Ok(text) => object.serialize_entry(name, text),
        Err(_) => object.serialize_entry(base64, &BASE64_STANDARD.encode(bytes)),
    }
}

#[derive(Serialize)]
struct JsonError<'a> {
    code: &'a str,
    message: String,
    /// Of a program that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
}

impl<'a> From<&'a Error> for JsonError<'a> {
    fn from(error: &'a Error) -> Self {
        let exit_code = match error {
            Error::Call(CallError::Failed(Failure { exit_code, .. })) => *exit_code,
            _ => None,
        };
        JsonError {
            code: error.code(),
            message: error.to_string(),
            exit_code,
        }
    }
}

/// Escapes in strings what can control a terminal, too: JSON requires it for a part of that only.
struct TerminalSafe;

impl Formatter for TerminalSafe {
    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        output: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for part in fragment.split_inclusive(is_control) {
            let plain = part.trim_end_matches(is_control);
            output.write_all(plain.as_bytes())?;
            let mut controls = part[plain.len()..].chars();
            // All are below 2^16.
            controls.try_for_each(|char| write!(output, "\\u{:04x}", u32::from(char)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::fib::fib;
    use rpc_common::fib::NumberError;
    use rpc_common::message::ErrorCode;

    fn written(record: &Record, format: Format) -> String {
        written_as(Layout::Batch, record, format)
    }

    fn written_as(layout: Layout, record: &Record, format: Format) -> String {
        let mut output = Vec::new();
        record.write(&mut output, format, layout).unwrap();
        String::from_utf8(output).unwrap()
    }

    fn record(n: u64, input_line: Option<u64>, reply: &str) -> Record {
        let origin = Origin::Number {
            n,
            line: input_line,
        };
        line_of(
            origin,
            n.to_string().as_bytes(),
            Ok(reply.to_owned().into()),
        )
    }

    fn line_of(origin: Origin, request: &[u8], result: Result<Answer, CallError>) -> Record {
        let outcome = Outcome {
            request: Request {
                context: Input { index: 0, origin },
                body: request.into(),
            },
            correlation_id: Uuid::nil(),
            latency: Some(Duration::from_micros(1_500)),
            result,
        };
        Record::from_outcome(outcome, Format::Json)
    }

    fn replied(origin: Origin, request: &[u8], reply: &[u8], content_type: Option<&str>) -> Record {
        let mut answer = Answer::new(reply.into());
        answer.content_type = content_type.map(Into::into);
        line_of(origin, request, Ok(answer))
    }

    fn failed(origin: Origin) -> Record {
        let failure = Failure::new(ErrorCode::Failed, "wc failed").with_exit_code(3);
        line_of(origin, b"x", Err(CallError::Failed(failure)))
    }

    fn bad_line() -> Record {
        let problem = NumberError::Malformed;
        Record::from_bad_input(
            0,
            BadInput::NotANumber {
                line: 2,
                text: "a\"b".into(),
                problem,
            },
        )
    }

    #[test]
    fn of_several_calls_text_names_each_and_raw_has_an_empty_line_for_one_that_failed() {
        let answered = record(7, None, "13");
        let failed = record(7, None, "NaN");
        assert_eq!(written(&answered, Format::Raw), "13\n");
        assert_eq!(written(&failed, Format::Raw), "\n");
        assert_eq!(written(&answered, Format::Text), " [.] fib(7) = 13\n");
        assert_eq!(written(&failed, Format::Text), "");
    }

    #[test]
    fn of_the_only_call_text_is_that_of_the_tutorial_and_nothing_is_printed_if_it_failed() {
        let answered = record(7, None, "13");
        let failed = record(7, None, "NaN");
        assert_eq!(written_as(Layout::Single, &answered, Format::Raw), "13\n");
        assert_eq!(written_as(Layout::Single, &failed, Format::Raw), "");
        assert_eq!(
            written_as(Layout::Single, &answered, Format::Text),
            " [.] Got 13\n"
        );
        assert_eq!(written_as(Layout::Single, &failed, Format::Text), "");
    }

    #[test]
    fn json_is_one_object_for_each_call_and_bad_line() {
        let id = "00000000-0000-0000-0000-000000000000";
        let expected = format!(
            "{{\"n\":7,\"result\":\"13\",\"latency_ms\":1.5,\"correlation_id\":\"{id}\"}}\n"
        );
        assert_eq!(written(&record(7, None, "13"), Format::Json), expected);
        let message = "the reply '?' is not a number: does another program serve this queue?";
        let expected = format!(
            "{{\"n\":8,\"error\":{{\"code\":\"bad-reply\",\"message\":\"{message}\"}},\
             \"latency_ms\":1.5,\"correlation_id\":\"{id}\"}}\n"
        );
        assert_eq!(written(&record(8, None, "?"), Format::Json), expected);
        let expected = format!(
            "{{\"input\":\"a\\\"b\",\"error\":{{\"code\":\"usage\",\"message\":\"line 2: 'a\\\"b' is {}\"}}}}\n",
            NumberError::Malformed
        );
        assert_eq!(written(&bad_line(), Format::Json), expected);
    }

    #[test]
    fn a_reply_to_data_is_raw_without_a_change_and_a_newline_is_added_to_one_of_several() {
        let raw = |origin, reply| {
            let mut output = Vec::new();
            let layout = match origin {
                Origin::SingleData => Layout::Single,
                _ => Layout::Batch,
            };
            replied(origin, b"x", reply, None)
                .write(&mut output, Format::Raw, layout)
                .unwrap();
            output
        };
        assert_eq!(raw(Origin::SingleData, b"a\xff\n"), b"a\xff\n");
        assert_eq!(raw(Origin::SingleData, b""), b"");
        assert_eq!(raw(Origin::Data(1), b"a\xff"), b"a\xff\n");
        assert_eq!(raw(Origin::Line(1), b""), b"\n");
        assert_eq!(
            written_as(Layout::Single, &failed(Origin::SingleData), Format::Raw),
            ""
        );
        assert_eq!(written(&failed(Origin::Line(1)), Format::Raw), "\n");
    }

    #[test]
    fn a_reply_to_data_is_text_with_an_end_of_line_and_without_control_characters() {
        let text = |reply| {
            written(
                &replied(Origin::SingleData, b"x", reply, None),
                Format::Text,
            )
        };
        assert_eq!(text(b"a\tb\nc"), "a\tb\nc\n");
        assert_eq!(text(b"a\n"), "a\n");
        assert_eq!(text(b"\x1b[2J\xff"), "\\u{1b}[2J\\xff\n");
        assert_eq!(text(b""), "\n");
        assert_eq!(written(&failed(Origin::SingleData), Format::Text), "");
    }

    #[test]
    fn json_has_bytes_as_text_or_base64_and_what_is_said_of_them() {
        let json = |record: &Record| {
            written(record, Format::Json)
                .split(",\"latency_ms\"")
                .next()
                .unwrap()
                .to_owned()
        };
        assert_eq!(
            json(&replied(
                Origin::Line(1),
                b"a\"\n",
                b"\xff\0",
                Some("image/png")
            )),
            r#"{"data":"a\"\n","result_base64":"/wA=","content_type":"image/png""#
        );
        assert_eq!(
            json(&replied(
                Origin::SingleData,
                b"\xff",
                "\x1b\u{7f}\u{9b}\u{202e}".as_bytes(),
                None
            )),
            r#"{"data_base64":"/w==","result":"\u001b\u007f\u009b\u202e""#
        );
        assert_eq!(
            json(&failed(Origin::Data(1))),
            r#"{"data":"x","error":{"code":"failed","message":"wc failed","exit_code":3}"#
        );
    }

    #[test]
    fn a_message_names_the_call_and_its_line_of_input() {
        let message = |record: Record| record.error_message(record.result.as_ref().unwrap_err());
        let error = "the reply '' is not a number: does another program serve this queue?";
        assert_eq!(message(record(7, None, "")), format!("fib(7): {error}"));
        assert_eq!(
            message(record(7, Some(3), "")),
            format!("line 3: fib(7): {error}")
        );
        assert_eq!(message(failed(Origin::SingleData)), "wc failed");
        assert_eq!(message(failed(Origin::Data(2))), "request 2: wc failed");
        assert_eq!(message(failed(Origin::Line(3))), "line 3: wc failed");
        assert!(message(bad_line()).starts_with("line 2: 'a\"b' is "));
    }

    #[test]
    fn an_answer_is_a_number_and_not_longer_than_it_can_be() {
        for n in (0..2_000).chain([1_000_000]) {
            let answer = fib(n).to_string();
            assert!(check_number(n, answer.clone().into()).is_ok());
            let longer = answer + "00";
            assert!(
                check_number(n, longer.clone().into()).is_err(),
                "fib({n}) = {longer}"
            );
        }
        for reply in [&b""[..], b"NaN", b"-1", b"1\n", b" 1", b"\xff"] {
            let answer = Answer::new(reply.into());
            assert!(check_number(30, answer).is_err(), "{reply:?}");
        }
    }
}
