//! Connections that break under the programs.

use crate::support::broker::exclusive_node;
use crate::support::broker_features::permitted_queue_types;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, Program};
use crate::support::proxy::{Proxy, Traffic, CONNECTION_START_OK};
use crate::support::{broker, TEST_TIMEOUT};
use crossbeam_channel::unbounded;
use rpc_client::{Client, Config, Error, ReplyTo};
use rpc_common::target::Target;
use rustix::process::Signal;
use std::net::TcpListener;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

#[test]
fn an_idle_server_connects_again_and_serves_with_all_its_workers() {
    let queue = Queue::named("idle_reconnect");
    let proxy = Proxy::start();
    let server =
        Program::start_server_at(&proxy.url(), &queue, &["--workers", "2", "--delay", "100ms"]);
    for _ in 0..2 {
        proxy.close_connections();
        server.wait_for_log("lost the connection");
        server.wait_for_log("connected to");
        Peer::connect().wait_for_consumers(&queue, 2);
    }
    assert_output(&mut client(&queue, &["10", "20", "30"]), 0, "55\n6765\n832040\n", "");
    server.stop();
}

/// The reply cannot be sent, so that its request is delivered again, and answered once.
#[test]
fn a_busy_server_connects_again_and_answers_what_it_had_begun() {
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
    assert_eq!(server.stop(), [" [.] fib(30)"], "it was computed once more");
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn a_client_connects_again_and_sends_what_is_unanswered() {
    let queue = Queue::named("client_reconnect");
    let proxy = Proxy::start();
    let server = Program::start_server(&queue, &["--delay", "2s"]);
    let client =
        Program::spawn_at(&proxy.url(), "rpc-client", &["--queue", &queue, "-v", "20", "30"]);
    assert_eq!(server.next_line(), " [.] fib(20)");
    proxy.close_connections();
    client.wait_for_log("connecting again");
    assert_eq!(client.next_line(), "6765");
    assert_eq!(client.next_line(), "832040");
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// Nothing was in hand when the connection broke: the next call waits for the broker all the same.
#[test]
fn a_batch_outlives_a_broker_that_is_away_between_two_calls() {
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

/// A program that calls by the library keeps its client, whose connection may break between two calls: the
/// next one is then as a first one, and knows that nothing of it was sent.
#[test]
fn a_connection_that_broke_between_two_calls_is_not_missed() {
    let queue = Queue::named("between_calls");
    let proxy = Proxy::start();
    let server = Program::start_server(&queue, &[]);
    let target = Target::parse(&proxy.url()).expect("it is well formed");
    let mut client = Client::new(Config {
        brokers: target.into(),
        queue: queue.to_string(),
        timeout: TEST_TIMEOUT,
        in_flight: NonZeroUsize::MIN,
        reply_to: ReplyTo::Queue,
    });
    for (n, answer) in [("20", "6765"), ("30", "832040")] {
        assert_eq!(client.call(n).expect("it is served"), answer.as_bytes());
        proxy.close_connections();
    }
    server.stop();
    Peer::connect().delete_queue(&queue);
    let error = client.call("30").expect_err("nobody serves");
    assert!(matches!(error, Error::NoServer { .. }), "{error}");
}

/// A broker that shuts down in the middle of the handshake looks as if it refused the password.
#[test]
fn a_batch_outlives_a_handshake_that_breaks() {
    let queue = Queue::named("broken_handshake");
    let _server = Program::start_server(&queue, &[]);
    let proxy = Proxy::start();
    let args = ["--queue", &queue, "-t", "20s", "-"];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    client.write_line("20");
    assert_eq!(client.next_line(), "6765");
    let (logs_in, login) = unbounded();
    let act = move || logs_in.send(()).expect("it is waited for");
    proxy.before_forwarding(CONNECTION_START_OK, 1, act);
    proxy.close_connections();
    client.write_line("30");
    login.recv_timeout(TEST_TIMEOUT).expect("it connects again");
    proxy.close_connections();
    assert_eq!(client.next_line(), "832040");
    client.close_stdin();
    assert_eq!(client.wait_for_exit_code(), Some(0));
}

/// The application is stopped and started, which closes all connections and forgets what is transient. All
/// calls are sent before that: a new one would find no queue while the server has not declared it again.
#[test]
fn a_broker_may_be_restarted_under_load() {
    let broker = exclusive_node();
    for queue_type in permitted_queue_types() {
        let queue = format!("restart.{queue_type}");
        let args = ["--queue-type", queue_type, "--delay", "5ms", "-q"];
        let server = Program::start_server_at(broker.url(), &queue, &args);
        let args = ["--queue", &queue, "-q", "-t", "1h", "-j", "300", "--repeat", "300", "30"];
        let client = Program::spawn_at(broker.url(), "rpc-client", &args);
        assert_eq!(client.next_line(), "832040");
        broker.rabbitmqctl(&["stop_app"]);
        server.wait_for_log("trying again");
        broker.rabbitmqctl(&["start_app"]);
        let answers = (1..300).map(|_| client.next_line()).filter(|answer| answer == "832040");
        assert_eq!(answers.count(), 299, "{queue_type}");
        assert_eq!(client.wait_for_exit_code(), Some(0));
        server.stop();
    }
}

/// Far away the broker takes a while to say how the queue is, and meanwhile a call may run out of time: the
/// others keep their connection, and are sent once.
#[test]
fn a_call_that_ends_takes_no_other_with_it() {
    let queue = Queue::named("far_away");
    let proxy = Proxy::start();
    let server = Program::start_server(&queue, &["--workers", "2", "--delay", "5s"]);
    proxy.set_traffic(Traffic::Delayed(Duration::from_millis(50)));
    let args = ["--queue", &queue, "-q", "-t", "8s", "-"];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    for n in ["11", "12", "13"] {
        client.write_line(n);
    }
    assert_eq!(client.next_line(), "89");
    client.write_line("14");
    client.close_stdin();
    let answers = ["144", "", "377"].map(|_| client.next_line());
    assert_eq!(answers, ["144", "", "377"], "the third waited for a worker for too long");
    assert_eq!(client.wait_for_exit_code(), Some(5));
    assert_eq!(server.stop().iter().filter(|line| line.ends_with("fib(14)")).count(), 1);
}

/// The queue went with the broker; the call waits until a server declares it again.
#[test]
fn a_request_that_was_sent_before_is_not_given_up_because_its_queue_is_gone() {
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
fn several_brokers_are_tried_in_turn() {
    let queue = Queue::named("several_brokers");
    let nobody = "amqp://127.0.0.1:1";
    let silent = TcpListener::bind("127.0.0.1:0").expect("there are ports");
    let silent = format!("amqp://{}", silent.local_addr().expect("it is bound"));
    let somebody = broker::url();
    let urls = ["--url", nobody, "--url", somebody];
    // It begins with any of them.
    let servers = [(); 4].map(|()| Program::start_server_at("amqp://127.0.0.1:2", &queue, &urls));
    for server in &servers {
        server.wait_for_log(&format!("connected to {}", broker::authority()));
    }
    assert_output(&mut client(&queue, &[&urls[..], &["-q", "30"]].concat()), 0, "832040\n", "");
    let urls = ["--url", &silent, "--url", somebody, "-t", "10s"];
    assert_output(&mut client(&queue, &[&urls[..], &["-q", "30"]].concat()), 0, "832040\n", "");
    let urls = ["--url", &silent, "--url", nobody, "-t", "2s"];
    let error = "rpc-client: cannot reach 127.0.0.1:1: connection refused: is RabbitMQ running there, or AMQP_URL to be set?\n";
    assert_output(&mut client(&queue, &[&urls[..], &["30"]].concat()), 3, "\n", error);
    // That one is away hides nothing that another one has against us.
    let wrong = broker::url_with_vhost("nowhere");
    let error = format!(
        "rpc-client: {} refused: NOT_ALLOWED - vhost nowhere not found: \
         is the vhost in the URL right, and open to this user?\n",
        broker::authority()
    );
    let urls = ["--url", &wrong, "--url", nobody, "-q", "30"];
    assert_output(&mut client(&queue, &urls), 3, "\n", &error);
}

/// It waits for a broker as it does for one that is back.
#[test]
fn a_server_may_start_before_its_broker() {
    let queue = Queue::named("early_server");
    let proxy = Proxy::start();
    proxy.refuse(true);
    let server = Program::spawn_at(&proxy.url(), "rpc-server", &["--queue", &queue]);
    server.wait_for_log("trying again");
    proxy.refuse(false);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.stop();
}

/// The tutorial's servers do not answer heartbeats while they compute, and are cut off.
#[test]
fn a_request_may_take_longer_than_the_heartbeats() {
    let queue = Queue::named("heartbeats");
    let server = Program::start_server(&queue, &["--heartbeat", "3", "--delay", "10s"]);
    let mut call = client(&queue, &["-q", "--heartbeat", "3", "30"]);
    assert_output(&mut call, 0, "832040\n", "");
    assert_eq!(server.stop(), [" [.] fib(30)"]);
}

#[test]
fn a_frozen_broker_does_not_keep_a_server_from_stopping() {
    let queue = Queue::named("frozen_stop");
    let proxy = Proxy::start();
    let mut server = Program::start_server_at(&proxy.url(), &queue, &["--heartbeat", "600"]);
    proxy.set_traffic(Traffic::Frozen);
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_frozen_broker_does_not_keep_a_server_from_stopping_before_it_has_begun() {
    let queue = Queue::named("frozen_start");
    let proxy = Proxy::start();
    proxy.set_traffic(Traffic::Frozen);
    let args = ["--queue", &queue, "--heartbeat", "600"];
    let mut server = Program::spawn_at(&proxy.url(), "rpc-server", &args);
    server.send_signal(Signal::TERM);
    assert_ne!(server.wait().code(), Some(3), "it is no error to be stopped");
}

#[test]
fn a_frozen_broker_does_not_keep_a_call_beyond_its_deadline() {
    let queue = Queue::declare("frozen_call");
    let mut peer = Peer::connect();
    let proxy = Proxy::start();
    let args = ["--queue", &queue, "-t", "5s", "--heartbeat", "600", "30"];
    let client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    let begun = Instant::now();
    peer.wait_for_messages(&queue, 1);
    proxy.set_traffic(Traffic::Frozen);
    assert_eq!(client.wait_for_exit_code(), Some(5));
    assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
}
