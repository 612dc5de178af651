//! The command line of `rpc-server`.

use crate::queue::QueueType;
use crate::supervisor::Config;
use clap::Parser;
use rpc_common::broker::Error;
use rpc_common::logging::LogOptions;
use rpc_common::target::{short_string, BrokerOptions};
use rpc_common::{duration, exit};
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

/// Serve fib(n) to rpc-client and every other client of the RabbitMQ RPC tutorial.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = exit::help(exit::SERVER),
    args_override_self = true // of an option given twice the last counts, for aliases and wrappers
)]
pub struct Cli {
    /// Request queue
    #[arg(long, value_name = "NAME", default_value = "rpc_queue", value_parser = short_string)]
    queue: String,

    /// auto | transient | classic | quorum, if the queue must be declared
    #[arg(
        long,
        value_name = "TYPE",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    queue_type: QueueType,

    /// Consumers, each a thread with a channel of its own; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(..=1024))]
    workers: u16,

    /// Unacknowledged requests per worker, basic.qos
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    prefetch: u16,

    /// Largest n that is served
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub max_n: u64,

    /// Pretend that each request takes this long, to watch fair dispatch
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration::parse)]
    pub delay: Duration,

    /// No line per request (the "Awaiting" line stays)
    #[arg(short, long)]
    pub quiet: bool,

    /// How much is logged.
    #[command(flatten)]
    pub log: LogOptions,

    #[command(flatten)]
    broker: BrokerOptions,
}

impl Cli {
    /// What to serve, as the options and the environment say.
    ///
    /// # Errors
    /// [`Error::Url`]
    pub fn config(&self) -> Result<Config, Error> {
        let one_per_core = || thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let workers = NonZeroUsize::new(self.workers.into()).unwrap_or_else(one_per_core);
        Ok(Config {
            brokers: self.broker.brokers()?.beginning_anywhere(),
            queue: self.queue.clone(),
            queue_type: self.queue_type,
            workers,
            prefetch: self.prefetch,
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
