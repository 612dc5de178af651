//! One call, without the threads of a [`batch`](crate::batch): each thread would cost about 0.1 ms
//! and 0.1 MiB.

use crate::cli::Cli;
use crate::input::{Argument, Input, Origin};
use crate::output::Layout;
use crate::printer::Printer;
use crate::progress::Progress;
use crate::reader;
use crate::record_writer::RecordWriter;
use crate::signals::DefaultAction;
use crate::source::Unreadable;
use rpc_client::{request_channel, Request};
use rpc_common::connection::Endpoint;
use rpc_common::exit::ExitCode;
use rpc_common::stdio;
use std::io;

/// The request of a command line that asks for one call. `None` if it asks for several.
pub(crate) fn request(cli: &Cli) -> Result<Option<Request<Input>>, Unreadable> {
    let with_origin = |origin, body| {
        let context = Input { index: 0, origin };
        Some(Request { context, body })
    };
    let input = &cli.input;
    Ok(match (&input.numbers[..], &input.data[..], cli.repeat) {
        (&[Argument::Number(n)], _, 1) => {
            with_origin(Origin::Number { n, line: None }, n.to_string().into())
        }
        (_, [data], 1) => with_origin(Origin::SingleData, data.read()?),
        _ => None,
    })
}

/// Makes the call and prints its answer. Returns the call's exit code.
pub(crate) fn make_call(
    cli: &Cli,
    endpoints: Vec<Endpoint>,
    request: Request<Input>,
    default_action: DefaultAction,
) -> io::Result<ExitCode> {
    let (request_sender, requests) = request_channel(None);
    let output = RecordWriter::new(stdio::stdout(), Some(default_action));
    let progress = Progress::of_single_call(cli);
    let mut printer = Printer::new(output, cli.output.clone(), Layout::Single, progress);
    if cli.output.announces() {
        reader::announce("", request.context.origin);
    }
    request_sender.send(request);
    drop(request_sender);
    let mut result = Ok(());
    // `run` gives its error to the printer as the outcome of the call, too. An answer is printed
    // before the connection is closed.
    let _ = rpc_client::run(&cli.config, endpoints, &requests, &mut |outcomes| {
        let outcome = printer.print_outcomes(outcomes);
        result = outcome.and_then(|()| printer.flush());
    });
    result.and_then(|()| printer.finish())
}
