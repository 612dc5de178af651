//! Calls a function over RabbitMQ RPC and waits for the answer.
//!
//! A call takes this way: `main` reads the command line ([`cli`]) and hands it to [`batch`], which
//! feeds numbers to [`Client::run`] and prints what comes back. [`client`] is the loop; it keeps the
//! calls in hand in `calls`, which is pure, and talks to the broker through `session`, which is one
//! connection. [`Client::call`] is a run of one.

pub mod batch;
mod calls;
pub mod cli;
pub mod client;
pub mod input;
pub mod output;
mod session;
mod summary;

pub use client::{Client, Config, Error, Outcome, Request};
pub use session::ReplyTo;
