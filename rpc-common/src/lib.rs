//! What `rpc-server` and `rpc-client` agree on.
//!
//! Read in this order: [`message`] is what goes over the wire, [`broker`] the way to the broker,
//! [`exit`] how a program says how it ended, [`fib`] the function itself. `fib` and `message` know
//! no socket.

pub mod broker;
pub mod deadline;
pub mod duration;
pub mod exit;
pub mod fib;
pub mod logging;
pub mod message;
mod stream;
