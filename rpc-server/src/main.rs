//! Serves fib(n) over RabbitMQ RPC. Everything but the edges is in the library.

use log::LevelFilter;
use rpc_common::exit::{self, Exit, ExitCode};
use rpc_common::{broker, logging};
use rpc_server::cli::Cli;
use rpc_server::{handler, serve, signals};
use std::fmt::Display;
use std::io::{self, Write};
use std::process;

fn main() -> process::ExitCode {
    let cli: Cli = match exit::parse_args() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    cli.log.start_for_operator(LevelFilter::Info);
    logging::log_panics();
    let code = match run(&cli) {
        Ok(()) => ExitCode::Success,
        Err(error) => {
            exit::complain("rpc-server", &error);
            error.exit_code()
        }
    };
    code.into()
}

fn run(cli: &Cli) -> Result<(), broker::Error> {
    let config = cli.config()?;
    let stop = signals::stop().expect("the system lets us handle signals");
    let fib = handler::fib_handler(cli.max_n, cli.delay, |n| {
        if !cli.quiet {
            say(format_args!(" [.] fib({n})"));
        }
    });
    serve(&config, &fib, &stop, &|| say(" [x] Awaiting RPC requests"))
}

/// Prints a line of the conversation. That nobody reads it is no reason to stop serving.
fn say(line: impl Display) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        log::debug!("cannot write to standard output: {error}");
    }
}
