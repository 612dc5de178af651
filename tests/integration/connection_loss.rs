//! Promise: nothing is lost when a connection breaks. Servers and clients connect again and go on.

use crate::support::broker::{self, exclusive_node};
use crate::support::broker_features::permitted_queue_types;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::proxy::{Proxy, Traffic, BASIC_PUBLISH, CONNECTION_START_OK};
use crate::support::scripted_broker::{Action, ScriptedBroker, CONSUME, START_OK};
use crate::support::TEST_TIMEOUT;
use crossbeam_channel::unbounded;
use rpc_client::{Client, Config, Error};
use rpc_common::command_line::BrokerOptions;
use rustix::process::Signal;
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

#[test]
fn an_idle_server_reconnects_with_all_its_workers() {
    let queue = Queue::named("idle_reconnect");
    let proxy = Proxy::start();
    let server = Program::start_server_at(
        &proxy.url(),
        &queue,
        &["--workers", "2", "--delay", "100ms"],
    );
    for _ in 0..2 {
        proxy.close_connections();
        server.wait_for_log("retrying");
        server.wait_for_log("connected to");
        Peer::connect().wait_for_consumers(&queue, 2);
    }
    assert_output(
        &mut client(&queue, &["10", "20", "30"]),
        0,
        "55\n6765\n832040\n",
        "",
    );
    server.stop();
}

/// The broker closes the channel of a worker that lacks a permission. The connection and the other
/// workers' channels stay.
#[test]
fn a_permission_that_is_taken_away_ends_no_connection_of_a_server() {
    let broker = exclusive_node();
    let queue = "no_permission";
    let set_write_permission =
        |write| broker.rabbitmqctl(&["set_permissions", "demoted-server", ".*", write, ".*"]);
    broker.add_user("demoted-server", "secret");
    let url = format!("amqp://demoted-server:secret@{}", broker.authority());
    let server = Program::start_server_at(&url, queue, &["--workers", "2"]);
    server.wait_for_log("connected to");
    set_write_permission("");
    let client = Program::spawn_at(
        broker.url(),
        "rpc-client",
        &["--queue", queue, "-q", "-t", "1m", "30"],
    );
    let line = server.wait_for_log("ACCESS_REFUSED");
    set_write_permission(".*");
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
    let log = [vec![line], server.new_log()].concat();
    let reconnects = |line: &String| line.contains("retrying") || line.contains("connected to");
    assert!(!log.iter().any(reconnects), "{log:#?}");
    server.stop();
    Peer::connect_to(broker.url()).delete_queue(queue);
}

