//! The table "The wire" of the protocol, as a peer at the other end sees it.

use crate::support::broker::{exclusive_node, private_node};
use crate::support::broker_features::broker_version;
use crate::support::peer::{call, Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::proxy::{Proxy, Traffic};
use crate::support::{eventually, TEST_TIMEOUT};
use amiquip::{AmqpProperties, AmqpValue, ConsumerMessage};
use rpc_common::message::unix_time_ms;
use std::fs;
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use uuid::Uuid;

#[test]
fn a_request_matches_the_wire_table() {
    let queue = Queue::declare("request");
    let caller = thread::spawn({
        let mut call = client(&queue, &["-q", "-t", "20s", "30"]);
        move || assert_output(&mut call, 0, "832040\n", "")
    });
    let mut peer = Peer::connect();
    let request = peer.take(&queue);
    assert_eq!(request.body, b"30");
    assert_eq!(request.exchange, "");
    assert_eq!(request.routing_key, *queue);
    let properties = &request.properties;
    assert_eq!(properties.content_type().as_deref(), Some("text/plain"));
    assert_eq!(properties.delivery_mode(), &Some(2));
    assert_eq!(properties.type_(), &None);
    let expiration: u64 = properties
        .expiration()
        .as_ref()
        .expect("it is set")
        .parse()
        .expect("it is a number of milliseconds");
    assert!((1..=20_000).contains(&expiration), "{expiration}");
    let Some(AmqpValue::LongString(deadline)) = properties
        .headers()
        .as_ref()
        .and_then(|h| h.get("x-deadline-ms"))
    else {
        panic!("no deadline: {properties:?}");
    };
    let deadline = deadline.parse().expect("it is a number of milliseconds");
    let now = unix_time_ms(SystemTime::now());
    assert!(
        (now - 60_000..now + 20_000).contains(&deadline),
        "{deadline}, now {now}"
    );
    assert_eq!(properties.message_id(), properties.correlation_id());
    let id = properties.correlation_id().as_deref().expect("it is set");
    assert_eq!(
        Uuid::try_parse(id).expect("it is a UUID").get_version_num(),
        4
    );
    let reply_to = properties.reply_to().clone().expect("it is set");
    let name = reply_to
        .strip_prefix("rpc.reply.")
        .expect("the name has the prefix");
    assert_eq!(
        Uuid::try_parse(name)
            .expect("it is a UUID")
            .get_version_num(),
        4
    );
    // The tutorial's servers reply with a body and the correlation id only.
    peer.reply(&request, b"832040");
    caller.join().expect("the caller got its answer");
    eventually("the reply queue is deleted", || {
        peer.message_count(&reply_to).is_none().then_some(())
    });
}

/// An operator finds the program that a connection belongs to.
#[test]
fn the_broker_lists_connections_by_program_host_and_process() {
    let queue = Queue::named("connection_name");
    let server = Program::start_server_at(private_node().url(), &queue, &[]);
    let host = fs::read_to_string("/proc/sys/kernel/hostname");
    let version = env!("CARGO_PKG_VERSION");
    let name = format!(
        "rpc-server {version} {} {}",
        host.expect("Linux has it").trim(),
        server.process_id()
    );
    let connections = private_node().rabbitmqctl(&[
        "list_connections",
        "--no-table-headers",
        "client_properties",
    ]);
    assert!(
        connections.contains(&format!("{{\"connection_name\",\"{name}\"}}")),
        "no '{name}' in {connections}"
    );
    server.stop();
}

#[test]
fn a_reply_matches_the_wire_table() {
    let queue = Queue::named("reply");
    let _server = Program::start_server(&queue, &[]);
    for id in ["1", "5f3a1b.uniqid", "ÄÖÜ ☃", &"x".repeat(255)] {
        let reply = call(
            &queue,
            b"30",
            AmqpProperties::default().with_correlation_id(id.into()),
        );
        assert_eq!(reply.body, b"832040");
        assert_eq!(reply.exchange, "");
        let expected = AmqpProperties::default()
            .with_content_type("text/plain".into())
            .with_correlation_id(id.into());
        assert_eq!(reply.properties, expected);
    }
    let without_id = call(&queue, b"30", AmqpProperties::default());
    assert_eq!(without_id.properties.correlation_id(), &None);
}

#[test]
fn direct_reply_to_declares_no_queue() {
    let broker = exclusive_node();
    let server = Peer::connect_to(broker.url());
    server.declare_default("direct");
    for (kind, queues) in [("queue", 1), ("direct", 0)] {
        let args = [
            "--queue",
            "direct",
            "-q",
            "-t",
            "1h",
            "--reply-to",
            kind,
            "30",
        ];
        let client = Program::spawn_at(broker.url(), "rpc-client", &args);
        let request = server.take("direct");
        eventually(&format!("{queues} reply queues, --reply-to {kind}"), || {
            let names = broker.rabbitmqctl(&["list_queues", "--no-table-headers", "name"]);
            (names.matches("rpc.reply.").count() == queues).then_some(())
        });
        server.reply(&request, b"832040");
        assert_eq!(client.next_line(), "832040");
        assert_eq!(client.wait_for_exit_code(), Some(0));
    }
}

/// This is why rpc-server's replies to a direct reply-to are not mandatory: up to RabbitMQ 4.1 the
/// broker returns a mandatory one although it arrives.
#[test]
fn a_mandatory_reply_to_a_direct_reply_to_arrives_and_is_returned_before_rabbitmq_4_2() {
    let queue = Queue::declare("mandatory_direct");
    let caller = Peer::connect();
    let server = Peer::connect();
    let replies = caller.call_with_direct_reply_to(&queue);
    let request = server.take(&queue);
    let reply_to = request.properties.reply_to().as_deref().expect("it is set");
    assert_eq!(
        server.publish_mandatory(reply_to, b"832040"),
        broker_version() < (4, 2)
    );
    let reply = replies
        .receiver()
        .recv_timeout(TEST_TIMEOUT)
        .expect("the reply arrives");
    assert!(matches!(reply, ConsumerMessage::Delivery(reply) if reply.body == b"832040"));
}

/// The proxy does not see the round trip of TCP. The last round trip closes the connection.
#[test]
fn a_cold_call_takes_seven_round_trips() {
    let queue = Queue::named("round_trips");
    let _server = Program::start_server(&queue, &[]);
    for (kind, round_trips) in [("queue", 7), ("direct", 8)] {
        // On a busy machine a confirmation may arrive before the client, which does not wait for
        // it, sends the next method: that looks like one more round trip.
        eventually(
            &format!("a call with {round_trips} round trips, --reply-to {kind}"),
            || {
                let proxy = Proxy::start();
                let mut call = client(&queue, &["--reply-to", kind, "30"]);
                let start = Instant::now();
                assert_output(call.env("AMQP_URL", proxy.url()), 0, "832040\n", "");
                // It has not looked at the queue.
                let is_quick = start.elapsed() < Duration::from_millis(500);
                let round_trips_seen = 1 + proxy.round_trips();
                assert!(
                    round_trips_seen >= round_trips,
                    "{round_trips_seen}: there is a better number to promise"
                );
                (is_quick && round_trips_seen == round_trips).then_some(())
            },
        );
    }
}

#[test]
fn every_call_closes_its_connection_by_the_close_handshake() {
    let broker = exclusive_node();
    let unclean_before = broker.unclean_closes();
    let queue = "close";
    let server = Program::start_server_at(broker.url(), queue, &["--max-n", "50"]);
    Peer::connect_to(broker.url()).declare_default("close.idle");
    for (queue, args, code) in [
        (queue, &["30"][..], 0),
        (queue, &["60"], 1),
        (queue, &["30", "60", "-o", "json"], 1),
        ("close.missing", &["30"], 4),
    ] {
        client(queue, args)
            .env("AMQP_URL", broker.url())
            .assert()
            .code(code);
    }
    server.stop();
    assert_eq!(broker.unclean_closes(), unclean_before);
    // After the deadline a call gives the broker only a moment to confirm the close.
    for limit in ["650ms", "3s"] {
        eventually("a call that timed out and closed its connection", || {
            let unclean_before = broker.unclean_closes();
            let mut call = client("close.idle", &["-t", limit, "30"]);
            call.env("AMQP_URL", broker.url()).assert().code(5);
            (broker.unclean_closes() == unclean_before).then_some(())
        });
    }
}

/// The first call of two expires. The client is distant: the close handshake takes 40 ms, and has
/// that time.
#[test]
fn a_batch_in_which_a_call_expired_closes_its_connection_by_the_close_handshake() {
    let broker = exclusive_node();
    let unclean_before = broker.unclean_closes();
    let queue = "close.distant";
    let peer = Peer::connect_to(broker.url());
    peer.declare_default(queue);
    let proxy = Proxy::start_to(broker.authority());
    proxy.set_traffic(Traffic::Delayed(Duration::from_millis(20)));
    let args = ["--queue", queue, "-q", "-t", "4s", "-j", "1", "1", "2"];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    peer.take(queue); // it is not answered
    peer.reply(&peer.take(queue), b"1");
    assert_eq!(client.wait().code(), Some(5));
    assert_eq!(client.remaining_output().0, ["", "1"]);
    drop(peer); // all connections end before they are counted
    assert_eq!(broker.unclean_closes(), unclean_before);
}
