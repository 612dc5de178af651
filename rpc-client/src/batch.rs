//! A batch: many calls at once, with input and output in a fixed order.
//!
//! Three loops run at the same time, each on a thread of its own, and share nothing but channels. (A single call does
//! without these threads.)
//!
//! - the [`reader`] reads numbers and sends a request for each of them to the calls;
//! - the calls ([`rpc_client::run`]) send every outcome to the printer;
//! - the [`Printer`] prints the lines in order, and now and then sends a permit to the reader.

use crate::cli::Cli;
use crate::error::Error;
use crate::printer::{Event, Printer};
use crate::reader;
use crossbeam_channel::bounded;
use rpc_client::Error as CallError;
use rpc_common::exit::ExitCode;
use std::io::{self, BufWriter};
use std::sync::mpsc;
use std::thread;

/// How many lines a **permit** allows to be read, in multiples of the calls in flight: many, so that the reader is woken
/// rarely. The number of permits bounds the lines that wait behind a slow call.
const LINES_PER_PERMIT: u64 = 8;
const PERMITS: usize = 2;

/// Makes all calls and prints their answers. Returns the largest exit code of the calls.
pub(crate) fn run(cli: &Cli) -> Result<ExitCode, Error> {
    let endpoints = cli.config.broker.endpoints().map_err(CallError::from)?;
    let lines_per_permit = LINES_PER_PERMIT * u64::from(cli.config.in_flight);
    let (permits, reader_permits) = bounded(PERMITS);
    (0..PERMITS).try_for_each(|_| permits.send(())).expect("the channel has room for them");
    // Bounded by the permits. Not crossbeam's channel: its receiver yields the processor several times before it
    // sleeps, which took a third more CPU time here.
    let (events, printer_events) = mpsc::channel();
    let (stop, stopped) = bounded(0);
    let printer = Printer::new(BufWriter::new(io::stdout()), cli.output.clone(), permits, lines_per_permit);
    let print = move || {
        let _stop = stop; // dropped when the printer has ended; then the calls stop
        printer.run(&printer_events)
    };
    let requests = reader::start(cli, events.clone(), reader_permits, lines_per_permit);
    let make_calls = || {
        // An error of the run is the outcome of its calls, too.
        let _ = rpc_client::run(&cli.config, endpoints, &requests, &stopped, &mut |outcomes| {
            let _ = events.send(Event::Outcomes(outcomes)); // fails if the printer has ended
        });
        let _ = events.send(Event::RunEnded);
    };
    let result = if cli.is_single_call() {
        make_calls();
        print() // there is nothing to print before; a thread costs a call about 0.1 ms and 0.1 MiB
    } else {
        let printer = thread::spawn(print);
        make_calls();
        printer.join().expect("the printer does not panic")
    };
    result.map_err(Error::Output)
}
