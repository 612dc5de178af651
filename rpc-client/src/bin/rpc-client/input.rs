//! The input: numbers, data and lines, and what a request is called in messages.

use crate::source::{Source, Unreadable, TOO_LARGE};
use rpc_common::fib::{parse_number, NumberError};
use rpc_common::options::MAX_SIZE;
use rpc_common::text::escape;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, Read};
use std::iter;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::str::FromStr;

/// An argument of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Argument {
    /// A number n of fib(n).
    Number(u64),
    /// `-`: standard input, one number per line.
    StandardInput,
}

impl FromStr for Argument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "-" => Ok(Argument::StandardInput),
            "json" => Err("not a whole number; is it --summary=json, with a '='?".into()),
            _ => parse_number(text.as_bytes())
                .map(Argument::Number)
                .map_err(|error| error.to_string()),
        }
    }
}

/// A value of `--data`: a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Bytes(Vec<u8>),
    /// `@FILE`, or `@-` for standard input.
    Source(Source),
}

impl From<OsString> for Data {
    fn from(text: OsString) -> Self {
        match text.as_bytes().strip_prefix(b"@") {
            Some(name) => Data::Source(OsStr::from_bytes(name).to_owned().into()),
            None => Data::Bytes(text.into_vec()),
        }
    }
}

impl Data {
    /// Refuses a file that cannot be read, or is too large.
    pub(crate) fn validate(&self) -> Result<(), Unreadable> {
        match self {
            Data::Source(source) if source.validate()? > MAX_SIZE as u64 => Err(source.too_large()),
            Data::Source(_) | Data::Bytes(_) => Ok(()),
        }
    }

    /// The body of the request.
    pub(crate) fn read(&self) -> Result<Vec<u8>, Unreadable> {
        match self {
            Data::Bytes(bytes) => Ok(bytes.clone()),
            Data::Source(source) => source.read_up_to(MAX_SIZE),
        }
    }
}

/// The input of a call; the request carries it to the line of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Input {
    /// The position of the line of output, from 0.
    pub(crate) index: u64,
    pub(crate) origin: Origin,
}

/// The origin of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The number n of fib(n), and the line of standard input, from 1, if n comes from there.
    Number { n: u64, line: Option<u64> },
    /// The only `--data`, called once: its reply is all that is printed.
    SingleData,
    /// One of several: the position of its `--data`, from 1.
    Data(u64),
    /// The line of `--lines`, from 1.
    Line(u64),
}

impl Origin {
    /// The request's name in messages; `None` for the only one.
    pub(crate) fn label(self) -> Option<String> {
        match self {
            Origin::Number { n, line: None } => Some(format!("fib({n})")),
            Origin::Number {
                n,
                line: Some(line),
            } => Some(format!("line {line}: fib({n})")),
            Origin::SingleData => None,
            Origin::Data(position) => Some(format!("request {position}")),
            Origin::Line(line) => Some(format!("line {line}")),
        }
    }
}

/// Input that is not a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadInput {
    /// A line of standard input, from 1, trimmed and escaped.
    #[error("line {line}: '{text}' is {problem}")]
    NotANumber {
        line: u64,
        text: String,
        problem: NumberError,
    },
    /// A line of `--lines`, from 1.
    #[error("line {0}: {TOO_LARGE}")]
    LineTooLarge(u64),
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
}

/// Maximum length in bytes of a line with a number, without its end.
pub(crate) const MAX_NUMBER_LINE: usize = 1024;

/// The lines of an input, without their ends; each is read when it is taken. Longer lines are
/// truncated to max + 1 bytes, so that the caller can tell.
pub(crate) fn read_lines(
    mut input: impl BufRead,
    max: usize,
) -> impl Iterator<Item = io::Result<Vec<u8>>> {
    iter::from_fn(move || read_line(&mut input, max).transpose())
}

