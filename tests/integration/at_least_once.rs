//! Promise: at least once. A server that dies takes no request with it, and a client discards
//! replies that it does not expect.

use crate::support::broker::{exclusive_node, private_node};
use crate::support::broker_features::broker_version_at;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, call_in_background, client, Program};
use crate::support::proxy::{Proxy, BASIC_ACK, BASIC_PUBLISH};
use amiquip::AmqpProperties;
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use uuid::Uuid;

#[test]
fn the_request_of_a_killed_server_is_answered_once_by_the_next_one() {
    let queue = Queue::named("killed");
    let mut first = Program::start_server(&queue, &["--delay", "365d"]);
    let caller = call_in_background(&queue, &["30"], "832040\n");
    assert_eq!(first.next_line(), " [.] fib(30)");
    first.send_signal(Signal::KILL);
    assert_eq!(first.wait().signal(), Some(Signal::KILL.as_raw()));
    let second = Program::start_server(&queue, &[]);
    caller.join().expect("the caller got its answer");
    assert_eq!(second.stop(), [" [.] fib(30)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

/// Kills the first server when it has sent this method, reply or ack, but the broker has not
/// received it: the broker delivers the request to the second server. Returns the client and the
/// second server.
fn kill_server_before(queue: &Queue, method: [u8; 4]) -> (Program, Program) {
    let proxy = Proxy::start();
    let mut first = Program::start_server_at(&proxy.url(), queue, &["--heartbeat", "600"]);
    proxy.freeze_before(method);
    let client = Program::spawn(
        "rpc-client",
        &["--queue", queue, "-v", "-j", "1", "20", "30", "40"],
    );
    assert_eq!(first.next_line(), " [.] fib(20)");
    if method == BASIC_ACK {
        assert_eq!(client.next_line(), "6765");
    }
    first.send_signal(Signal::KILL);
    first.wait();
    drop(proxy);
    (client, Program::start_server(queue, &[]))
}

#[test]
fn a_request_is_answered_when_its_server_dies_before_the_reply() {
    let queue = Queue::named("dies_before_reply");
    let (client, second) = kill_server_before(&queue, BASIC_PUBLISH);
    for answer in ["6765", "832040", "102334155"] {
        assert_eq!(client.next_line(), answer);
    }
    assert_eq!(client.wait_for_exit_code(), Some(0));
    assert_eq!(
        second.stop(),
        [" [.] fib(20)", " [.] fib(30)", " [.] fib(40)"]
    );
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

/// The client has its answer, and the next server computes it again.
#[test]
fn the_second_reply_is_discarded_when_a_server_dies_between_reply_and_ack() {
    let queue = Queue::named("dies_before_ack");
    let (client, second) = kill_server_before(&queue, BASIC_ACK);
    client.wait_for_log("discarded an unexpected reply, 1 in all");
    for answer in ["832040", "102334155"] {
        assert_eq!(client.next_line(), answer);
    }
    assert_eq!(client.wait_for_exit_code(), Some(0));
    assert_eq!(second.stop().len(), 3);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn nothing_is_computed_again_when_a_server_dies_after_the_ack() {
    let queue = Queue::named("dies_after_ack");
    let first = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["20"]), 0, "6765\n", "");
    let mut peer = Peer::connect();
    first.send_signal(Signal::KILL);
    peer.wait_for_consumers(&queue, 0);
    assert_eq!(peer.message_count(&queue), Some(0));
    let second = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
    assert_eq!(second.stop(), [" [.] fib(30)"]);
}

#[test]
fn unexpected_replies_are_discarded() {
    let queue = Queue::declare("unknown_ids");
    let server = thread::spawn({
        let queue = queue.to_owned();
        move || {
            let peer = Peer::connect();
            for answer in ["5", "8"] {
                let request = peer.take(&queue);
                let reply_to = request
                    .properties
                    .reply_to()
                    .as_deref()
                    .expect("rpc-client sets it");
                let with_id = |id: String| AmqpProperties::default().with_correlation_id(id);
                peer.publish(reply_to, b"1", with_id("no such call".into()));
                peer.publish(reply_to, b"2", with_id(Uuid::new_v4().to_string()));
                peer.publish(reply_to, b"3", AmqpProperties::default());
                peer.reply(&request, answer.as_bytes());
                peer.reply(&request, b"4");
            }
        }
    });
    assert_output(
        &mut client(&queue, &["-q", "-j", "1", "5", "6"]),
        0,
        "5\n8\n",
        "",
    );
    server.join().expect("the peer sent its replies");
}

/// RabbitMQ delivers a request again if the server does not acknowledge it within
/// `consumer_timeout`. Up to 4.2 the broker closes the channel; from 4.3 on it cancels the consumer
/// of a quorum queue, and a classic queue has no timeout. The server replies to the redelivered
/// request with the result that it has.
#[test]
fn a_server_that_exceeds_the_consumer_timeout_answers_and_computes_once() {
    let broker = exclusive_node();
    let _check_interval = broker.set_variable("channel_tick_interval", "500");
    let _consumer_timeout = broker.set_variable("consumer_timeout", "500");
    let closes_channel = broker_version_at(broker.url()) < (4, 3);
    for queue_type in ["classic", "quorum"] {
        let queue = format!("too_long.{queue_type}");
        let args = ["--queue-type", queue_type, "--delay", "5s"];
        let server = Program::start_server_at(broker.url(), &queue, &args);
        let client =
            Program::spawn_at(broker.url(), "rpc-client", &["--queue", &queue, "-q", "30"]);
        assert_eq!(client.next_line(), "832040");
        assert_eq!(client.wait_for_exit_code(), Some(0));
        if closes_channel {
            server.wait_for_log("PRECONDITION_FAILED - delivery acknowledgement on channel");
        } else if queue_type == "quorum" {
            let cause = "which exists: it was declared again, or a request took longer than its consumer_timeout";
            server.wait_for_log(&format!(
                "cancelled the consumer of queue '{queue}', {cause}"
            ));
        }
        broker.wait_until_empty(&queue);
        assert_eq!(server.stop(), [" [.] fib(30)"], "it was computed once");
    }
}

/// A quorum queue counts deliveries, and a policy sets their limit.
#[test]
fn a_request_that_kills_every_server_is_dropped_by_a_delivery_limit() {
    let node = private_node();
    let queue = Queue::named("poison");
    node.rabbitmqctl(&[
        "set_policy",
        "poison",
        "^test\\.poison",
        r#"{"delivery-limit":2}"#,
    ]);
    let args = ["--queue-type", "quorum", "--delay", "365d"];
    let server = Program::start_server_at(node.url(), &queue, &args);
    let client = Program::spawn_at(
        node.url(),
        "rpc-client",
        &["--queue", &queue, "-q", "-t", "20s", "30"],
    );
    let mut running = Some(server);
    for _ in 0..3 {
        let server = running
            .take()
            .unwrap_or_else(|| Program::start_server_at(node.url(), &queue, &args));
        assert_eq!(server.next_line(), " [.] fib(30)");
        server.send_signal(Signal::KILL);
    }
    let survivor = Program::start_server_at(node.url(), &queue, &["--delay", "100ms"]);
    let mut peer = Peer::connect_to(node.url());
    peer.wait_for_messages(&queue, 0);
    assert_eq!(survivor.stop(), [""; 0], "the request does not reach it");
    assert_eq!(client.wait_for_exit_code(), Some(5));
    peer.delete_queue(&queue);
}
