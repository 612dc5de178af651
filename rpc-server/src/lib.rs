//! Serves a function over RabbitMQ RPC: a blocking consumer loop, one request at a time per worker.
//!
//! [`serve`] is the loop, for any [`Handler`]; the program `rpc-server` is [`serve`] with
//! [`handler::fib_handler`]. Read in this order: [`handler`] is the function, `supervisor` keeps the
//! connection and gives channels to workers, `worker` takes one request after the other to the handler.

pub mod cli;
pub mod handler;
mod isolated;
mod kept;
mod queue;
pub mod signals;
mod supervisor;
mod worker;

pub use handler::Handler;
pub use queue::QueueType;
pub use signals::Stop;
pub use supervisor::{serve, Config};
