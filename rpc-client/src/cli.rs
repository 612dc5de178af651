//! The command line of `rpc-client`.

use crate::batch::{Batch, Format};
use crate::client::Config;
use clap::Parser;
use log::LevelFilter;
use rpc_common::broker::Error;
use rpc_common::logging::LogOptions;
use rpc_common::message::{parse_number, NumberError};
use rpc_common::target::{short_string, BrokerOptions};
use rpc_common::{duration, exit};
use std::io::{self, IsTerminal};
use std::num::NonZeroUsize;
use std::time::Duration;

/// Ask rpc-server, or any server of the RabbitMQ RPC tutorial, for fib(n).
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = exit::help(exit::CLIENT),
    arg_required_else_help = true,
    allow_negative_numbers = true // so that -5 is called a wrong number, not a wrong option
)]
pub struct Cli {
    /// The numbers n to ask fib(n) for
    #[arg(required = true, value_name = "N", value_parser = number)]
    numbers: Vec<u64>,

    /// Request queue
    #[arg(long, value_name = "NAME", default_value = "rpc_queue", value_parser = short_string)]
    queue: String,

    /// Limit of each call, connecting included, as 1500ms, 30s or 2m
    #[arg(short, long, value_name = "DURATION", default_value = "30s", value_parser = duration::parse_limit)]
    timeout: Duration,

    /// Calls outstanding at once
    #[arg(short = 'j', long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    in_flight: u16,

    /// text: ` [.] Got 832040` | raw: `832040` | auto: text on a terminal, else raw
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    output: Output,

    /// Ask for every number N times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    repeat: u64,

    /// Nothing on standard error but errors
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,

    #[command(flatten)]
    log: LogOptions,

    #[command(flatten)]
    broker: BrokerOptions,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Output {
    Auto,
    Text,
    Raw,
}

fn number(text: &str) -> Result<u64, NumberError> {
    parse_number(text.as_bytes())
}

impl Cli {
    /// Starts the log, as much of it as was asked for.
    pub fn start_log(&self) {
        let level = if self.quiet { LevelFilter::Error } else { LevelFilter::Warn };
        self.log.start_for_prompt("rpc-client", level);
    }

    /// How to call, as the options and the environment say.
    ///
    /// # Errors
    /// [`Error::Url`]
    pub fn config(&self) -> Result<Config, Error> {
        Ok(Config {
            target: self.broker.target()?,
            queue: self.queue.clone(),
            timeout: self.timeout,
            in_flight: NonZeroUsize::new(self.in_flight.into()).unwrap_or(NonZeroUsize::MIN),
        })
    }

    /// What to ask, and how to print the answers.
    #[must_use]
    pub fn batch(&self) -> Batch {
        let format = match self.output {
            Output::Text => Format::Text,
            Output::Auto if io::stdout().is_terminal() => Format::Text,
            Output::Auto | Output::Raw => Format::Raw,
        };
        Batch { numbers: self.numbers.clone(), repeat: self.repeat, format, quiet: self.quiet }
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
