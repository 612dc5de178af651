//! The request queue: existing, missing, deleted, not permitted, or without consumers.

use crate::support::broker::{self, exclusive_node, private_node};
use crate::support::broker_features::{permitted_queue_types, report_not_applicable};
use crate::support::peer::{call, default_queue_type, permits_transient_queues, Peer, Queue};
use crate::support::programs::{assert_output, client, command, Program};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use std::thread;

#[test]
fn a_server_uses_an_existing_queue_of_any_type() {
    for queue_type in permitted_queue_types() {
        let queue = Queue::named(&format!("adopt_{queue_type}"));
        Peer::connect().declare(&queue, queue_type);
        for asked in ["auto", queue_type] {
            let server = Program::start_server(&queue, &["--queue-type", asked]);
            server.wait_for_log(&format!("using existing queue '{}'", &*queue));
            assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
            server.stop();
        }
    }
}

#[test]
fn an_existing_queue_of_another_type_than_asked_for_is_exit_code_3() {
    for queue_type in permitted_queue_types() {
        let queue = Queue::named(&format!("other_{queue_type}"));
        Peer::connect().declare(&queue, queue_type);
        for asked in permitted_queue_types()
            .into_iter()
            .filter(|asked| *asked != queue_type)
        {
            let mut server = command("rpc-server");
            server.args(["--queue", &queue, "--queue-type", asked]);
            let output = server.assert().code(3).stdout("").get_output().clone();
            let log = String::from_utf8_lossy(&output.stderr);
            let hint = "use --queue-type auto to use the queue as it is, or delete it";
            assert!(
                log.contains("refused: PRECONDITION_FAILED - inequivalent arg")
                    && log.contains(hint),
                "{log}"
            );
        }
    }
}

#[test]
fn what_others_have_set_besides_the_type_of_a_queue_is_accepted() {
    let queue = Queue::named("limited");
    Peer::connect().declare_with_max_length(&queue, "classic", 10);
    let server = Program::start_server(&queue, &["--queue-type", "classic"]);
    for argument in ["x-max-length", "x-overflow"] {
        let warning = server.wait_for_log("differs from its declaration, and is used as it is");
        let sentence = format!("PRECONDITION_FAILED - inequivalent arg '{argument}' for queue");
        assert!(warning.contains(&sentence), "{warning}");
    }
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
    server.stop();
}

/// The broker names the other arguments first.
#[test]
fn another_type_is_noticed_behind_other_differences() {
    for (declared, asked) in [("classic", "quorum"), ("quorum", "classic")] {
        let queue = Queue::named(&format!("limited_{declared}"));
        Peer::connect().declare_with_max_length(&queue, declared, 10);
        let mut server = command("rpc-server");
        server.args(["--queue", &queue, "--queue-type", asked]);
        let output = server.assert().code(3).stdout("").get_output().clone();
        let log = String::from_utf8_lossy(&output.stderr);
        let sentence = "refused: PRECONDITION_FAILED - inequivalent arg 'x-queue-type'";
        assert!(log.contains(sentence), "{log}");
    }
}

/// Every worker would get every request.
#[test]
fn a_stream_is_exit_code_3() {
    let queue = Queue::named("stream");
    let limited = Queue::named("stream_with_limits");
    let peer = Peer::connect();
    peer.declare(&queue, "stream");
    peer.declare_stream_with_limits(&limited);
    for queue in [&*queue, &*limited] {
        for asked in [&["auto"], &permitted_queue_types()[..]].concat() {
            let error = format!(
                "rpc-server: {} has queue '{queue}' as a stream, which delivers every request to every worker: use a classic or a quorum queue\n",
                broker::authority()
            );
            let mut server = command("rpc-server");
            server.args(["--queue", queue, "--queue-type", asked]);
            assert_output(&mut server, 3, "", &error);
        }
    }
}

/// A message may have been in a stream before.
#[test]
fn a_request_with_the_header_of_a_stream_is_answered() {
    let queue = Queue::named("stream_header");
    let server = Program::start_server(&queue, &[]);
    let header = ("x-stream-offset".to_owned(), AmqpValue::LongLongInt(7));
    let properties = AmqpProperties::default().with_headers(FieldTable::from([header]));
    assert_eq!(call(&queue, b"30", properties).body, b"832040");
    server.stop();
}

#[test]
fn a_classic_queue_is_classic_in_a_vhost_whose_default_type_is_quorum() {
    let node = private_node();
    let vhost = "default-quorum";
    node.rabbitmqctl(&["add_vhost", vhost, "--default-queue-type", "quorum"]);
    node.rabbitmqctl(&["set_permissions", "-p", vhost, "guest", ".*", ".*", ".*"]);
    let url = format!("{}/{vhost}", node.url());
    let server = Program::start_server_at(&url, "durable", &["--queue-type", "classic"]);
    server.wait_for_log("declared queue 'durable' (classic)");
    let queues = node.rabbitmqctl(&[
        "list_queues",
        "-p",
        vhost,
        "--no-table-headers",
        "name",
        "type",
        "durable",
    ]);
    assert!(queues.contains("durable\tclassic\ttrue"), "{queues}");
    server.stop();
    node.rabbitmqctl(&["delete_vhost", vhost]);
}

