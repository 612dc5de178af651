//! The integration tests: the real programs on a real RabbitMQ, as their users see them.
//!
//! The test of a promise is in the file that is named after it. All tests share one private node
//! and run in parallel, each on queues of its own. `AMQP_URL` names another broker to use.

mod support;

// What a call promises
mod answers_are_never_lost;
mod at_least_once;
mod bad_brokers;
mod bad_messages;
mod connection_loss;
mod every_wait_ends;
mod expired_requests;
mod graceful_stop;
mod no_work_is_lost;
mod overload;
mod persistent_programs;
mod refused_replies;
mod served_programs;

// What goes over the wire
mod load_sharing;
mod request_queue;
mod sentences;
mod tls;
mod wire;

// What users see at the prompt
mod any_data;
mod batches;
mod command_line;
mod containers;
mod exit_codes;
mod limits;
mod messages;
mod metrics;
mod operating;
mod output_formats;
mod passwords;
mod readme;
mod sd_notify;
mod server_log;
mod unit;

// All of it together, and with other programs
mod cluster;
mod library;
mod peers;
mod soak;

// The source
mod import_cycles;
