//! Promise: nothing runs for a caller whose deadline has passed.

use crate::support::broker;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};

#[test]
fn a_call_without_an_answer_is_exit_code_5_and_its_request_leaves_the_queue() {
    let queue = Queue::declare("no_answer");
    let error = format!(
        "rpc-client: fib(30): no answer from '{}' on {} within 5s: \
         the queue had 0 consumers and 1 message waiting\n",
        &*queue,
        broker::authority()
    );
    assert_output(&mut client(&queue, &["-q", "-t", "5s", "30"]), 5, "\n", &error);
    Peer::connect().wait_for_messages(&queue, 0);
}

/// The second request waits in the prefetch of the server for longer than its caller does.
#[test]
fn a_server_drops_a_prefetched_request_that_has_expired() {
    let queue = Queue::named("expired");
    let server = Program::start_server(&queue, &["--prefetch", "2", "--delay", "6s"]);
    client(&queue, &["-q", "-t", "3s", "1", "2"]).assert().code(5);
    server.wait_for_log("dropped a request that expired in our hands, 1 in all");
    assert_eq!(server.stop(), [" [.] fib(1)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}
