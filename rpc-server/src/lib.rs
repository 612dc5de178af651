//! Serves a function over RabbitMQ RPC: a blocking consumer loop, one request at a time per worker.
//!
//! [`serve`] serves any [`Handler`]; the program `rpc-server` serves [`fib_handler`] or a
//! [`Program`]. Read in this order: `config` is what to serve, `handler` the function, `program` a
//! program as the function, `run` one process group of it; `server` keeps the connection, and tells
//! the `observer`; `worker` takes requests to the handler and publishes its replies, `queue` finds
//! or declares the request queue, `isolated` and `kept` are about requests that are delivered
//! again.

mod config;
mod handler;
mod isolated;
mod kept;
mod observer;
mod program;
mod queue;
mod run;
mod run_log;
mod server;
mod signals;
mod worker;

pub use config::{Config, UrlOrder};
pub use handler::{fib_handler, Caller, Handler};
pub use observer::Observer;
pub use program::{Program, ProgramOptions};
pub use queue::QueueType;
pub use server::serve;
pub use signals::{stop_signal, stop_signal_with, Stop};
