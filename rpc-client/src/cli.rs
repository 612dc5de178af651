//! The command line of `rpc-client`.

use crate::error::Error;
use crate::input::Argument;
use clap::builder::{EnumValueParser, TypedValueParser};
use clap::Parser;
use log::LevelFilter;
use rpc_client::Config;
use rpc_common::exit::{exit_codes_help, CLIENT_EXIT_CODES};
use rpc_common::logging::LogOptions;
use std::io::{self, IsTerminal};

/// Ask rpc-server, or any server of the RabbitMQ RPC tutorial, for fib(n)
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    after_help = exit_codes_help(CLIENT_EXIT_CODES),
    arg_required_else_help = true,
    args_override_self = true, // the last of an option given twice counts, for aliases and wrappers
    allow_negative_numbers = true // so that -5 is reported as a wrong number, not as an unknown option
)]
pub(crate) struct Cli {
    /// The numbers n to ask fib(n) for; `-` reads standard input, one number per line
    #[arg(required = true, value_name = "N")]
    pub(crate) arguments: Vec<Argument>,

    /// Make every call N times
    // The groups of the help are in the order in which their first option is declared: so "Calls" is the first.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    #[arg(help_heading = "Calls", display_order = 100)]
    pub(crate) repeat: u64,

    #[command(flatten)]
    pub(crate) output: OutputOptions,

    #[command(flatten, next_help_heading = "Output")]
    log: LogOptions,

    #[command(flatten)]
    pub(crate) config: Config,
}

/// The options of what is printed.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputOptions {
    /// Text: ` [.] Got 832040` | raw: `832040` | json: one object per line | auto: text on a terminal, else raw
    #[arg(short = 'o', long = "output", value_name = "FORMAT", hide_possible_values = true)]
    #[arg(default_value = "auto", value_parser = EnumValueParser::<Format>::new().map(Format::resolve))]
    pub(crate) format: Format,

    /// Print answers as they arrive, not in the order asked (json only)
    #[arg(long)]
    pub(crate) unordered: bool,

    /// Print latency, throughput and errors on standard error at the end; text | json
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub(crate) summary: Option<SummaryFormat>,

    /// Suppress warnings and progress
    #[arg(short, long, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
}

/// The format of the answers on standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// `Text` on a terminal, else `Raw`. Parsing replaces it, so that it occurs nowhere else.
    Auto,
    /// A line as in the tutorial, ` [.] Got 832040`; no line for a failed call.
    Text,
    /// The number only; an empty line for a failed call, so that lines stay aligned with the input.
    Raw,
    /// One object for each call, whether it failed or not.
    Json,
}

/// The format of the summary.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum SummaryFormat {
    Text,
    Json,
}

impl Cli {
    /// Starts the log at the level that the options ask for.
    pub(crate) fn start_log(&self) {
        let level = if self.output.quiet { LevelFilter::Error } else { LevelFilter::Warn };
        self.log.start_for_prompt("rpc-client", level);
    }

    /// Refuses options that do not go together.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.output.unordered && self.output.format != Format::Json {
            return Err(Error::Usage("--unordered needs --output json, or answers cannot be told apart"));
        }
        Ok(())
    }
}

impl OutputOptions {
    /// Whether requests are announced on standard error, as in the tutorial.
    pub(crate) fn announces(&self) -> bool {
        self.format == Format::Text && !self.quiet
    }
}

impl Format {
    /// Replaces `Auto`.
    fn resolve(self) -> Self {
        match self {
            Format::Auto if io::stdout().is_terminal() => Format::Text,
            Format::Auto => Format::Raw,
            format => format,
        }
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

    #[test]
    fn help_groups_the_options() {
        let help = Cli::command().render_help().to_string();
        let headings = ["\nCalls:", "\nOutput:", "\nBroker:"].map(|heading| help.find(heading));
        assert!(headings.is_sorted() && headings[0].is_some(), "{help}");
    }
}
