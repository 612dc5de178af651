//! The input: the numbers of the command line, and the lines of standard input for `-`.

use rpc_client::Request;
use rpc_common::message::{parse_number, NumberError};
use rpc_common::text::escape;
use std::io::{self, BufRead, Read};
use std::iter;
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
    type Err = NumberError;

    fn from_str(text: &str) -> Result<Self, NumberError> {
        match text {
            "-" => Ok(Argument::StandardInput),
            _ => parse_number(text.as_bytes()).map(Argument::Number),
        }
    }
}

/// What a call was made for; its request carries this to its line of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Input {
    /// The position of the line of output, from 0.
    pub(crate) index: u64,
    /// The number n of fib(n).
    pub(crate) n: u64,
    /// The line of standard input that n comes from, if it comes from there.
    pub(crate) line: Option<u64>,
}

/// The request for fib(n).
impl From<Input> for Request<Input> {
    fn from(input: Input) -> Self {
        Request { context: input, body: input.n.to_string().into() }
    }
}

/// A line of standard input that is not a number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: '{text}' is {problem}")]
pub(crate) struct BadLine {
    /// The line number, from 1.
    pub(crate) line: u64,
    /// The line, trimmed and escaped.
    pub(crate) text: String,
    pub(crate) problem: NumberError,
}

/// The maximum length of an input line in bytes, without its end.
const MAX_LINE_LEN: usize = 1024;

/// The lines of standard input; each is read when it is taken.
pub(crate) fn read_lines(mut input: impl BufRead) -> impl Iterator<Item = io::Result<Vec<u8>>> {
    iter::from_fn(move || read_line(&mut input).transpose())
}

/// Reads a line without its end; None at the end of the input. An overlong line is cut to one byte more than the
/// maximum.
fn read_line(input: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    if input.by_ref().take(MAX_LINE_LEN as u64 + 1).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if line.len() > MAX_LINE_LEN {
        input.skip_until(b'\n')?;
    }
    Ok(Some(line))
}

/// The number n of a line; blanks around it are allowed.
pub(crate) fn parse_line(line: u64, bytes: &[u8]) -> Result<u64, BadLine> {
    // An overlong line was cut: trimmed, the rest could look like a number.
    let text = if bytes.len() > MAX_LINE_LEN { bytes } else { bytes.trim_ascii() };
    parse_number(text).map_err(|problem| BadLine { line, text: escape(text).to_string(), problem })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: &[u8]) -> Vec<Result<u64, BadLine>> {
        let lines = read_lines(input).map(Result::unwrap);
        (1..).zip(lines).map(|(line, bytes)| parse_line(line, &bytes)).collect()
    }

    fn bad_line(line: u64, text: &str) -> Result<u64, BadLine> {
        Err(BadLine { line, text: text.into(), problem: NumberError::Malformed })
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
