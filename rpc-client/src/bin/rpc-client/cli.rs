//! The command line of `rpc-client`.

use crate::error::Error;
use crate::input::{Argument, BadInput, Data};
use crate::source::Source;
use clap::builder::{EnumValueParser, OsStringValueParser, TypedValueParser};
use clap::Parser;
use log::LevelFilter;
use rpc_client::Config;
use rpc_common::exit::{exit_codes_help, CLIENT_EXIT_CODES};
use rpc_common::logging::LogOptions;
use std::io::{self, IsTerminal};

/// Maximum size of all headers in bytes: they must fit into one frame, with those that brokers add.
const MAX_HEADERS: usize = 64 << 10;

/// Text of `-h`: one screen.
pub(crate) const SHORT_HELP: &str = "\
Calls fib(n), or any function, over RabbitMQ and waits for the answer.

  rpc-client [OPTIONS] <N>...          fib(n) of each number; - reads them
  rpc-client [OPTIONS] --data <DATA>   any request: text, @FILE, or @- (input)
  rpc-client [OPTIONS] --lines <FILE>  a request per line of FILE, or of -
  rpc-client [OPTIONS] --check         is the function being served?

      --url <URL>            the broker [AMQP_URL, else amqp://localhost]
      --queue <NAME>         request queue [rpc_queue]
  -t, --timeout <DURATION>   limit of each call: 1500ms, 30s, 2m [30s]
  -j, --in-flight <N>        calls outstanding at once [64]
  -o, --output <FORMAT>      text | raw | json [text on a terminal, else raw]
      --summary              figures on standard error at the end
      --wait, --no-wait      wait for a missing queue; do not wait for servers
  -q, --quiet                only errors on standard error
  -v, --verbose              more log

Exit codes: 0 answered, 1 error from the server, 2 usage, 3 no broker,
4 not accepted, 5 no answer in time. All options: rpc-client --help
";

/// End of `--help`.
const EXAMPLES: &str = "\
Examples:
  answer=$(rpc-client 30)
  seq 1 1000 | rpc-client --timeout 10s - >answers
  rpc-client --queue thumbnail --data @photo.jpg >small.jpg

Environment:
  AMQP_URL is the broker. Each option can be set by a variable: --timeout by
  RPC_CLIENT_TIMEOUT. The command line wins.

";

/// Call fib(n) of rpc-server or of any server of the RabbitMQ RPC tutorial, or any other function
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    override_usage = "rpc-client [OPTIONS] <N>... | --data <DATA> | --lines <FILE> | --check",
    after_help = EXAMPLES.to_owned() + &exit_codes_help(CLIENT_EXIT_CODES),
    arg_required_else_help = true,
    args_override_self = true, // the last of an option given twice counts, for aliases and wrappers
    // So that -5 is reported as a wrong number, not as an unknown option.
    allow_negative_numbers = true
)]
pub(crate) struct Cli {
    // The groups of the help are in the order in which their first option is declared: so "Calls"
    // is the first.
    #[command(flatten)]
    pub(crate) input: InputOptions,

    /// Make every call N times
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

/// The input: numbers, data or lines.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct InputOptions {
    /// The numbers n to ask fib(n) for; `-` reads standard input, one number per line
    #[arg(required = true, conflicts_with_all = ["data", "lines", "check"], value_name = "N")]
    pub(crate) numbers: Vec<Argument>,

    /// Any request, repeatable: text, @FILE, or @- for standard input
    #[arg(long, value_name = "DATA", allow_hyphen_values = true, conflicts_with_all = ["lines", "check"])]
    #[arg(value_parser = OsStringValueParser::new().map(Data::from), help_heading = "Calls")]
    pub(crate) data: Vec<Data>,

    /// A request per line of FILE, or of standard input for `-`
    #[arg(
        long,
        value_name = "FILE",
        help_heading = "Calls",
        conflicts_with = "check"
    )]
    #[arg(value_parser = OsStringValueParser::new().map(Source::from))]
    pub(crate) lines: Option<Source>,

    /// Make no call: print how many consumers and waiting messages the queue has; exit code 4
    /// without consumers
    #[arg(long, help_heading = "Calls")]
    pub(crate) check: bool,
}

/// The options of what is printed.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputOptions {
    /// Text: ` [.] Got 832040` | raw: `832040` | json: one object per line | auto: text on a
    /// terminal, else raw
    #[arg(
        short = 'o',
        long = "output",
        value_name = "FORMAT",
        hide_possible_values = true
    )]
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
    #[arg(short, long)]
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
        let level = if self.output.quiet {
            LevelFilter::Error
        } else {
            LevelFilter::Warn
        };
        self.log.start_for_prompt("rpc-client", level);
    }

    /// Refuses options that do not go together, and files that cannot be read.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.output.unordered && self.output.format != Format::Json {
            return Err(Error::Usage(
                "--unordered needs --output json, or answers cannot be told apart",
            ));
        }
        let headers = self.config.headers.iter();
        if headers
            .map(|(name, value)| name.len() + value.len())
            .sum::<usize>()
            > MAX_HEADERS
        {
            return Err(Error::Usage(
                "the headers must not be larger than 64KiB in all",
            ));
        }
        self.input.validate()
    }
}

impl InputOptions {
    fn validate(&self) -> Result<(), Error> {
        let is_standard_input = |data: &&Data| **data == Data::Source(Source::StandardInput);
        if self.data.iter().filter(is_standard_input).count() > 1 {
            return Err(Error::Usage(
                "standard input can be the data of one request only",
            ));
        }
        self.data
            .iter()
            .try_for_each(Data::validate)
            .map_err(BadInput::from)?;
        self.lines
            .iter()
            .try_for_each(|source| source.validate().map(drop))
            .map_err(BadInput::from)?;
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
