//! A batch of numbers: feeds them to the client, and its outcomes to the printer.

use crate::client::{Client, Config, Error, Request};
use crate::input::{Argument, Item, Items};
use crate::output::{Format, Line, Printer};
use crossbeam_channel::{bounded, unbounded, Sender};
use rpc_common::exit::{complain, ExitCode};
use rpc_common::message::parse_number;
use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// What to ask, and how to print the answers.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The numbers n of fib(n), and where they stand.
    pub arguments: Vec<Argument>,
    /// How often each number is asked for.
    pub repeat: u64,
    /// The form of the answers.
    pub format: Format,
    /// Answers as they come, not in the order asked.
    pub unordered: bool,
    /// Whether to summarise the batch on standard error.
    pub summary: Option<SummaryFormat>,
    /// Nothing on standard error but errors.
    pub quiet: bool,
}

/// The form of the summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SummaryFormat {
    /// A line for people.
    Text,
    /// A line of JSON.
    Json,
}

/// How far the input is read ahead of what is printed, in multiples of the calls in flight: what waits for
/// its turn behind a slow call is bounded by this. Read on is when half of that is printed, so that the
/// feeder is not woken up for each call.
const READ_AHEAD: u64 = 16;

/// Asks for every number of the batch and prints the answers to `output`. Returns the largest exit code
/// of the calls.
///
/// # Errors
/// [`Error::Output`] when `output` fails.
pub fn run(
    batch: &Batch,
    config: Config,
    input: impl BufRead + Send + 'static,
    output: impl Write + Send + 'static,
) -> Result<ExitCode, Error> {
    let printer = Printer::new(output, batch.format, batch.unordered);
    let desk = Arc::new(Desk {
        state: Mutex::new(State { printer, lines: HashMap::new(), awaited: None, broken: None }),
        turn: Condvar::new(),
    });
    let announce = batch.format == Format::Text && !batch.quiet;
    let (requests, taken) = if announce {
        bounded(config.in_flight.get()) // so that a request is announced not long before it is sent
    } else {
        unbounded() // the feeder does not run far ahead
    };
    let feeder = Feeder {
        desk: desk.clone(),
        requests,
        repeat: batch.repeat,
        announce,
        read_ahead: READ_AHEAD * config.in_flight.get() as u64,
        printed: 0,
    };
    let items = Items::new(batch.arguments.clone(), input);
    // Not joined: where the run ends before its input does, that may never end.
    thread::spawn(move || feeder.feed(items));

    let ended = Client::new(config).run(&taken, &mut |outcomes| {
        let mut state = desk.state();
        for outcome in outcomes {
            let n = parse_number(&outcome.request.body).unwrap_or_default(); // the feeder wrote it
            let place = outcome.request.tag;
            let line = state.lines.remove(&place);
            state.printer.put(place, Line::of_call(n, line, outcome))?;
        }
        let done = state.printer.printed();
        if state.awaited.take_if(|awaited| *awaited <= done).is_some() {
            desk.turn.notify_one();
        }
        state.printer.flush()
    });
    let mut state = desk.state();
    let ended = match state.broken.take() {
        Some(error) => Err(Error::Output(error)),
        None => ended,
    };
    match ended {
        Ok(()) | Err(Error::Broker(_) | Error::Unheard(_)) => {
            state.printer.finish().map_err(Error::Output)?;
        }
        Err(error) => return Err(error),
    }
    let figures = state.printer.summary().figures();
    match batch.summary {
        None => {}
        Some(SummaryFormat::Text) => complain("rpc-client", &figures),
        Some(SummaryFormat::Json) => {
            let json = serde_json::to_string(&figures).unwrap_or_default(); // plain numbers and text
            let _ = writeln!(io::stderr(), "{json}"); // nobody has to read it
        }
    }
    Ok(state.printer.code())
}

/// Where the feeder and the client meet at the printer.
struct Desk<W> {
    state: Mutex<State<W>>,
    /// The line that the feeder waits for is printed.
    turn: Condvar,
}

struct State<W> {
    printer: Printer<W>,
    /// The lines of standard input that the calls in hand come from, by their places.
    lines: HashMap<u64, u64>,
    /// How many lines have to be printed before the feeder goes on, if it waits.
    awaited: Option<u64>,
    /// Why the feeder could not print.
    broken: Option<io::Error>,
}

impl<W: Write> Desk<W> {
    fn state(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many lines are printed, and returns how many are.
    fn await_turn(&self, place: u64) -> u64 {
        let mut state = self.state();
        state.awaited = Some(place);
        let is_early = |state: &mut State<W>| state.printer.printed() < place;
        let state = self.turn.wait_while(state, is_early).unwrap_or_else(PoisonError::into_inner);
        state.printer.printed()
    }
}

/// The **feeder** reads the input, sends numbers to the client, and prints what is wrong itself.
struct Feeder<W> {
    desk: Arc<Desk<W>>,
    requests: Sender<Request>,
    repeat: u64,
    announce: bool,
    read_ahead: u64,
    /// How many lines were printed when it last looked.
    printed: u64,
}

impl<W: Write> Feeder<W> {
    fn feed(mut self, items: impl Iterator<Item = io::Result<Item>>) {
        let mut place = 0;
        for item in items {
            match item {
                Ok(item) => {
                    for _ in 0..self.repeat {
                        if self.feed_one(place, &item).is_none() {
                            return;
                        }
                        place += 1;
                    }
                }
                Err(error) => {
                    let error = Error::Input(error);
                    self.desk.state().printer.fail(&error, &error);
                }
            }
        }
    }

    /// None when nobody wants any more.
    fn feed_one(&mut self, place: u64, item: &Item) -> Option<()> {
        if place - self.printed >= self.read_ahead {
            self.printed = self.desk.await_turn(place - self.read_ahead / 2);
        }
        match item {
            Item::Number(n, line) => {
                if let Some(line) = line {
                    self.desk.state().lines.insert(place, *line);
                }
                if self.announce {
                    let _ = writeln!(io::stderr(), " [x] Requesting fib({n})"); // nobody has to read it
                }
                self.requests.send(Request { tag: place, body: n.to_string().into() }).ok()
            }
            Item::Bad(bad) => {
                let mut state = self.desk.state();
                let line = Line::of_bad_line(bad.clone());
                let printed = state.printer.put(place, line).and_then(|()| state.printer.flush());
                state.broken = printed.err();
                state.broken.is_none().then_some(())
            }
        }
    }
}
