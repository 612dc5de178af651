//! The options of a server, of the command line, and of a program that uses the library.

use crate::queue::QueueType;
use rpc_common::command_line::{self, BrokerOptions};
use rpc_common::options::{parse_duration, parse_name};
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

/// The options of a server. The defaults are those of the command line.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Requests")]
pub struct Config {
    /// Request queue
    #[arg(long, value_name = "NAME", default_value = "rpc_queue", value_parser = parse_name)]
    pub queue: String,

    /// auto | transient | classic | quorum: how to declare the queue if it does not exist
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub queue_type: QueueType,

    /// Requests served at once, each on a channel of its own; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(..=1024))]
    pub workers: u16,

    /// Unacknowledged requests per worker (basic.qos)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub prefetch: u16,

    /// At a stop, give up what has begun after this: programs get SIGTERM, and their requests go
    /// back to the queue
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub stop_after: Option<Duration>,

    /// The brokers to connect to.
    #[command(flatten)]
    pub broker: BrokerOptions,

    /// given | random: whether the first URL or any of them is tried first
    #[arg(
        long,
        value_name = "ORDER",
        default_value = "random",
        hide_possible_values = true,
        help_heading = "Broker"
    )]
    pub url_order: UrlOrder,
}

/// Which broker a server tries first; the others follow in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[non_exhaustive]
pub enum UrlOrder {
    /// The first one: the node that it should be on.
    Given,
    /// Any, so that many servers spread over the nodes.
    Random,
}

impl Config {
    /// Number of workers.
    pub fn worker_count(&self) -> usize {
        match self.workers {
            0 => thread::available_parallelism().map_or(1, NonZeroUsize::get),
            workers => workers.into(),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        command_line::from_args(&[])
    }
}
