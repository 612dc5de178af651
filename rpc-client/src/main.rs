//! Calls fib(n) over RabbitMQ RPC. Everything but the edges is in the library.

use rpc_client::cli::Cli;
use rpc_client::{batch, Error};
use rpc_common::exit::{self, Exit, ExitCode};
use rpc_common::logging;
use std::io::{self, BufReader, BufWriter};
use std::process;

fn main() -> process::ExitCode {
    let cli: Cli = match exit::parse_args() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    cli.start_log();
    logging::log_panics();
    let code = run(&cli).unwrap_or_else(|error| {
        let code = error.exit_code();
        if code != ExitCode::BrokenPipe {
            exit::complain("rpc-client", &error);
        }
        code
    });
    code.into()
}

fn run(cli: &Cli) -> Result<ExitCode, Error> {
    let (config, batch) = (cli.config()?, cli.batch()?);
    batch::run(&batch, config, BufReader::new(io::stdin()), BufWriter::new(io::stdout()))
}
