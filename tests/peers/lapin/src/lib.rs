//! Shared by the server and the client.

use anyhow::Context;
use lapin::{Channel, Connection, ConnectionProperties};
use std::env;
use std::str::FromStr;

/// The value of an environment variable; None if it is not set or empty.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

pub fn number<T: FromStr>(name: &str, otherwise: T) -> anyhow::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    variable(name).map_or(Ok(otherwise), |value| {
        value.parse().context(name.to_owned())
    })
}

pub fn queue() -> String {
    variable("RPC_QUEUE").unwrap_or_else(|| "rpc_queue".into())
}

pub async fn connect() -> lapin::Result<(Connection, Channel)> {
    let url = variable("AMQP_URL").unwrap_or_else(|| "amqp://localhost".into());
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}
