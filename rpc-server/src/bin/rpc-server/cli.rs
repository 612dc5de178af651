//! The command line of `rpc-server`.

use clap::Parser;
use rpc_common::exit::{exit_codes_help, SERVER_EXIT_CODES};
use rpc_common::logging::LogOptions;
use rpc_common::options::parse_duration;
use rpc_server::{Config, Program, ProgramCallbacks, ProgramOptions};
use std::env;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Text of `-h`: one screen.
pub(crate) const SHORT_HELP: &str = "\
Serves fib(n), or a program, to rpc-client and other clients over RabbitMQ.

  rpc-server [OPTIONS]                      fib(n)
  rpc-server [OPTIONS] -- PROGRAM [ARG]...  a program: each request is its
                                            standard input, its output the reply

      --url <URL>             the broker [AMQP_URL, else amqp://localhost]
      --queue <NAME>          request queue [rpc_queue]
      --queue-type <TYPE>     auto | transient | classic | quorum [auto]
      --workers <N>           requests served at once; 0: one per core [1]
      --prefetch <N>          unacknowledged requests per worker [1]
      --time-limit <DURATION> stop a run of the program after this [25m]
      --persistent            keep the program running; requests are JSON lines
      --stop-after <DURATION> at a stop, give up what has begun after this
      --metrics <ADDRESS>     serve Prometheus metrics; a bare port: loopback
  -q, --quiet                 do not print a line for each request
  -v, --verbose               more log

Exit codes: 0 stopped by a signal, 2 usage, 3 the broker refused us.
All options: rpc-server --help
";

/// End of `--help`.
const EXAMPLES: &str = "\
Examples:
  rpc-server
  rpc-server --workers 0 --queue-type quorum
  rpc-server --queue thumbnail --workers 0 -- convert - -resize 64x64 jpg:-

Environment:
  AMQP_URL is the broker. Each option can be set by a variable: --workers by
  RPC_SERVER_WORKERS. The command line wins.

Signals:
  SIGINT, SIGTERM and SIGHUP stop the server: it answers what it has begun. A
  second signal ends it at once. SIGHUP is ignored if it was at the start, as
  with nohup.

";

/// Serve fib(n), or any program, to rpc-client and every other client of the RabbitMQ RPC tutorial.
#[derive(Debug, Parser)]
#[command(
    version,
    override_usage = "rpc-server [OPTIONS] [-- PROGRAM [ARG]...]",
    after_help = EXAMPLES.to_owned() + &exit_codes_help(SERVER_EXIT_CODES),
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

    /// Serve Prometheus metrics, /ready and /live on this address, such as 9394 (a bare port is on
    /// loopback) or 0.0.0.0:9394
    #[arg(long, value_name = "ADDRESS", help_heading = "Output", value_parser = parse_address)]
    pub(crate) metrics: Option<SocketAddr>,

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
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1_000_000,
        conflicts_with = "command"
    )]
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
    /// The reason why the program cannot be served, for a message.
    pub(crate) fn find_program(
        &self,
        callbacks: ProgramCallbacks,
    ) -> Result<Option<Program>, String> {
        if self.program.command.is_empty() && env::args_os().any(|arg| arg == "--") {
            return Err("no PROGRAM after '--': is a variable unset? see --help".into());
        }
        Program::find(&self.program, &self.config.queue, callbacks)
    }
}

/// Parses an address: a bare port is on the loopback interface.
fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse().or_else(|_| {
        text.parse()
            .map(|port: u16| (Ipv4Addr::LOCALHOST, port).into())
    });
    let address = address
        .ok()
        .filter(|address: &SocketAddr| address.port() != 0);
    address.ok_or_else(|| {
        "not a port, or an IP address and a port, such as 9394 or 0.0.0.0:9394".into()
    })
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
