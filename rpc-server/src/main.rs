//! Serves fib(n) over RabbitMQ RPC.

mod cli;

use cli::Cli;
use log::LevelFilter;
use rpc_common::background_writer::BackgroundWriter;
use rpc_common::connection::Error;
use rpc_common::exit::{print_message, ExitCode};
use rpc_common::{logging, options};
use rpc_server::{fib_handler, serve, stop_signal};
use std::{io, process};

fn main() -> process::ExitCode {
    let cli: Cli = match options::parse_args() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    cli.log.start_for_operator(LevelFilter::Info);
    logging::log_panics();
    let stdout = BackgroundWriter::start(io::stdout());
    let result = run(&cli, &stdout);
    stdout.flush();
    logging::flush();
    match result {
        Ok(()) => ExitCode::Success.into(),
        Err(error) => {
            print_message("rpc-server", &error);
            ExitCode::from(&error).into()
        }
    }
}

fn run(cli: &Cli, stdout: &BackgroundWriter) -> Result<(), Error> {
    let stop = stop_signal().expect("the system provides signal handlers and a thread");
    let fib = fib_handler(cli.max_n, cli.delay, |n| {
        if !cli.quiet {
            stdout.write_line(format!(" [.] fib({n})"));
        }
    });
    serve(&cli.config, &fib, &stop, &|| stdout.write_line(" [x] Awaiting RPC requests".into()))
}
