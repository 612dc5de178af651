//! Serves fib(n) over RabbitMQ RPC.

mod cli;
mod printer;

use cli::Cli;
use log::LevelFilter;
use printer::Printer;
use rpc_common::connection::Error;
use rpc_common::exit::{print_message, ExitCode};
use rpc_common::{logging, options};
use rpc_server::{fib_handler, serve, stop_signal};
use std::process;

fn main() -> process::ExitCode {
    let cli: Cli = match options::parse_args() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    cli.log.start_for_operator(LevelFilter::Info);
    logging::log_panics();
    let printer = Printer::start();
    let code = match run(&cli, &printer) {
        Ok(()) => ExitCode::Success,
        Err(error) => {
            print_message("rpc-server", &error);
            ExitCode::from(&error)
        }
    };
    printer.finish();
    logging::flush();
    code.into()
}

fn run(cli: &Cli, printer: &Printer) -> Result<(), Error> {
    let stop = stop_signal().expect("the system provides signal handlers and a thread");
    let fib = fib_handler(cli.max_n, cli.delay, |n| {
        if !cli.quiet {
            printer.print(format!(" [.] fib({n})"));
        }
    });
    serve(&cli.config, &fib, &stop, &|| printer.print(" [x] Awaiting RPC requests".into()))
}
