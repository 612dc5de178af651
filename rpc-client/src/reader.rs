//! The reader: from the arguments and lines of the input to requests.

use crate::cli::Cli;
use crate::input::{parse_line, read_lines, Argument, BadLine, Input};
use crate::printer::Event;
use crossbeam_channel::{bounded, unbounded, Receiver, Sender};
use rpc_client::Request;
use std::io::{self, BufRead, BufReader, Write};
use std::sync::mpsc;
use std::thread;

/// Starts to read the input on a thread of its own, and returns the requests. Bad lines go to the printer directly.
pub(crate) fn start(
    cli: &Cli,
    events: mpsc::Sender<Event>,
    permits: Receiver<()>,
    lines_per_permit: u64,
) -> Receiver<Request<Input>> {
    let announces = cli.output.announces();
    let (request_sender, requests) = if announces {
        bounded(cli.config.in_flight.into()) // so that a request is announced not long before it is sent
    } else {
        unbounded() // bounded by the permits
    };
    let (arguments, repeat) = (cli.arguments.clone(), cli.repeat);
    let reader = Reader { requests: request_sender, events, permits, lines_per_permit, announces, repeat, index: 0 };
    // Not joined: when the calls end early, it may still wait for input.
    thread::spawn(move || reader.read(&arguments, BufReader::new(io::stdin())));
    requests
}

/// Prints the line of the tutorial.
pub(crate) fn announce(n: u64) {
    let _ = writeln!(io::stderr(), " [x] Requesting fib({n})"); // if it cannot be printed, the call is made all the same
}

struct Reader {
    requests: Sender<Request<Input>>,
    events: mpsc::Sender<Event>,
    /// Each permit allows `lines_per_permit` lines to be read.
    permits: Receiver<()>,
    lines_per_permit: u64,
    /// Whether requests are announced on standard error.
    announces: bool,
    /// How often each number is asked for.
    repeat: u64,
    /// The position of the next line of output.
    index: u64,
}

impl Reader {
    /// Reads all arguments. None if the calls or the printer have ended before.
    fn read(mut self, arguments: &[Argument], standard_input: impl BufRead) -> Option<()> {
        let mut lines = (1..).zip(read_lines(standard_input));
        for argument in arguments {
            match argument {
                Argument::Number(n) => self.send_number(*n, None)?,
                Argument::StandardInput => self.read_lines(&mut lines)?,
            }
        }
        Some(())
    }

    fn read_lines(&mut self, lines: &mut impl Iterator<Item = (u64, io::Result<Vec<u8>>)>) -> Option<()> {
        for (line, bytes) in lines {
            match bytes.map(|bytes| parse_line(line, &bytes)) {
                Ok(Ok(n)) => self.send_number(n, Some(line))?,
                Ok(Err(bad_line)) => self.send_bad_line(&bad_line)?,
                Err(error) => return self.events.send(Event::ReadError(error)).ok(),
            }
        }
        Some(())
    }

    fn send_number(&mut self, n: u64, line: Option<u64>) -> Option<()> {
        for _ in 0..self.repeat {
            let context = Input { index: self.next_index()?, n, line };
            if self.announces {
                announce(n);
            }
            self.requests.send(context.into()).ok()?;
        }
        Some(())
    }

    fn send_bad_line(&mut self, bad_line: &BadLine) -> Option<()> {
        for _ in 0..self.repeat {
            let index = self.next_index()?;
            self.events.send(Event::BadLine(index, bad_line.clone())).ok()?;
        }
        Some(())
    }

    /// The position of the next line of output, once a permit allows it.
    fn next_index(&mut self) -> Option<u64> {
        let index = self.index;
        if index.is_multiple_of(self.lines_per_permit) {
            self.permits.recv().ok()?;
        }
        self.index += 1;
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Argument::{Number, StandardInput};

    /// Reads with `permits` for two lines each. Returns the inputs of the requests, and the other events.
    fn read(arguments: &[Argument], input: impl BufRead, repeat: u64, permits: usize) -> (Vec<Input>, Vec<Event>) {
        let (requests, taken_requests) = unbounded();
        let (events, printer_events) = mpsc::channel();
        let permits = {
            let (sender, receiver) = bounded(permits);
            (0..permits).for_each(|_| sender.send(()).unwrap());
            receiver // without its sender, the reader does not wait for further permits
        };
        let (lines_per_permit, announces, index) = (2, false, 0);
        let reader = Reader { requests, events, permits, lines_per_permit, announces, repeat, index };
        reader.read(arguments, input);
        (taken_requests.iter().map(|request| request.context).collect(), printer_events.iter().collect())
    }

    fn input(index: u64, n: u64, line: impl Into<Option<u64>>) -> Input {
        Input { index, n, line: line.into() }
    }

    #[test]
    fn arguments_and_lines_keep_their_order() {
        let arguments = [Number(1), StandardInput, Number(4)];
        let (inputs, events) = read(&arguments, &b"2\nx\n3\n"[..], 1, 9);
        let expected = [input(0, 1, None), input(1, 2, 1), input(3, 3, 3), input(4, 4, None)];
        assert_eq!(inputs, expected);
        assert!(matches!(&events[..], [Event::BadLine(2, BadLine { line: 2, .. })]));
    }

    #[test]
    fn every_number_and_bad_line_is_repeated() {
        let (inputs, events) = read(&[StandardInput], &b"7\nx\n"[..], 2, 9);
        assert_eq!(inputs, [input(0, 7, 1), input(1, 7, 1)]);
        assert!(matches!(&events[..], [Event::BadLine(2, _), Event::BadLine(3, _)]));
    }

    #[test]
    fn nothing_is_read_without_a_permit() {
        let numbers = [1, 2, 3, 4, 5, 6].map(Number);
        for (permits, count) in [(0, 0), (1, 2), (2, 4), (3, 6)] {
            assert_eq!(read(&numbers, io::empty(), 1, permits).0.len(), count);
            assert_eq!(read(&numbers[..1], io::empty(), 6, permits).0.len(), count, "repeated");
        }
    }

    #[test]
    fn a_read_error_comes_in_its_turn_and_ends_standard_input() {
        let unreadable = BufReader::new(Unreadable);
        let (inputs, events) = read(&[Number(1), StandardInput, Number(2)], unreadable, 1, 9);
        assert_eq!(inputs, [input(0, 1, None), input(1, 2, None)]);
        assert!(matches!(&events[..], [Event::ReadError(_)]));
    }

    struct Unreadable;

    impl io::Read for Unreadable {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::Other.into())
        }
    }
}
