//! Serves a function over RabbitMQ RPC: a blocking consumer loop, one request at a time per worker.
//!
//! [`serve`] is the loop, for any [`Handler`]; the program `rpc-server` is [`serve`] with
//! [`handler::fib`]. Read in this order: [`handler`] is the function, `worker` takes one request
//! after the other to it, `supervisor` keeps the workers connected.

pub mod cli;
pub mod handler;
mod queue;
pub mod signals;
mod supervisor;
mod worker;

pub use handler::Handler;
pub use queue::QueueType;
pub use signals::Stop;
pub use supervisor::{serve, Config};
