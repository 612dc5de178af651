//! Calls fib(n), or any function, over RabbitMQ RPC: requests in, answers out.
//!
//! [`cli`] is the command line. [`single_call`] makes one call. [`batch`] connects three loops by
//! channels: the [`reader`] reads the [`input`] from its [`source`], the library makes the calls,
//! and the [`printer`] prints lines of [`output`] and the [`summary`]. [`check`] makes no call.

mod cli;

mod batch;
mod check;
mod single_call;
mod sink;

mod input;
mod reader;
mod source;

mod output;
mod printer;
mod progress;
mod record_writer;
mod summary;

mod error;
mod signals;

use crate::cli::Cli;
use crate::error::Error;
use crate::input::BadInput;
use crate::signals::DefaultAction;
use rpc_client::Error as CallError;
use rpc_common::exit::{print_message, ExitCode};
use rpc_common::{command_line, logging, stdio};
use std::process;

fn main() -> process::ExitCode {
    let mut cli: Cli = match command_line::parse_args(cli::SHORT_HELP) {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    cli.config.broker.set_variable("RPC_CLIENT_URL");
    cli.start_log();
    logging::log_panics();
    let code = run(&cli).unwrap_or_else(|error| {
        let code = error.exit_code();
        if code != ExitCode::BrokenPipe {
            print_message("rpc-client", &error);
        }
        code
    });
    logging::flush();
    code.into()
}

/// Makes a call for every request of the input and prints the answers in the order asked. The exit
/// code is the largest of the calls' exit codes.
fn run(cli: &Cli) -> Result<ExitCode, Error> {
    cli.validate()?;
    let default_action = DefaultAction::start().map_err(Error::NoThread)?;
    stdio::check_stdout().map_err(Error::Output)?; // before anything is called in vain
    if cli.input.check {
        return check::print_queue_stats(cli);
    }
    let endpoints = cli.config.broker.endpoints().map_err(CallError::from)?;
    match single_call::request(cli).map_err(BadInput::from)? {
        Some(request) => {
            single_call::make_call(cli, endpoints, request, default_action).map_err(Error::Output)
        }
        None => batch::make_calls(cli, endpoints, default_action),
    }
}
