//! What is asked: the numbers of the command line, and the lines of standard input for `-`.

use rpc_common::message::{escape, parse_number, NumberError};
use std::collections::VecDeque;
use std::io::{self, BufRead};
use std::str::FromStr;

/// An argument of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A number n of fib(n).
    Number(u64),
    /// `-`: standard input, a number per line.
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

/// What a line of output stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A number n of fib(n), and its line of standard input, if it stands there.
    Number(u64, Option<u64>),
    /// A line of standard input that is none.
    Bad(BadLine),
}

/// A line of standard input that is no number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: '{input}' is {reason}")]
pub struct BadLine {
    /// Its number, from 1.
    pub line: u64,
    /// What stands there, fit to be printed.
    pub input: String,
    /// What is wrong with it.
    pub reason: NumberError,
}

/// The most bytes that a line of input may have, without its end.
const LONGEST_LINE: u64 = 1024;

/// All that is asked, in order. Standard input is read only as far as it is asked for.
pub(crate) struct Items<R> {
    arguments: VecDeque<Argument>,
    input: R,
    line: u64,
}

impl<R: BufRead> Items<R> {
    pub(crate) fn new(arguments: Vec<Argument>, input: R) -> Self {
        Items { arguments: arguments.into(), input, line: 0 }
    }
}

impl<R: BufRead> Iterator for Items<R> {
    type Item = io::Result<Item>;

    fn next(&mut self) -> Option<io::Result<Item>> {
        loop {
            if let Argument::Number(n) = *self.arguments.front()? {
                self.arguments.pop_front();
                return Some(Ok(Item::Number(n, None)));
            }
            match next_line(&mut self.input).transpose() {
                Some(Ok(text)) => {
                    self.line += 1;
                    return Some(Ok(item(self.line, &text)));
                }
                end => {
                    self.arguments.pop_front();
                    if let Some(Err(error)) = end {
                        return Some(Err(error));
                    }
                }
            }
        }
    }
}

fn item(line: u64, text: &[u8]) -> Item {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r');
    let start = text.iter().position(|byte| !blank(byte)).unwrap_or(text.len());
    let end = text.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    let text = &text[start..end];
    match parse_number(text) {
        Ok(n) => Item::Number(n, Some(line)),
        Err(reason) => Item::Bad(BadLine { line, input: escape(text).to_string(), reason }),
    }
}

/// The next line without its end, or as much of it as tells that it is too long; None at the end.
fn next_line(input: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    if io::Read::take(&mut *input, LONGEST_LINE + 1).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if line.len() as u64 > LONGEST_LINE {
        input.skip_until(b'\n')?;
    }
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Argument::{Number, StandardInput};

    fn read(arguments: &[Argument], input: &[u8]) -> Vec<Item> {
        Items::new(arguments.to_vec(), input).map(Result::unwrap).collect()
    }

    fn number(n: u64, line: u64) -> Item {
        Item::Number(n, Some(line))
    }

    fn bad(line: u64, input: &str) -> Item {
        Item::Bad(BadLine { line, input: input.into(), reason: NumberError::Malformed })
    }

    #[test]
    fn lines_are_trimmed_and_an_empty_one_is_wrong() {
        let items = read(&[StandardInput], b"7\n 8\t\r\n\nabc\n9");
        let expected = [number(7, 1), number(8, 2), bad(3, ""), bad(4, "abc"), number(9, 5)];
        assert_eq!(items, expected);
    }

    #[test]
    fn an_overlong_line_is_one_wrong_line() {
        let mut input = vec![b'1'; 100_000];
        input.extend(b"\n8\n");
        assert_eq!(read(&[StandardInput], &input)[1], number(8, 2));
        let mut longest = vec![b' '; 1023];
        longest.extend(b"7\n8");
        assert_eq!(read(&[StandardInput], &longest), [number(7, 1), number(8, 2)]);
    }

    #[test]
    fn input_and_arguments_keep_their_order() {
        let items = read(&[Number(1), StandardInput, Number(4)], b"2\n3\n");
        let expected = [Item::Number(1, None), number(2, 1), number(3, 2), Item::Number(4, None)];
        assert_eq!(items, expected);
    }

    #[test]
    fn input_is_not_read_before_it_is_asked_for() {
        let closed = io::BufReader::new(Unreadable);
        let mut items = Items::new(vec![Number(1), StandardInput], closed);
        assert_eq!(items.next().unwrap().unwrap(), Item::Number(1, None));
        assert!(items.next().unwrap().is_err());
        assert!(items.next().is_none());
    }

    struct Unreadable;

    impl io::Read for Unreadable {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::Other.into())
        }
    }
}
