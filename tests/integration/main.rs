//! The real programs on a real RabbitMQ, as their users see them.
//!
//! All tests share one private node, which the first of them starts, and run in parallel, each on
//! queues of its own. `AMQP_URL` points them at another broker.

mod bad_brokers;
mod bad_messages;
mod batches;
mod client;
mod cluster;
mod connections;
mod crashes;
mod deadlines;
mod failures;
mod messages;
mod peers;
mod readme;
mod server;
mod soak;
mod support;
mod tls;
mod wire;
