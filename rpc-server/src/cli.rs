//! The command line of `rpc-server`.

use clap::Parser;
use rpc_common::exit::{exit_codes_help, SERVER_EXIT_CODES};
use rpc_common::logging::LogOptions;
use rpc_common::text::parse_duration;
use rpc_server::{Config, Program, ProgramOptions};
use std::env;
use std::time::Duration;

/// Serve fib(n), or any program, to rpc-client and every other client of the RabbitMQ RPC tutorial.
#[derive(Debug, Parser)]
#[command(
    version,
    override_usage = "rpc-server [OPTIONS] [-- PROGRAM [ARG]...]",
    after_help = exit_codes_help(SERVER_EXIT_CODES),
    args_override_self = true // the last of repeated options counts, for aliases and wrappers
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) config: Config,

    /// Do not print a line for each request
    #[arg(short, long, help_heading = "Output")]
    pub(crate) quiet: bool,

    #[command(flatten, next_help_heading = "Output")]
    pub(crate) log: LogOptions,

    #[command(flatten)]
    pub(crate) fib: FibOptions,

    #[command(flatten)]
    pub(crate) program: ProgramOptions,
}

/// The options of the function that is served without a program.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The function fib")]
pub(crate) struct FibOptions {
    /// Largest n to serve
    #[arg(long, value_name = "N", default_value_t = 1_000_000, conflicts_with = "command")]
    pub(crate) max_n: u64,

    /// Sleep this long in each request, to watch fair dispatch
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    #[arg(conflicts_with = "command")]
    pub(crate) delay: Duration,
}

impl Cli {
    /// The program to serve, if there is one.
    ///
    /// # Errors
    /// Why it cannot be served, for a message.
    pub(crate) fn find_program(&self) -> Result<Option<Program>, String> {
        if self.program.command.is_empty() && env::args_os().any(|arg| arg == "--") {
            return Err("no PROGRAM after '--': is a variable unset? see --help".into());
        }
        Program::find(&self.program, &self.config.queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
