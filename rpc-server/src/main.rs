//! Serves fib(n) over RabbitMQ RPC.

mod cli;

use cli::Cli;
use log::LevelFilter;
use rpc_common::connection::Error;
use rpc_common::exit::{print_message, ExitCode};
use rpc_common::{logging, options};
use rpc_server::{fib_handler, serve, stop_signal};
use std::fmt::Display;
use std::io::{self, Write};
use std::process;

fn main() -> process::ExitCode {
    let cli: Cli = match options::parse_args() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    cli.log.start_for_operator(LevelFilter::Info);
    logging::log_panics();
    let code = match run(&cli) {
        Ok(()) => ExitCode::Success,
        Err(error) => {
            print_message("rpc-server", &error);
            ExitCode::from(&error)
        }
    };
    logging::flush();
    code.into()
}

fn run(cli: &Cli) -> Result<(), Error> {
    let stop = stop_signal().expect("the system provides signal handlers and a thread");
    let fib = fib_handler(cli.max_n, cli.delay, |n| {
        if !cli.quiet {
            print(format_args!(" [.] fib({n})"));
        }
    });
    serve(&cli.config, &fib, &stop, &|| print(" [x] Awaiting RPC requests"))
}

/// Prints a line. A reader of standard output that went away does not stop the server.
fn print(line: impl Display) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        log::debug!("cannot write to standard output: {error}");
    }
}