/// The server cannot send its reply, so the broker delivers the request again. The server has kept
/// the reply.
#[test]
fn a_busy_server_reconnects_and_answers_what_it_had_begun() {
    let queue = Queue::named("busy_reconnect");
    let proxy = Proxy::start();
    let server = Program::start_server_at(&proxy.url(), &queue, &["--delay", "3s"]);
    let caller = std::thread::spawn({
        let mut call = client(&queue, &["-q", "30"]);
        move || assert_output(&mut call, 0, "832040\n", "")
    });
    assert_eq!(server.next_line(), " [.] fib(30)");
    proxy.close_connections();
    caller.join().expect("the caller got its answer");
    assert!(server.stop().is_empty(), "it was computed again");
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_server_that_starts_before_its_broker_waits_for_it() {
    let queue = Queue::named("early_server");
    let proxy = Proxy::start();
    proxy.refuse(true);
    let server = Program::spawn_at(&proxy.url(), "rpc-server", &["--queue", &queue]);
    server.wait_for_log("retrying");
    proxy.refuse(false);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.stop();
}

#[test]
fn a_client_reconnects_and_sends_unanswered_calls_again() {
    let queue = Queue::named("client_reconnect");
    let proxy = Proxy::start();
    let server = Program::start_server(&queue, &["--delay", "2s"]);
    let client = Program::spawn_at(
        &proxy.url(),
        "rpc-client",
        &["--queue", &queue, "-v", "20", "30"],
    );
    assert_eq!(server.next_line(), " [.] fib(20)");
    proxy.close_connections();
    client.wait_for_log("connecting again");
    assert_eq!(client.next_line(), "6765");
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// No call was pending when the connection broke; the next call waits for the broker.
#[test]
fn a_batch_survives_a_broker_that_is_unreachable_between_two_calls() {
    let queue = Queue::named("away");
    let proxy = Proxy::start();
    let _server = Program::start_server(&queue, &[]);
    let args = ["--queue", &queue, "-t", "20s", "-"];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    client.write_line("20");
    assert_eq!(client.next_line(), "6765");
    proxy.refuse(true);
    proxy.close_connections();
    client.write_line("30");
    proxy.wait_for_refusals(2);
    proxy.refuse(false);
    assert_eq!(client.next_line(), "832040");
    client.close_stdin();
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// A broker that shuts down closes the socket during the handshake.
#[test]
fn a_batch_survives_a_handshake_that_breaks() {
    let queue = Queue::named("broken_handshake");
    let _server = Program::start_server(&queue, &[]);
    let proxy = Proxy::start();
    let args = ["--queue", &queue, "-t", "20s", "-"];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    client.write_line("20");
    assert_eq!(client.next_line(), "6765");
    let (login_sender, login) = unbounded();
    let on_login = move || login_sender.send(()).expect("the test waits for it");
    proxy.before_forwarding(CONNECTION_START_OK, 1, on_login);
    proxy.close_connections();
    client.write_line("30");
    login
        .recv_timeout(TEST_TIMEOUT)
        .expect("the client connects again");
    proxy.close_connections();
    assert_eq!(client.next_line(), "832040");
    client.close_stdin();
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

#[test]
fn a_socket_that_is_closed_during_the_login_is_not_called_a_wrong_password() {
    let broker = ScriptedBroker::start(START_OK, Action::CloseSocket);
    let error = format!(
        "{} closed the connection during the login: see the broker's log",
        &broker.url["amqp://".len()..]
    );
    let mut call = client("any", &["30"]);
    assert_output(
        call.env("AMQP_URL", &broker.url),
        3,
        "",
        &format!("rpc-client: {error}\n"),
    );
    let mut server = Program::spawn_at(&broker.url, "rpc-server", &[]);
    let attempts = 1 + 3; // of the client, and of the server
    for _ in 0..attempts {
        broker
            .received
            .recv_timeout(TEST_TIMEOUT)
            .expect("the server tries again");
    }
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    let (lines, log) = server.remaining_output();
    assert!(
        lines.is_empty() && log[0].ends_with(&format!("WARN ] {error}; retrying")),
        "{lines:?} {log:?}"
    );
}

/// The broker closes the connection during the login with code 530, as for a vhost that does not
/// exist.
#[test]
fn a_server_waits_while_the_broker_limits_connections() {
    let broker = exclusive_node();
    let queue = "limited";
    let limit = broker.limit_connections();
    let server = Program::spawn_at(broker.url(), "rpc-server", &["--queue", queue]);
    let warning = server.wait_for_log("; retrying");
    let error = warning
        .split_once("WARN ] ")
        .and_then(|(_, error)| error.strip_suffix("; retrying"));
    let error = error.expect("it is a warning");
    assert!(
        error.ends_with("connection limit (0) is reached"),
        "{error}"
    );
    let mut call = client(queue, &["30"]);
    assert_output(
        call.env("AMQP_URL", broker.url()),
        3,
        "",
        &format!("rpc-client: {error}\n"),
    );
    drop(limit);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.stop();
}

/// RabbitMQ may be configured to send no heartbeats. The peer drops all packets, when the
/// connection is idle (a server) or when a request is on its way (a client).
#[test]
fn a_dead_peer_is_noticed_without_heartbeats() {
    for (program, args) in [
        ("rpc-server", &[][..]),
        ("rpc-client", &["--reply-to", "direct", "-t", "1h", "30"]),
    ] {
        let broker = ScriptedBroker::start(CONSUME, Action::DropPackets);
        let _program = Program::spawn_at(
            &broker.url,
            program,
            &[&["--heartbeat", "1"], args].concat(),
        );
        for _ in 0..2 {
            let consumes = broker.received.recv_timeout(TEST_TIMEOUT);
            assert!(consumes.is_ok(), "{program} does not notice it");
        }
    }
}

/// A program that uses the library keeps its client between calls. After the connection broke, the
/// next call is like the first one of a new client: its error says that nothing was sent.
#[test]
fn a_library_client_reconnects_for_its_next_call() {
    let queue = Queue::named("between_calls");
    let proxy = Proxy::start();
    let server = Program::start_server(&queue, &[]);
    let config = Config {
        queue: queue.to_string(),
        timeout: TEST_TIMEOUT,
        broker: BrokerOptions::from_url(&proxy.url()),
        ..Config::default()
    };
    let client = Client::new(config.clone()).expect("the URL is well formed");
    for (n, answer) in [("20", "6765"), ("30", "832040")] {
        assert_eq!(
            client.call(n.as_bytes()).expect("a server answers"),
            answer.as_bytes()
        );
        proxy.close_connections();
    }
    server.stop();
    Peer::connect().delete_queue(&queue);
    let new_client = Client::new(config).expect("the URL is well formed");
    let error = new_client.call(b"30").expect_err("there is no server");
    assert!(matches!(error, Error::NoQueue { .. }), "{error}");
    // A client that has had answers knows that there was a queue, and waits for it.
    let call = std::thread::spawn(move || client.call(b"30"));
    let _server = Program::start_server(&queue, &[]);
    assert_eq!(
        call.join()
            .expect("the call ends")
            .expect("a server answers"),
        b"832040"
    );
}

/// The queue was transient and went with the broker. The call waits until a server declares the
/// queue again.
#[test]
fn a_call_that_was_sent_before_waits_for_a_queue_that_is_gone() {
    let queue = Queue::declare("queue_gone");
    let proxy = Proxy::start();
    let client = Program::spawn_at(&proxy.url(), "rpc-client", &["--queue", &queue, "-v", "30"]);
    let mut peer = Peer::connect();
    peer.wait_for_messages(&queue, 1);
    proxy.refuse(true);
    proxy.close_connections();
    peer.delete_queue(&queue);
    proxy.refuse(false);
    client.wait_for_log("no queue");
    let _server = Program::start_server(&queue, &[]);
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

#[test]
fn a_deleted_reply_queue_is_replaced_and_the_call_sent_again() {
    let broker = exclusive_node();
    let queue = "deleted";
    let server = Peer::connect_to(broker.url());
    server.declare_default(queue);
    let args = ["--queue", queue, "-v", "-t", "1h", "30"];
    let client = Program::spawn_at(broker.url(), "rpc-client", &args);
    let request = server.take(queue);
    let reply_queue = request
        .properties
        .reply_to()
        .as_deref()
        .expect("rpc-client sets it");
    broker.rabbitmqctl(&["delete_queue", reply_queue]);
    client.wait_for_log("the reply queue was deleted");
    server.reply(&server.take(queue), b"832040");
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// `stop_app` and `start_app` close all connections and delete transient queues. All calls are sent
/// before: a new call would find no queue until the server has declared it again.
#[test]
fn every_call_is_answered_when_the_broker_restarts_under_load() {
    let broker = exclusive_node();
    for queue_type in permitted_queue_types() {
        let queue = format!("restart.{queue_type}");
        let args = ["--queue-type", queue_type, "--delay", "5ms", "-q"];
        let server = Program::start_server_at(broker.url(), &queue, &args);
        let args = [
            "--queue", &queue, "-q", "-t", "1h", "-j", "300", "--repeat", "300", "30",
        ];
        let client = Program::spawn_at(broker.url(), "rpc-client", &args);
        assert_eq!(client.next_line(), "832040");
        broker.rabbitmqctl(&["stop_app"]);
        server.wait_for_log("retrying");
        broker.rabbitmqctl(&["start_app"]);
        let answers = (1..300)
            .map(|_| client.next_line())
            .filter(|answer| answer == "832040");
        assert_eq!(answers.count(), 299, "{queue_type}");
        assert_eq!(client.wait_for_exit_code(), Some(0));
        server.stop();
    }
}

#[test]
fn several_brokers_are_tried_in_turn() {
    let queue = Queue::named("several_brokers");
    let unreachable = "amqp://127.0.0.1:1";
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let silent = format!(
        "amqp://{}",
        silent.local_addr().expect("the socket is bound")
    );
    let reachable = broker::url();
    let urls = ["--url", unreachable, "--url", reachable];
    // A program begins with a random URL.
    let servers = [(); 4].map(|()| Program::start_server_at("amqp://127.0.0.1:2", &queue, &urls));
    for server in &servers {
        server.wait_for_log(&format!("connected to {}", broker::authority()));
    }
    assert_output(
        &mut client(&queue, &[&urls[..], &["-q", "30"]].concat()),
        0,
        "832040\n",
        "",
    );
    let urls = ["--url", &silent, "--url", reachable, "-t", "10s"];
    assert_output(
        &mut client(&queue, &[&urls[..], &["-q", "30"]].concat()),
        0,
        "832040\n",
        "",
    );
    let urls = ["--url", &silent, "--url", unreachable, "-t", "2s"];
    let error = format!(
        "rpc-client: 127.0.0.1:1 cannot be reached (from --url): connection refused: is RabbitMQ running there? \
         (before that: {} timed out after 9",
        silent.trim_start_matches("amqp://")
    );
    let call = client(&queue, &[&urls[..], &["30"]].concat())
        .assert()
        .code(3)
        .stdout("");
    let stderr = String::from_utf8_lossy(&call.get_output().stderr).into_owned();
    assert!(
        stderr.starts_with(&error)
            && stderr.ends_with("ms while waiting for the AMQP handshake)\n"),
        "{stderr}"
    );
    // The error of a broker that refused the client is shown rather than that of an unreachable
    // one.
    let wrong = broker::url_with_vhost("nowhere");
    let error = format!(
        "rpc-client: {} refused: NOT_ALLOWED - vhost nowhere not found: \
         is the vhost in the URL right, and may this user access it?\n",
        broker::authority()
    );
    let urls = ["--url", &wrong, "--url", unreachable, "-q", "30"];
    assert_output(&mut client(&queue, &urls), 3, "", &error);
}

/// With so many other URLs, a server that begins with a random one hardly ever begins with the
/// first two.
#[test]
fn a_server_with_a_preferred_broker_tries_the_urls_in_the_given_order() {
    let queue = Queue::named("url_order");
    let preferred = Proxy::start();
    let url = preferred.url();
    let urls = [&["amqp://127.0.0.1:1", &url][..], &[broker::url(); 50]].concat();
    let urls = urls
        .iter()
        .flat_map(|url| ["--url", url])
        .collect::<Vec<_>>();
    let server = Program::start_server(&queue, &[&urls[..], &["--url-order", "given"]].concat());
    let connected = server.wait_for_log("connected to");
    assert!(
        connected.contains(&format!("connected to {};", preferred.authority())),
        "{connected}"
    );
    // When it loses its node, it begins with that node again, and then takes the next one.
    preferred.refuse(true);
    preferred.close_connections();
    server.wait_for_log(&format!("connected to {};", broker::authority()));
    server.stop();
}

#[test]
fn after_a_broker_has_frozen_the_next_one_is_tried_first() {
    let queue = Queue::declare("frozen_first");
    let [frozen, other] = [(); 2].map(|()| Proxy::start());
    let args = [
        "--queue",
        &queue,
        "--url",
        &frozen.url(),
        "--url",
        &other.url(),
        "--heartbeat",
        "1",
        "-vv",
        "30",
    ];
    let client = Program::spawn("rpc-client", &args);
    let mut peer = Peer::connect();
    peer.wait_for_messages(&queue, 1);
    frozen.set_traffic(Traffic::Frozen);
    client.wait_for_log(&format!(
        "{} no longer answers: connecting again",
        frozen.authority()
    ));
    let next = client.wait_for_log(" accepted the connection"); // the first that is tried
    assert!(next.contains(&other.authority()), "{next}");
    peer.take(&queue);
    peer.reply(&peer.take(&queue), b"832040");
    assert_eq!(client.next_line(), "832040");
}

/// RabbitMQ 4 sends nothing on a channel while it encodes a deeply nested header, for 4 s on an
/// idle machine. If the server gave up its connection meanwhile, the next one would get the message
/// again, and so on.
#[test]
fn a_slow_answer_to_an_idle_server_does_not_end_its_connection() {
    let queue = Queue::named("slow_answer");
    let proxy = Proxy::start();
    let server = Program::start_server_at(&proxy.url(), &queue, &["--heartbeat", "60"]);
    proxy.set_traffic(Traffic::Frozen);
    thread::sleep(Duration::from_secs(20)); // after 5 s the server looks at the queue
    proxy.set_traffic(Traffic::Normal);
    assert_output(&mut client(&queue, &["-q", "30"]), 0, "832040\n", "");
    let log = server.new_log();
    assert!(
        !log.iter().any(|line| line.contains("no longer answers")),
        "{log:#?}"
    );
    assert_eq!(server.stop(), [" [.] fib(30)"]);
}

/// One frame takes more than twice the heartbeat interval, in both directions.
#[test]
fn a_slow_link_is_alive_while_bytes_arrive() {
    let queue = Queue::named("slow_link");
    let server = Program::start_server(&queue, &["--", "cat"]);
    let proxy = Proxy::start();
    let text = "x".repeat(3_000);
    let args = [
        "--queue",
        &queue,
        "--heartbeat",
        "1",
        "-t",
        "1m",
        "-v",
        "--data",
        &text,
    ];
    proxy.set_traffic_before(BASIC_PUBLISH, Traffic::ByteByByte);
    let client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    let (answers, log) = client.remaining_output();
    assert_eq!(
        (client.wait_for_exit_code(), answers),
        (Some(0), vec![text]),
        "{log:#?}"
    );
    assert!(
        !log.iter().any(|line| line.contains("connecting again")),
        "{log:#?}"
    );
    assert_eq!(server.stop(), [" [.] cat (3000 bytes)"]);
}

/// The tutorial's servers answer no heartbeats while they compute, so the broker closes their
/// connections.
#[test]
fn a_request_may_take_longer_than_the_heartbeat_timeout() {
    let queue = Queue::named("heartbeats");
    let server = Program::start_server(&queue, &["--heartbeat", "3", "--delay", "10s"]);
    let mut call = client(&queue, &["-q", "--heartbeat", "3", "30"]);
    assert_output(&mut call, 0, "832040\n", "");
    assert_eq!(server.stop(), [" [.] fib(30)"]);
}
