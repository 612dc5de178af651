//! The reader: from the arguments and lines of the input to requests.

use crate::cli::{Cli, InputOptions};
use crate::input::{
    number_line, read_lines, request_line, Argument, BadInput, Input, Origin, MAX_NUMBER_LINE,
};
use crate::printer::Event;
use crate::source::Source;
use crossbeam_channel::Receiver;
use rpc_client::{Request, RequestSender, Requests};
use rpc_common::logging::start_of_line;
use rpc_common::options::MAX_SIZE;
use rpc_common::stdio;
use std::io::{self, BufRead, BufReader, Write};
use std::mem;
use std::sync::mpsc;
use std::thread;

/// The channel for the requests.
pub(crate) fn requests(cli: &Cli) -> (RequestSender<Input>, Requests<Input>) {
    // With a capacity, a request is announced not long before it is sent. Else the permits bound
    // the requests.
    let capacity = cli.output.announces().then(|| cli.config.in_flight.into());
    rpc_client::request_channel(capacity)
}

/// Starts to read the input on a thread of its own. Bad input goes to the printer directly.
///
/// # Errors
/// The system refuses a thread.
pub(crate) fn start(
    cli: &Cli,
    requests: RequestSender<Input>,
    events: mpsc::Sender<Event>,
    permits: Receiver<()>,
    requests_per_permit: u64,
) -> io::Result<()> {
    let announces = cli.output.announces();
    let input = cli.input.clone();
    let repeat = cli.repeat;
    let reader = Reader {
        requests,
        events,
        permits,
        requests_per_permit,
        announces,
        repeat,
        index: 0,
    };
    // Not joined: when the calls end early, it may still wait for input.
    thread::Builder::new().spawn(move || reader.read(&input, BufReader::new(stdio::stdin())))?;
    Ok(())
}

/// Prints the line of the tutorial after `start`, if the request is for fib(n).
pub(crate) fn announce(start: &str, origin: Origin) {
    if let Origin::Number { n, .. } = origin {
        // If it fails, the call is made all the same.
        let _ = writeln!(stdio::stderr(), "{start} [x] Requesting fib({n})");
    }
}

struct Reader {
    requests: RequestSender<Input>,
    events: mpsc::Sender<Event>,
    /// Each permit allows `requests_per_permit` requests to be read.
    permits: Receiver<()>,
    requests_per_permit: u64,
    /// Whether requests are announced on standard error.
    announces: bool,
    /// Number of times that each call is made.
    repeat: u64,
    /// The position of the next line of output.
    index: u64,
}

/// Makes a request of a line of input, with its number from 1.
type ParseLine = fn(u64, Vec<u8>) -> Result<(Origin, Vec<u8>), BadInput>;

impl Reader {
    /// Reads all of the input. None if the calls or the printer have ended before.
    fn read(mut self, input: &InputOptions, standard_input: impl BufRead) -> Option<()> {
        if let Some(source) = &input.lines {
            return self.read_request_lines(source);
        }
        for (position, data) in (1..).zip(&input.data) {
            self.send_or_report(
                data.read()
                    .map(|body| (Origin::Data(position), body))
                    .map_err(BadInput::from),
            )?;
        }
        self.read_numbers(&input.numbers, standard_input)
    }

    fn read_numbers(&mut self, arguments: &[Argument], standard_input: impl BufRead) -> Option<()> {
        let mut lines = (1..).zip(read_lines(standard_input, MAX_NUMBER_LINE));
        for argument in arguments {
            match argument {
                Argument::Number(n) => {
                    self.send(Origin::Number { n: *n, line: None }, n.to_string().into())?;
                }
                Argument::StandardInput => {
                    self.read_lines(&Source::StandardInput, &mut lines, |line, bytes| {
                        number_line(line, &bytes)
                    })?;
                }
            }
        }
        Some(())
    }

    fn read_request_lines(&mut self, source: &Source) -> Option<()> {
        match source.open() {
            Ok(input) => {
                self.read_lines(source, (1..).zip(read_lines(input, MAX_SIZE)), request_line)
            }
            Err(error) => self.events.send(Event::ReadError(error)).ok(),
        }
    }