/// A second declaration with the same arguments succeeds; with other arguments the broker answers
/// 406.
#[test]
fn a_server_declares_a_missing_queue_with_the_type_of_its_option() {
    let auto = ("auto", default_queue_type(broker::url()));
    let explicit = permitted_queue_types()
        .into_iter()
        .map(|queue_type| (queue_type, queue_type));
    for (asked, declared) in explicit.chain([auto]) {
        let queue = Queue::named(&format!("declare_{asked}"));
        let server = Program::start_server(&queue, &["--queue-type", asked]);
        Peer::connect().declare(&queue, declared);
        server.stop();
    }
}

/// RabbitMQ 4.3 can be configured not to permit transient queues; it then closes the connection.
#[test]
fn a_transient_queue_that_the_broker_does_not_permit_is_exit_code_3() {
    if permits_transient_queues(broker::url()) {
        return report_not_applicable("", "the broker permits transient queues");
    }
    let queue = Queue::named("not_permitted");
    let mut server = command("rpc-server");
    server.args(["--queue", &queue, "--queue-type", "transient"]);
    let output = server.assert().code(3).stdout("").get_output().clone();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("transient_nonexcl_queues"), "{log}");
}

#[test]
fn several_servers_can_declare_the_queue_at_the_same_time() {
    let queue = Queue::named("race");
    let queue = &*queue;
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || Program::start_server(queue, &[]).stop());
        }
    });
}

#[test]
fn a_deleted_queue_is_declared_again() {
    let queue = Queue::named("deleted");
    let server = Program::start_server(&queue, &["--workers", "2"]);
    let mut peer = Peer::connect();
    peer.wait_for_consumers(&queue, 2);
    peer.delete_queue(&queue);
    server.wait_for_log("was deleted");
    server.wait_for_log("declared queue");
    assert_output(&mut client(&queue, &["-q", "30"]), 0, "832040\n", "");
    server.stop();
}

/// Requests are lost with the queue, but all servers go on.
#[test]
fn a_queue_that_is_deleted_thirty_times_under_load_keeps_all_its_servers() {
    let queue = Queue::named("deleted_often");
    let args = [
        "--queue-type",
        "quorum",
        "--delay",
        "20ms",
        "--prefetch",
        "2",
    ];
    let servers = [(); 3].map(|()| Program::start_server(&queue, &args));
    let mut peer = Peer::connect();
    for _ in 0..30 {
        // RabbitMQ 3.10 does not end the flow control of one that publishes to a deleted queue.
        let load = Peer::connect();
        for _ in 0..100 {
            load.publish(
                &queue,
                b"20",
                AmqpProperties::default().with_reply_to("nobody".into()),
            );
        }
        peer.delete_queue(&queue);
        peer.wait_for_consumers(&queue, 3);
        // Longer than a second: then the servers' pauses start again with the shortest one.
        assert_output(
            &mut client(&queue, &["-q", "--repeat", "200", "30"]),
            0,
            &"832040\n".repeat(200),
            "",
        );
    }
    for server in servers {
        server.stop();
    }
}

/// It has happened that a queue was deleted under load, declared again, and did not know the
/// consumer of a channel. The test makes a queue forget its consumer.
#[test]
fn a_server_that_its_queue_has_forgotten_consumes_again() {
    let broker = exclusive_node();
    let queue = "forgotten";
    let server = Program::start_server_at(broker.url(), queue, &["--queue-type", "classic"]);
    let mut peer = Peer::connect_to(broker.url());
    peer.wait_for_consumers(queue, 1);
    broker.forget_consumers(queue);
    peer.wait_for_consumers(queue, 0);
    let client = Program::spawn_at(
        broker.url(),
        "rpc-client",
        &["--queue", queue, "-q", "-t", "1m", "30"],
    );
    server.wait_for_log(
        "delivers no request to this consumer, though some are waiting: consuming again",
    );
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
    server.stop();
    peer.delete_queue(queue);
}

#[test]
fn a_queue_without_consumers_causes_a_warning_and_the_client_waits() {
    let queue = Queue::declare("no_consumers");
    let client = Program::spawn("rpc-client", &["--queue", &queue, "30"]);
    let warning = client.wait_for_log("no server is consuming");
    let expected = format!(
        "rpc-client: warning: no server is consuming '{}'; waiting up to 30s",
        &*queue
    );
    assert_eq!(warning, expected);
    let _server = Program::start_server(&queue, &[]);
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// 405 means that it exists.
#[test]
fn an_exclusive_queue_exists_and_its_consumers_are_unknown() {
    let peer = Peer::connect();
    let queue = peer.declare_exclusive();
    let address = broker::authority();
    let shown =
        format!("{queue} on {address}: exclusive to another connection, consumers unknown\n");
    assert_output(&mut client(&queue, &["--check"]), 0, &shown, "");
    let json = client(&queue, &["--check", "-o", "json"])
        .assert()
        .code(0)
        .stderr("");
    let json = String::from_utf8_lossy(&json.get_output().stdout).into_owned();
    assert!(
        json.contains(r#""consumers":null,"messages":null"#),
        "{json}"
    );
    let answer = thread::spawn({
        let queue = queue.clone();
        move || {
            peer.reply(&peer.take(&queue), b"832040");
            peer // its connection has the queue
        }
    });
    assert_output(&mut client(&queue, &["--no-wait", "30"]), 0, "832040\n", "");
    let _peer = answer.join().expect("the peer sent its reply");
    let error = format!(
        "rpc-client: fib(30): no answer from '{queue}' on {address} within 3s: no server, or all are busy\n"
    );
    let mut call = client(&queue, &["--no-wait", "-q", "-t", "3s", "30"]);
    assert_output(&mut call, 5, "", &error);
}
