//! What `rpc-server` and `rpc-client` agree on.
//!
//! Read in this order: [`fib`] is the function, [`message`] what goes over the wire, [`target`]
//! where the broker is, [`broker`] the way to it, [`sanitize`] what makes the broker's frames harmless,
//! [`deadline`] what ends every wait on that way, [`exit`] how a program says how it ended. `fib`, `message` and
//! `sanitize` know no socket.

pub mod broker;
pub mod deadline;
pub mod duration;
pub mod exit;
pub mod fib;
pub mod logging;
pub mod message;
pub mod outbox;
pub mod sanitize;
mod stream;
pub mod target;
mod tls;