    fn read_lines(
        &mut self,
        source: &Source,
        lines: impl Iterator<Item = (u64, io::Result<Vec<u8>>)>,
        parse: ParseLine,
    ) -> Option<()> {
        for (line, bytes) in lines {
            match bytes {
                Ok(bytes) => self.send_or_report(parse(line, bytes))?,
                Err(error) => {
                    return self
                        .events
                        .send(Event::ReadError(source.unreadable(&error)))
                        .ok()
                }
            }
        }
        Some(())
    }

    fn send_or_report(&mut self, request: Result<(Origin, Vec<u8>), BadInput>) -> Option<()> {
        match request {
            Ok((origin, body)) => self.send(origin, body),
            Err(bad_input) => self.report(&bad_input),
        }
    }

    fn send(&mut self, origin: Origin, mut body: Vec<u8>) -> Option<()> {
        for left in (0..self.repeat).rev() {
            let context = Input {
                index: self.next_index()?,
                origin,
            };
            if self.announces {
                announce(start_of_line(), origin);
            }
            let body = if left == 0 {
                mem::take(&mut body)
            } else {
                body.clone()
            };
            self.requests
                .send(Request { context, body })
                .then_some(())?;
        }
        Some(())
    }

    fn report(&mut self, bad_input: &BadInput) -> Option<()> {
        for _ in 0..self.repeat {
            let index = self.next_index()?;
            self.events
                .send(Event::BadInput(index, bad_input.clone()))
                .ok()?;
        }
        Some(())
    }

    /// The position of the next line of output, once a permit allows it.
    fn next_index(&mut self) -> Option<u64> {
        let index = self.index;
        if index.is_multiple_of(self.requests_per_permit) {
            self.permits.recv().ok()?;
        }
        self.index += 1;
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::iter;
    use Argument::{Number, StandardInput};

    /// Reads with `permits` for two lines each. Returns the inputs of the requests, and the other
    /// events.
    fn read(
        arguments: &[Argument],
        input: impl BufRead,
        repeat: u64,
        permits: usize,
    ) -> (Vec<Input>, Vec<Event>) {
        let options = InputOptions {
            numbers: arguments.into(),
            ..InputOptions::default()
        };
        let (requests, taken_requests) = rpc_client::request_channel(None);
        let (events, printer_events) = mpsc::channel();
        let permits = {
            let (sender, receiver) = crossbeam_channel::bounded(permits);
            (0..permits).for_each(|_| sender.send(()).unwrap());
            receiver // without its sender, the reader does not wait for further permits
        };
        let requests_per_permit = 2;
        let announces = false;
        let index = 0;
        let reader = Reader {
            requests,
            events,
            permits,
            requests_per_permit,
            announces,
            repeat,
            index,
        };
        reader.read(&options, input);
        let inputs = iter::from_fn(|| taken_requests.try_take())
            .map(|request| request.context)
            .collect();
        (inputs, printer_events.iter().collect())
    }

    fn input(index: u64, n: u64, line: impl Into<Option<u64>>) -> Input {
        Input {
            index,
            origin: Origin::Number {
                n,
                line: line.into(),
            },
        }
    }

    #[test]
    fn arguments_and_lines_keep_their_order() {
        let arguments = [Number(1), StandardInput, Number(4)];
        let (inputs, events) = read(&arguments, &b"2\nx\n3\n"[..], 1, 9);
        let expected = [
            input(0, 1, None),
            input(1, 2, 1),
            input(3, 3, 3),
            input(4, 4, None),
        ];
        assert_eq!(inputs, expected);
        assert!(matches!(
            &events[..],
            [Event::BadInput(2, BadInput::NotANumber { line: 2, .. })]
        ));
    }

    #[test]
    fn every_number_and_bad_line_is_repeated() {
        let (inputs, events) = read(&[StandardInput], &b"7\nx\n"[..], 2, 9);
        assert_eq!(inputs, [input(0, 7, 1), input(1, 7, 1)]);
        assert!(matches!(
            &events[..],
            [Event::BadInput(2, _), Event::BadInput(3, _)]
        ));
    }

    #[test]
    fn nothing_is_read_without_a_permit() {
        let numbers = [1, 2, 3, 4, 5, 6].map(Number);
        for (permits, count) in [(0, 0), (1, 2), (2, 4), (3, 6)] {
            assert_eq!(read(&numbers, io::empty(), 1, permits).0.len(), count);
            assert_eq!(
                read(&numbers[..1], io::empty(), 6, permits).0.len(),
                count,
                "repeated"
            );
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