fn read_line(input: &mut impl BufRead, max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    if input
        .by_ref()
        .take(max as u64 + 1)
        .read_until(b'\n', &mut line)?
        == 0
    {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if line.len() > max {
        input.skip_until(b'\n')?;
    }
    Ok(Some(line))
}

/// The request of a line with a number; blanks around it are allowed.
pub(crate) fn number_line(line: u64, bytes: &[u8]) -> Result<(Origin, Vec<u8>), BadInput> {
    // Not trimmed: the rest of a truncated line could be a number.
    let text = if bytes.len() > MAX_NUMBER_LINE {
        bytes
    } else {
        bytes.trim_ascii()
    };
    match parse_number(text) {
        Ok(n) => Ok((
            Origin::Number {
                n,
                line: Some(line),
            },
            n.to_string().into(),
        )),
        Err(problem) => Err(BadInput::NotANumber {
            line,
            text: escape(text).to_string(),
            problem,
        }),
    }
}

/// The request of a line of `--lines`.
pub(crate) fn request_line(line: u64, bytes: Vec<u8>) -> Result<(Origin, Vec<u8>), BadInput> {
    if bytes.len() > MAX_SIZE {
        return Err(BadInput::LineTooLarge(line));
    }
    Ok((Origin::Line(line), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: &[u8]) -> Vec<Result<u64, BadInput>> {
        let lines = read_lines(input, MAX_NUMBER_LINE).map(Result::unwrap);
        let numbers = (1..)
            .zip(lines)
            .map(|(line, bytes)| match number_line(line, &bytes)?.0 {
                Origin::Number { n, .. } => Ok(n),
                origin => panic!("{origin:?}"),
            });
        numbers.collect()
    }

    fn bad_line(line: u64, text: &str) -> Result<u64, BadInput> {
        Err(BadInput::NotANumber {
            line,
            text: text.into(),
            problem: NumberError::Malformed,
        })
    }

    #[test]
    fn data_is_any_bytes_or_names_where_to_read_them() {
        for (text, data) in [
            ("", Data::Bytes(Vec::new())),
            ("-x", Data::Bytes(b"-x".into())),
            ("a@b", Data::Bytes(b"a@b".into())),
            ("@-", Data::Source(Source::StandardInput)),
            ("@-x", Data::Source(Source::File("-x".into()))),
        ] {
            assert_eq!(Data::from(OsString::from(text)), data);
        }
        assert_eq!(
            Data::from(OsString::from_vec(vec![0xff])),
            Data::Bytes(vec![0xff])
        );
    }

    #[test]
    fn only_the_newline_is_cut_from_a_line_and_an_overlong_one_is_told_by_its_length() {
        let lines: Vec<_> = read_lines(&b"a \r\n\n\xff\0\n12345\n1234567\nz"[..], 4)
            .map(Result::unwrap)
            .collect();
        assert_eq!(
            lines,
            [&b"a \r"[..], b"", b"\xff\0", b"12345", b"12345", b"z"]
        );
    }

    #[test]
    fn lines_are_trimmed_and_an_empty_line_is_a_bad_one() {
        let expected = [Ok(7), Ok(8), bad_line(3, ""), bad_line(4, "abc"), Ok(9)];
        assert_eq!(read(b"7\n 8\t\r\n\nabc\n9"), expected);
    }

    #[test]
    fn an_overlong_line_is_one_bad_line() {
        for (blanks, is_bad) in [(1023, false), (1024, true), (100_000, true)] {
            let input = [&vec![b' '; blanks][..], b"7\n8\n"].concat();
            let numbers = read(&input);
            assert_eq!(numbers[0].is_err(), is_bad, "{blanks} blanks");
            assert_eq!(numbers[1..], [Ok(8)]);
        }
        let cut = [&[b' '; 1024][..], b"77\n"].concat();
        assert!(read(&cut)[0].is_err(), "77 is not cut to 7");
    }
}
