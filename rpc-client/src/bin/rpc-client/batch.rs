//! Many calls at once, with their input and output in order.
//!
//! Three loops, each on a thread of its own, share channels and the printer:
//!
//! - the [`reader`] reads the input and sends its requests to the calls;
//! - the calls ([`rpc_client::run`]) give every outcome to the printer;
//! - the [`Printer`] prints the lines in order, and now and then sends a permit to the reader. What
//!   does not block is printed on the thread of the calls.

use crate::cli::Cli;
use crate::error::Error;
use crate::output::Layout;
use crate::printer::{Event, Permits, Printer, SharedPrinter};
use crate::progress::Progress;
use crate::reader;
use crate::record_writer::RecordWriter;
use crate::signals::DefaultAction;
use crossbeam_channel::bounded;
use rpc_client::Stopper;
use rpc_common::connection::Endpoint;
use rpc_common::exit::ExitCode;
use rpc_common::stdio;
use std::sync::{mpsc, Arc};
use std::thread;

/// Read-ahead of numbers per **permit**, in units of `--in-flight`: many, so that the reader is
/// woken rarely. (Other requests, and their replies, may be large: a permit allows `--in-flight` of
/// them.)
const NUMBERS_PER_CALL: u64 = 8;

/// Minimum read-ahead of numbers per permit.
const MIN_NUMBERS: u64 = 512;

/// Number of permits: bounds the requests that wait behind a slow call.
const PERMITS: usize = 2;

/// Makes the calls of many requests and prints their answers. Returns the largest exit code of the
/// calls.
///
/// # Errors
/// The answers cannot be written, or the system refuses a thread.
pub(crate) fn make_calls(
    cli: &Cli,
    endpoints: Vec<Endpoint>,
    default_action: DefaultAction,
) -> Result<ExitCode, Error> {
    let in_flight = u64::from(cli.config.in_flight);
    let are_numbers = !cli.input.numbers.is_empty();
    let requests_per_permit = if are_numbers {
        MIN_NUMBERS.max(NUMBERS_PER_CALL * in_flight)
    } else {
        in_flight
    };
    let (permit_sender, permits) = bounded(PERMITS);
    (0..PERMITS)
        .try_for_each(|_| permit_sender.send(()))
        .expect("the channel has room for them");
    // Bounded by the permits. Not crossbeam's channel: its receiver yields the processor several
    // times before it sleeps, which took a third more CPU time here.
    let (event_sender, events) = mpsc::channel();
    let (request_sender, requests) = reader::requests(cli);
    let default_action = if cli.output.summary.is_some() {
        // The printer prints the summary of what was done, and ends the program.
        let events = event_sender.clone();
        default_action
            .precede(move |signal| drop(events.send(Event::Interrupted(signal))))
            .map_err(Error::NoThread)?;
        None
    } else {
        Some(default_action)
    };
    let output = RecordWriter::new(stdio::stdout(), default_action);
    let progress = Progress::of_batch(cli);
    let printer = Printer::new(output, cli.output.clone(), Layout::Batch, progress);
    let permits_for_reader = Permits::new(permit_sender, requests_per_permit);
    let printer = Arc::new(SharedPrinter::new(printer, permits_for_reader));
    let stop = StopOnDrop(requests.stopper());
    let shared = printer.clone();
    let print_all = move || {
        let _stop = stop; // when the printer has ended, the calls end
        shared.print_all(&events)
    };
    let printing = thread::Builder::new().spawn(print_all);
    let printing = printing.map_err(Error::NoThread)?;
    reader::start(
        cli,
        request_sender,
        event_sender.clone(),
        permits,
        requests_per_permit,
    )
    .map_err(Error::NoThread)?;
    // An error of the run is the outcome of its calls, too.
    let _ = rpc_client::run(&cli.config, endpoints, &requests, &mut |outcomes| {
        printer.print(outcomes, &event_sender);
    });
    let _ = event_sender.send(Event::RunEnded);
    let result = printing.join().expect("the printer does not panic");
    result.map_err(Error::Output)
}

/// Stops the calls when it is dropped.
struct StopOnDrop(Stopper);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}
