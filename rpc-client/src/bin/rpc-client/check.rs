//! `--check`: is the function being served? Looks at the request queue and makes no call.

use crate::cli::{Cli, Format};
use crate::error::Error;
use rpc_client::Error as CallError;
use rpc_common::connection::{Connection, Deadline, Owner, QueueStats};
use rpc_common::exit::{print_message, ExitCode};
use rpc_common::stdio;
use serde::Serialize;
use std::io::{self, Write};

/// The object in JSON.
#[derive(Serialize)]
struct Report<'a> {
    queue: &'a str,
    #[serde(rename = "broker")]
    address: &'a str,
    version: &'a str,
    /// `None`: the queue is exclusive to another connection, and the broker gives no numbers.
    consumers: Option<u32>,
    messages: Option<u32>,
}

/// Prints how many consumers and waiting messages the queue has. The exit code is 4 if it has no
/// consumers.
///
/// # Errors
/// The broker was not reached, the queue does not exist, or the output cannot be written.
pub(crate) fn print_queue_stats(cli: &Cli) -> Result<ExitCode, Error> {
    let config = &cli.config;
    let deadline = Deadline::after(config.timeout);
    let endpoints = config.broker.endpoints().map_err(CallError::from)?;
    let mut connection = Connection::open_any(&endpoints, "rpc-client", &deadline, &Owner::Standby)
        .map_err(CallError::from)?;
    let queue = config.queue.clone();
    let address = connection.address().to_owned();
    let stats = match connection.queue_stats(&queue, &deadline) {
        Ok(stats) => Some(stats),
        Err(error) if error.is_exclusive() => None,
        Err(error) if error.is_not_found() => {
            return Err(CallError::NoQueue { queue, address }.into());
        }
        Err(error) => return Err(CallError::Connection(error).into()),
    };
    print_stats(cli, &address, &connection.broker_version(), stats).map_err(Error::Output)?;
    if stats.is_none_or(|stats| stats.consumers > 0) {
        return Ok(ExitCode::Success);
    }
    let error = Error::Call(CallError::NoConsumers { queue, address });
    print_message("rpc-client", &error);
    Ok(error.exit_code())
}

fn print_stats(
    cli: &Cli,
    address: &str,
    version: &str,
    stats: Option<QueueStats>,
) -> io::Result<()> {
    let queue = &*cli.config.queue;
    let mut output = stdio::stdout();
    if cli.output.format == Format::Json {
        serde_json::to_writer(
            &mut output,
            &Report {
                queue,
                address,
                version,
                consumers: stats.map(|stats| stats.consumers),
                messages: stats.map(|stats| stats.messages),
            },
        )?;
        return output.write_all(b"\n");
    }
    let Some(QueueStats {
        messages,
        consumers,
    }) = stats
    else {
        return writeln!(
            output,
            "{queue} on {address}: exclusive to another connection, consumers unknown"
        );
    };
    let plural = |count, name: &str| format!("{count} {name}{}", if count == 1 { "" } else { "s" });
    writeln!(
        output,
        "{queue} on {address}: {}, {} waiting",
        plural(consumers, "consumer"),
        plural(messages, "message")
    )
}
