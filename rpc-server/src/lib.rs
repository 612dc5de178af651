//! Serves a function over RabbitMQ RPC: a blocking consumer loop, one request at a time per worker.
//!
//! [`serve`] serves any [`Handler`]; the program `rpc-server` serves [`fib_handler`] or a
//! [`Program`]. Read in this order: `config` is what to serve, `handler` the function, `program` a
//! program as the function; `server` keeps the connection, and tells the `observer`; `queue` finds
//! or declares the request queue; `worker` takes requests to the handler and publishes its replies;
//! `redelivery` has what only redelivered requests need.

mod callers;
mod cancel;
mod channel;
mod config;
mod consumer_check;
mod handler;
mod observer;
mod program;
mod queue;
mod redelivery;
mod reply;
mod server;
mod signals;
mod worker;

pub use config::{Config, UrlOrder};
pub use handler::{fib_handler, Caller, Handler};
pub use observer::{Observer, Outcome};
pub use program::{reap_orphans_during, Program, ProgramCallbacks, ProgramOptions, StartReason};
pub use queue::QueueType;
pub use server::serve;
pub use signals::{stop_signal, stop_signal_with, Stop};
