//! Programs that end in the middle of their work, by a signal or by their requests.

use crate::support::broker::{exclusive_node, private_node, Node};
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::proxy::{Proxy, BASIC_ACK, BASIC_PUBLISH};
use rpc_common::fib::fib;
use rustix::process::Signal;
use std::thread;

/// The first server is killed when its reply, or its ack, does not pass any more: the broker gives the
/// request to the second one.
fn a_server_dies_before(queue: &Queue, method: [u8; 4]) -> (Program, Program) {
    let proxy = Proxy::start();
    let mut first = Program::start_server_at(&proxy.url(), queue, &["--heartbeat", "600"]);
    proxy.freeze_before(method);
    let client =
        Program::spawn("rpc-client", &["--queue", queue, "-v", "-j", "1", "20", "30", "40"]);
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
fn a_server_that_dies_before_its_reply_is_replaced() {
    let queue = Queue::named("dies_before_reply");
    let (client, second) = a_server_dies_before(&queue, BASIC_PUBLISH);
    for answer in ["6765", "832040", "102334155"] {
        assert_eq!(client.next_line(), answer);
    }
    assert_eq!(client.wait_for_exit_code(), Some(0));
    assert_eq!(second.stop(), [" [.] fib(20)", " [.] fib(30)", " [.] fib(40)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

/// The answer is there, and the broker has the request computed once more: that reply is discarded.
#[test]
fn a_server_that_dies_between_reply_and_ack_is_replaced_and_the_second_reply_discarded() {
    let queue = Queue::named("dies_before_ack");
    let (client, second) = a_server_dies_before(&queue, BASIC_ACK);
    client.wait_for_log("discarded a reply to no call in hand, 1 in all");
    for answer in ["832040", "102334155"] {
        assert_eq!(client.next_line(), answer);
    }
    assert_eq!(client.wait_for_exit_code(), Some(0));
    assert_eq!(second.stop().len(), 3);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_server_that_dies_after_its_ack_takes_nothing_with_it() {
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

/// Under load one of three servers is stopped: its callers do not notice, and nothing is computed twice.
/// The broker sees every connection closed as it should be.
#[test]
fn a_server_is_stopped_under_full_load() {
    let broker = exclusive_node();
    let unclean = unclean_closes(&broker);
    for prefetch in ["1", "64"] {
        let queue = format!("drain.{prefetch}");
        let servers = [(); 3].map(|()| {
            Program::start_server_at(
                broker.url(),
                &queue,
                &["--prefetch", prefetch, "--workers", "2"],
            )
        });
        let numbers = (0..3000).map(|n| n % 90).collect::<Vec<u64>>();
        let stdin = numbers.iter().map(|n| format!("{n}\n")).collect::<String>();
        let answers = numbers.iter().map(|&n| format!("{}\n", fib(n))).collect::<String>();
        let mut call = client(&queue, &["-j", "256", "-"]);
        call.env("AMQP_URL", broker.url()).write_stdin(stdin);
        let caller = thread::spawn(move || assert_output(&mut call, 0, &answers, ""));
        let [first, others @ ..] = servers;
        let mut begun = (0..50).map(|_| first.next_line()).collect::<Vec<_>>();
        begun.extend(first.stop());
        caller.join().expect("the caller got its answers");
        begun.extend(others.into_iter().flat_map(Program::stop));
        assert_eq!(begun.len(), numbers.len(), "each was computed once");
    }
    assert_eq!(unclean_closes(&broker), unclean);
}

/// Connections are closed as AMQP has it, however a call ends.
#[test]
fn every_call_says_farewell() {
    let broker = exclusive_node();
    let unclean = unclean_closes(&broker);
    let queue = "farewell";
    let server = Program::start_server_at(broker.url(), queue, &["--max-n", "50"]);
    Peer::connect_to(broker.url()).declare_default("farewell.idle");
    for (queue, args, code) in [
        (queue, &["30"][..], 0),
        (queue, &["60"], 1),
        (queue, &["30", "60", "-o", "json"], 1),
        ("farewell.missing", &["30"], 4),
    ] {
        client(queue, args).env("AMQP_URL", broker.url()).assert().code(code);
    }
    server.stop();
    assert_eq!(unclean_closes(&broker), unclean);
    // A call that has run out of time gives the broker only a moment to answer.
    for limit in ["650ms", "3s"] {
        eventually("a farewell of a call that has run out of time", || {
            let unclean = unclean_closes(&broker);
            let mut call = client("farewell.idle", &["-t", limit, "30"]);
            call.env("AMQP_URL", broker.url()).assert().code(5);
            (unclean_closes(&broker) == unclean).then_some(())
        });
    }
}

/// How many connections that broker has seen end without a farewell, when there are none any more.
fn unclean_closes(broker: &Node) -> usize {
    eventually("the end of all connections", || {
        let connections = broker.rabbitmqctl(&["list_connections", "--no-table-headers", "name"]);
        connections.trim().is_empty().then_some(())
    });
    broker.log().matches("client unexpectedly closed TCP connection").count()
}

/// A quorum queue counts deliveries, and its policy says how many a request is worth.
#[test]
fn a_request_that_kills_every_server_is_dropped_by_a_delivery_limit() {
    let node = private_node();
    let queue = Queue::named("poison");
    node.rabbitmqctl(&["set_policy", "poison", "^test\\.poison", r#"{"delivery-limit":2}"#]);
    let args = ["--queue-type", "quorum", "--delay", "365d"];
    let server = Program::start_server_at(node.url(), &queue, &args);
    let client =
        Program::spawn_at(node.url(), "rpc-client", &["--queue", &queue, "-q", "-t", "20s", "30"]);
    let mut kill = Some(server);
    for _ in 0..3 {
        let server =
            kill.take().unwrap_or_else(|| Program::start_server_at(node.url(), &queue, &args));
        assert_eq!(server.next_line(), " [.] fib(30)");
        server.send_signal(Signal::KILL);
    }
    let survivor = Program::start_server_at(node.url(), &queue, &["--delay", "100ms"]);
    let mut peer = Peer::connect_to(node.url());
    peer.wait_for_messages(&queue, 0);
    assert_eq!(survivor.stop(), [""; 0], "it never gets there");
    assert_eq!(client.wait_for_exit_code(), Some(5));
    peer.delete_queue(&queue);
}
