//! The code that `rpc-server` and `rpc-client` share.
//!
//! Read in this order: [`fib`] is the function, [`message`] what goes over the wire, [`properties`]
//! and [`encoding`] its bytes, [`connection`] the way to the broker,
//! [`command_line`] and [`options`] the command line, [`exit`] how a program says how it ended.

pub mod background_writer;
pub mod command_line;
pub mod connection;
pub mod encoding;
pub mod exit;
pub mod fib;
pub mod json;
mod log_limits;
pub mod logging;
pub mod message;
pub mod options;
pub mod properties;
pub mod stdio;
pub mod sync;
pub mod text;
