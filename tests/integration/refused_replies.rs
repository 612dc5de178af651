//! Promise: a bad message cannot stop a server, whatever the broker does because of our reply.

use crate::support::broker::exclusive_node;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use amiquip::AmqpProperties;

#[test]
fn a_reply_to_a_queue_that_is_gone_is_logged_and_its_request_is_acknowledged() {
    let queue = Queue::named("caller_gone");
    let server = Program::start_server(&queue, &[]);
    let properties = AmqpProperties::default()
        .with_reply_to("gone".into())
        .with_correlation_id("its-id".into());
    Peer::connect().publish(&queue, b"30", properties);
    let line = server.wait_for_log("a reply was returned");
    let text =
        "there is no queue 'gone', the caller has gone or reconnected (correlation id: its-id)";
    assert!(line.contains("INFO") && line.ends_with(text), "{line}");
    server.stop();
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

/// The decimal text of fib(n) is larger than the `max_message_size` of [`exclusive_node`].
const TOO_LARGE: &str = "1000000";

/// The broker closes the channel and delivers the request again. The server does not compute it
/// again and again, and it serves other requests.
#[test]
fn a_reply_that_is_too_large_for_the_broker_becomes_an_error_reply() {
    let broker = exclusive_node();
    let queue = "too_large";
    let server = Program::start_server_at(broker.url(), queue, &[]);
    let mut call = client(queue, &["-q", "20", TOO_LARGE, "30"]);
    let error = "rpc-client: fib(1000000): internal error: \
                 the broker refused the answer, perhaps because of its size\n";
    assert_output(
        call.env("AMQP_URL", broker.url()),
        1,
        "6765\n\n832040\n",
        error,
    );
    let computed = server
        .stop()
        .iter()
        .filter(|line| line.ends_with("fib(1000000)"))
        .count();
    assert_eq!(
        computed, 1,
        "the second delivery shows that it was this reply"
    );
}

/// A frame on a channel that the broker has closed would end the connection of all workers.
#[test]
fn a_channel_that_is_closed_under_load_does_not_end_the_connection() {
    let broker = exclusive_node();
    // A server that declares a transient queue where the broker does not permit it causes such an
    // error, too.
    let is_error = |line: &&str| {
        line.contains("caused a connection exception") && !line.contains("transient_nonexcl_queues")
    };
    let errors = || broker.log().lines().filter(is_error).count();
    let queue = "closed_channel";
    let server = Program::start_server_at(
        broker.url(),
        queue,
        &["-q", "--prefetch", "64", "--workers", "2"],
    );
    let before = errors();
    let numbers: Vec<&str> = (1..=1_000)
        .map(|i| if i % 500 == 0 { TOO_LARGE } else { "30" })
        .collect();
    let answers: String = numbers
        .iter()
        .map(|n| if *n == "30" { "832040\n" } else { "\n" })
        .collect();
    let mut call = client(queue, &["-q", "-"]);
    call.env("AMQP_URL", broker.url())
        .write_stdin(numbers.join("\n"));
    call.assert().code(1).stdout(answers);
    assert_eq!(errors() - before, 0, "{}", broker.log());
    server.stop();
}
