//! The command line of `rpc-client`.

use crate::batch::{Batch, SummaryFormat};
use crate::client::{Config, Error};
use crate::input::Argument;
use crate::output::Format;
use crate::session::ReplyTo;
use clap::Parser;
use log::LevelFilter;
use rpc_common::broker;
use rpc_common::logging::LogOptions;
use rpc_common::target::{short_string, BrokerOptions};
use rpc_common::{duration, exit};
use std::io::{self, IsTerminal};
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::Duration;

/// Ask rpc-server, or any server of the RabbitMQ RPC tutorial, for fib(n).
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = exit::help(exit::CLIENT),
    arg_required_else_help = true,
    args_override_self = true, // of an option given twice the last counts, for aliases and wrappers
    allow_negative_numbers = true // so that -5 is called a wrong number, not a wrong option
)]
pub struct Cli {
    /// The numbers n to ask fib(n) for; `-`: standard input, a number per line
    #[arg(required = true, value_name = "N", value_parser = Argument::from_str)]
    arguments: Vec<Argument>,

    /// Request queue
    #[arg(long, value_name = "NAME", default_value = "rpc_queue", value_parser = short_string)]
    queue: String,

    /// Limit of each call, connecting included, as 1500ms, 30s or 2m
    #[arg(short, long, value_name = "DURATION", default_value = "30s", value_parser = duration::parse_limit)]
    timeout: Duration,

    /// Calls outstanding at once
    #[arg(short = 'j', long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    in_flight: u16,

    /// text: ` [.] Got 832040` | raw: `832040` | json: an object a line | auto: text on a terminal, else raw
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    output: Output,

    /// Answers as they come, not in the order asked (json only)
    #[arg(long)]
    unordered: bool,

    /// Ask for every number N times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    repeat: u64,

    /// Latency, throughput and errors on standard error at the end; text | json
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "text",
        hide_possible_values = true
    )]
    summary: Option<Summary>,

    /// Where replies go; queue: one of the connection's own | direct: RabbitMQ's direct reply-to
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        default_value = "queue",
        hide_possible_values = true
    )]
    reply_to: Kind,

    /// Nothing on standard error but errors and the summary
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
    Json,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    Queue,
    Direct,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Summary {
    Text,
    Json,
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
    /// [`broker::Error::Url`]
    pub fn config(&self) -> Result<Config, broker::Error> {
        Ok(Config {
            brokers: self.broker.brokers()?,
            queue: self.queue.clone(),
            timeout: self.timeout,
            in_flight: NonZeroUsize::new(self.in_flight.into()).unwrap_or(NonZeroUsize::MIN),
            reply_to: match self.reply_to {
                Kind::Queue => ReplyTo::Queue,
                Kind::Direct => ReplyTo::Direct,
            },
        })
    }

    /// What to ask, and how to print the answers.
    ///
    /// # Errors
    /// [`Error::Usage`] for options that do not go together.
    pub fn batch(&self) -> Result<Batch, Error> {
        let format = match self.output {
            Output::Text => Format::Text,
            Output::Auto if io::stdout().is_terminal() => Format::Text,
            Output::Auto | Output::Raw => Format::Raw,
            Output::Json => Format::Json,
        };
        if self.unordered && format != Format::Json {
            return Err(Error::Usage(
                "--unordered needs --output json, or answers cannot be told apart",
            ));
        }
        let summary = self.summary.map(|summary| match summary {
            Summary::Text => SummaryFormat::Text,
            Summary::Json => SummaryFormat::Json,
        });
        Ok(Batch {
            arguments: self.arguments.clone(),
            repeat: self.repeat,
            format,
            unordered: self.unordered,
            summary,
            quiet: self.quiet,
        })
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
