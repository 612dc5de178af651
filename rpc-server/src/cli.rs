//! The command line of `rpc-server`.

use clap::Parser;
use rpc_common::exit::{exit_codes_help, SERVER_EXIT_CODES};
use rpc_common::logging::LogOptions;
use rpc_common::text::parse_duration;
use rpc_server::Config;
use std::time::Duration;

/// Serve fib(n) to rpc-client and every other client of the RabbitMQ RPC tutorial.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = exit_codes_help(SERVER_EXIT_CODES),
    args_override_self = true // the last of repeated options counts, for aliases and wrappers
)]
pub(crate) struct Cli {
    /// Largest n to serve
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub(crate) max_n: u64,

    /// Sleep this long in each request, to watch fair dispatch
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    pub(crate) delay: Duration,

    /// Do not print a line for each request
    #[arg(short, long)]
    pub(crate) quiet: bool,

    #[command(flatten)]
    pub(crate) log: LogOptions,

    #[command(flatten)]
    pub(crate) config: Config,
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
