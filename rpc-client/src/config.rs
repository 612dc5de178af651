//! The options of calls, of the command line, and of a program that uses the library.

use clap::ValueEnum;
use rpc_common::command_line::{self, BrokerOptions};
use rpc_common::message::{DEADLINE_HEADER, TEXT};
use rpc_common::options::{parse_content_type, parse_name, parse_timeout};
use std::time::Duration;

/// The options of calls. The defaults are those of the command line.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Calls")]
pub struct Config {
    /// Request queue
    #[arg(long, value_name = "NAME", default_value = "rpc_queue", value_parser = parse_name)]
    pub queue: String,

    /// Limit of each call, connecting included: 1500ms, 30s, 2m
    #[arg(short, long, value_name = "DURATION", default_value = "30s", value_parser = parse_timeout)]
    pub timeout: Duration,

    /// Calls outstanding at once
    #[arg(short = 'j', long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub in_flight: u16,

    /// Wait for a queue that does not exist, until the deadline
    #[arg(long, overrides_with = "no_wait")]
    pub wait: bool,

    /// Do not wait for servers: a queue without consumers is exit code 4
    #[arg(long, overrides_with = "wait")]
    pub no_wait: bool,

    /// Where replies go: queue: an exclusive queue | direct: RabbitMQ's direct reply-to, at most
    /// once, for few calls
    #[arg(
        long,
        value_name = "KIND",
        default_value = "queue",
        hide_possible_values = true
    )]
    pub reply_to: ReplyTo,

    /// MIME type of the request
    #[arg(long, value_name = "TYPE", default_value = TEXT, value_parser = parse_content_type)]
    pub content_type: String,

    /// Header of the request, repeatable
    #[arg(short = 'H', long = "header", value_name = "NAME=VALUE", value_parser = parse_header)]
    pub headers: Vec<(String, String)>,

    /// The brokers to connect to.
    #[command(flatten)]
    pub broker: BrokerOptions,
}

impl Default for Config {
    fn default() -> Self {
        command_line::from_args(&[])
    }
}

/// Maximum length of a header's name in bytes: an AMQP short string.
const MAX_HEADER_NAME: usize = 255;

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("not of the form NAME=VALUE")?;
    match name.len() {
        0 => Err("the name must not be empty".into()),
        1..=MAX_HEADER_NAME if name == DEADLINE_HEADER => Err("--timeout sets this header".into()),
        1..=MAX_HEADER_NAME => Ok((name.into(), value.into())),
        len => Err(format!(
            "the name must be at most {MAX_HEADER_NAME} bytes long, not {len}"
        )),
    }
}

/// The queue of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[non_exhaustive]
pub enum ReplyTo {
    /// An exclusive queue of the connection, as in the tutorial.
    Queue,
    /// RabbitMQ's [direct reply-to](https://www.rabbitmq.com/docs/direct-reply-to), without a
    /// queue: at most once. It costs one more round trip, because its consumer must be there before
    /// the first request.
    Direct,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_a_name_and_a_value_that_may_be_anything() {
        let header = |name: &str, value: &str| Ok((name.to_owned(), value.to_owned()));
        assert_eq!(parse_header("a=b=c"), header("a", "b=c"));
        assert_eq!(parse_header("a="), header("a", ""));
        assert_eq!(
            parse_header(&("x".repeat(255) + "=")),
            header(&"x".repeat(255), "")
        );
        for (text, error) in [
            ("a", "not of the form NAME=VALUE"),
            ("=b", "the name must not be empty"),
            ("x-deadline-ms=1", "--timeout sets this header"),
            (
                &("x".repeat(256) + "="),
                "the name must be at most 255 bytes long, not 256",
            ),
        ] {
            assert_eq!(parse_header(text), Err(error.into()));
        }
    }
}
