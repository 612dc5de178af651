//! Promise: a connection that has ended is known at once. Nothing that is computed is thrown away,
//! and nothing runs twice or for nobody because a connection ended.

use crate::support::broker::{exclusive_node, private_node};
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, call_in_background, client, Program};
use crate::support::proxy::{Proxy, Traffic};
use crate::support::{eventually, Folder};
use amiquip::AmqpProperties;
use rustix::process::Signal;
use std::fs;
use std::thread::JoinHandle;
use std::time::Duration;

/// A server behind a proxy, whose program waits for a file if the request is `wait`.
struct GatedServer {
    queue: Queue,
    folder: Folder,
    proxy: Proxy,
    server: Program,
}

impl GatedServer {
    fn start(test: &str, options: &[&str]) -> Self {
        let queue = Queue::named(test);
        let folder = Folder::new(test);
        let proxy = Proxy::start();
        let script = format!(
            "if [ \"$(cat)\" = wait ]; then while [ ! -e {} ]; do sleep 0.05; done; fi; echo done",
            folder.path("gate")
        );
        let args = [options, &["--", "sh", "-c", &script]].concat();
        let server = Program::start_server_at(&proxy.url(), &queue, &args);
        GatedServer {
            queue,
            folder,
            proxy,
            server,
        }
    }

    /// Makes a call whose program waits, until the program has begun.
    fn call(&self) -> JoinHandle<()> {
        let call = call_in_background(&self.queue, &["--data", "wait"], "done\n");
        assert!(self.server.next_line().ends_with("(4 bytes)"));
        call
    }

    /// Ends the server's connection, and waits until the server knows.
    fn reconnect(&self) {
        self.proxy.close_connections();
        self.server.wait_for_log("retrying");
    }

    /// Lets the programs end.
    fn open_gate(&self) {
        fs::write(self.folder.path("gate"), "").expect("the folder can be written");
    }

    /// Stops the server. Returns the number of further runs, and the last line of the log.
    fn stop(self) -> (usize, String) {
        let runs = self.server.send_stop_and_wait();
        (runs.0.len(), runs.1.last().cloned().unwrap_or_default())
    }
}

#[test]
fn a_program_runs_once_when_its_server_loses_the_connection() {
    for workers in ["1", "2"] {
        let served = GatedServer::start("keeps_reply", &["--workers", workers]);
        let call = served.call();
        served.reconnect();
        served.open_gate();
        call.join().expect("the caller got its answer");
        let (runs, summary) = served.stop();
        assert_eq!(runs, 0, "no further run");
        assert!(summary.contains("stopped: 1 served, 0 failed"), "{summary}");
    }
}

#[test]
fn a_program_runs_once_when_its_caller_loses_the_connection() {
    for workers in ["1", "2"] {
        let served = GatedServer::start("keeps_returned_reply", &["--workers", workers]);
        let proxy = Proxy::start();
        let mut call = client(&served.queue, &["-q", "--data", "wait"]);
        call.env("AMQP_URL", proxy.url());
        let call = std::thread::spawn(move || assert_output(&mut call, 0, "done\n", ""));
        assert!(served.server.next_line().ends_with("(4 bytes)"));
        proxy.close_connections();
        if workers == "2" {
            served
                .server
                .wait_for_log("another worker has this request in hand");
        } else {
            Peer::connect().wait_for_messages(&served.queue, 1); // it is sent again
        }
        served.open_gate();
        call.join().expect("the caller got its answer");
        assert_eq!(served.stop().0, 0, "no further run");
    }
}

#[test]
fn a_program_runs_once_when_both_lose_their_connections() {
    let served = GatedServer::start("keeps_both", &["--workers", "3"]);
    let proxy = Proxy::start();
    let mut call = client(&served.queue, &["-q", "--data", "wait"]);
    call.env("AMQP_URL", proxy.url());
    let call = std::thread::spawn(move || assert_output(&mut call, 0, "done\n", ""));
    assert!(served.server.next_line().ends_with("(4 bytes)"));
    proxy.close_connections();
    served.reconnect();
    served.open_gate();
    call.join().expect("the caller got its answer");
    assert_eq!(served.stop().0, 0, "no further run");
}

#[test]
fn deliveries_of_a_connection_that_has_ended_are_not_run() {
    let served = GatedServer::start("old_deliveries", &["--prefetch", "20"]);
    let call = served.call();
    let others = ["--data", "quick", "--repeat", "10", "-j", "10"];
    let others = call_in_background(&served.queue, &others, DONE_10);
    // The prefetch takes them.
    eventually("the prefetch of the requests", || {
        let table = private_node_counts(&served.queue);
        (table.as_deref() == Some("0\t11")).then_some(())
    });
    served.reconnect();
    served.open_gate();
    call.join().expect("the caller got its answer");
    others.join().expect("the caller got its answers");
    let (runs, summary) = served.stop();
    assert_eq!(runs, 10, "{summary}");
}

/// Each reply ends with a newline of its own.
const DONE_10: &str =
    "done\n\ndone\n\ndone\n\ndone\n\ndone\n\ndone\n\ndone\n\ndone\n\ndone\n\ndone\n\n";

/// The numbers of ready and of unacknowledged messages.
fn private_node_counts(queue: &str) -> Option<String> {
    let columns = ["name", "messages_ready", "messages_unacknowledged"];
    let args = [&["list_queues", "--no-table-headers"][..], &columns].concat();
    let table = private_node().rabbitmqctl(&args);
    let row = table
        .lines()
        .find_map(|line| line.strip_prefix(queue)?.strip_prefix('\t'));
    row.map(str::to_owned)
}

/// Each new connection delivers the request in hand again, to another worker.
#[test]
fn one_worker_at_most_waits_for_a_request_in_hand() {
    let served = GatedServer::start("one_waits", &["--workers", "3"]);
    let call = served.call();
    for _ in 0..4 {
        served.reconnect();
        served.server.wait_for_log("connected to");
        // A worker has the redelivered request.
        eventually("the delivery", || {
            (private_node_counts(&served.queue).as_deref() == Some("0\t1")).then_some(())
        });
    }
    assert_output(
        &mut client(&served.queue, &["--data", "quick"]),
        0,
        "done\n",
        "",
    );
    served.open_gate();
    call.join().expect("the caller got its answer");
    assert_eq!(served.stop().0, 1, "that of the quick request");
}

#[test]
fn a_server_that_may_not_publish_replies_ends_with_the_brokers_reason() {
    let node = private_node();
    let queue = Queue::declare("no_replies");
    node.rabbitmqctl(&["add_user", "silent", "secret"]);
    node.rabbitmqctl(&["set_permissions", "silent", ".*", "^test", ".*"]);
    Peer::connect().publish(
        &queue,
        b"30",
        AmqpProperties::default().with_reply_to("to".into()),
    );
    let url = format!("amqp://silent:secret@{}", node.authority());
    let mut server = Program::spawn_at(&url, "rpc-server", &["--queue", &queue]);
    assert_eq!(server.wait().code(), Some(3));
    let (stdout, log) = server.remaining_output();
    assert!(stdout.is_empty());
    let error = log.last().expect("the error is the last line");
    assert!(
        error.starts_with("rpc-server: ")
            && error.contains("amq.default")
            && error.contains("permission"),
        "{log:?}"
    );
    assert_eq!(
        Peer::connect().message_count(&queue),
        Some(1),
        "nothing ran"
    );
}

/// RabbitMQ 3 closes the connection at such a reply.
#[test]
fn a_made_up_name_of_direct_reply_to_does_not_end_the_connection_of_the_others() {
    let queue = Queue::named("made_up");
    let server = Program::start_server(&queue, &["-q"]);
    let peer = Peer::connect();
    for number in 0..20 {
        let name = format!("amq.rabbitmq.reply-to.%%%.{}", number % 10);
        let properties = AmqpProperties::default().with_reply_to(name);
        peer.publish(&queue, b"30", properties.with_correlation_id("id".into()));
    }
    let answers = "832040\n".repeat(20);
    let args = ["-q", "--repeat", "20", "30"];
    assert_output(&mut client(&queue, &args), 0, &answers, "");
    eventually("an empty queue", || {
        (private_node_counts(&queue).is_none_or(|counts| counts == "0\t0")).then_some(())
    });
    server.send_signal(Signal::TERM);
    let log = server.remaining_output().1;
    assert!(!log.iter().any(|line| line.contains("retrying")), "{log:?}");
}

/// The isolated connection cannot be opened, and the reply would end the only one.
#[test]
fn a_request_whose_reply_ends_connections_is_rejected_at_last() {
    let node = exclusive_node();
    node.add_user("single", "secret");
    node.rabbitmqctl(&["set_user_limits", "single", r#"{"max-connections":1}"#]);
    let queue = "ends_connections";
    let url = format!("amqp://single:secret@{}", node.authority());
    let server = Program::start_server_at(&url, queue, &[]);
    let made_up = AmqpProperties::default().with_reply_to("amq.rabbitmq.reply-to.x.y".into());
    Peer::connect_to(node.url()).publish(queue, b"30", made_up);
    server.wait_for_log("rejected");
    node.wait_until_empty(queue);
    let runs = server.stop();
    assert!(runs.len() <= 3, "{runs:?}");
}

#[test]
fn the_other_requests_of_a_caller_that_has_gone_are_not_run() {
    let queue = Queue::named("gone_batch");
    let server = Program::start_server(&queue, &["--", "sleep", "1000"]);
    let mut caller = Program::spawn(
        "rpc-client",
        &[
            "--queue", &queue, "-q", "-j", "6", "--data", "x", "--repeat", "6",
        ],
    );
    assert!(server.next_line().ends_with("(1 byte)"));
    Peer::connect().wait_for_messages(&queue, 5);
    caller.send_signal(Signal::KILL);
    caller.wait();
    let line = server.wait_for_log("rejected a request");
    assert!(
        line.contains("INFO") && line.contains("its caller has gone"),
        "{line}"
    );
    private_node().wait_until_empty(&queue);
    let (runs, log) = server.send_stop_and_wait();
    assert_eq!(runs, [""; 0], "no further run");
    let summary = log.last().expect("the summary is the last line");
    assert!(
        summary.contains("1 failed, 0 expired, 5 rejected"),
        "{summary}"
    );
}

#[test]
fn sigterm_stops_the_programs_of_a_server_without_a_connection() {
    let served = GatedServer::start("stop_disconnected", &[]);
    let properties = AmqpProperties::default().with_reply_to("nobody".into());
    Peer::connect().publish(&served.queue, b"wait", properties);
    assert!(served.server.next_line().ends_with("(4 bytes)"));
    served.proxy.refuse(true);
    served.proxy.close_connections();
    served.server.wait_for_log("retrying");
    assert_eq!(served.stop().0, 0);
}

#[test]
fn a_connection_that_ends_during_a_stop_stops_the_programs() {
    let served = GatedServer::start("lost_at_stop", &[]);
    let properties = AmqpProperties::default().with_reply_to("nobody".into());
    Peer::connect().publish(&served.queue, b"wait", properties);
    assert!(served.server.next_line().ends_with("(4 bytes)"));
    served.server.send_signal(Signal::TERM);
    served.server.wait_for_log("stopping");
    served.proxy.close_connections();
    served
        .server
        .wait_for_log("giving up the requests that have begun");
    assert_eq!(served.server.wait_for_exit_code(), Some(0));
}

/// About 0.5 MB/s: more than the sockets buffer, and more than 5 s.
#[test]
fn a_stop_waits_for_a_reply_while_the_broker_takes_some_of_it() {
    const SIZE: usize = 7_000_000;
    let queue = Queue::named("slow_reply");
    let proxy = Proxy::start();
    let script = format!("head -c {SIZE} /dev/zero");
    let server = Program::start_server_at(&proxy.url(), &queue, &["--", "sh", "-c", &script]);
    let mut call = client(&queue, &["-q", "--data", "x"]);
    proxy.set_traffic(Traffic::Delayed(Duration::from_millis(30)));
    let call = std::thread::spawn(move || call.assert().code(0));
    assert!(server.next_line().ends_with("(1 byte)"));
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait_for_exit_code(), Some(0));
    let output = call.join().expect("the caller got its answer");
    assert_eq!(output.get_output().stdout.len(), SIZE);
}

#[test]
fn after_stop_after_programs_get_sigterm_and_their_requests_go_back() {
    let queue = Queue::named("stop_after");
    let folder = Folder::new("stop_after");
    let script = format!(
        "trap 'echo x >{}; exit 0' TERM; sleep 1000 & wait",
        folder.path("got_term")
    );
    let options = ["--stop-after", "1s", "--", "sh", "-c", &script];
    let server = Program::start_server(&queue, &options);
    let properties = AmqpProperties::default().with_reply_to("nobody".into());
    Peer::connect().publish(&queue, b"30", properties);
    server.next_line();
    server.send_signal(Signal::TERM);
    server.wait_for_log("giving up the requests that have begun, after --stop-after");
    server.wait_for_log("given back to the queue");
    let summary = server.wait_for_log("stopped: ");
    assert!(summary.contains("stopped: 0 served, 0 failed"), "{summary}");
    assert_eq!(server.wait_for_exit_code(), Some(0));
    assert!(fs::exists(folder.path("got_term")).unwrap());
    assert_eq!(Peer::connect().message_count(&queue), Some(1));
}

#[test]
fn stop_after_ends_the_delay_of_fib_too() {
    let queue = Queue::named("stop_after_fib");
    let options = ["--stop-after", "100ms", "--delay", "365d"];
    let server = Program::start_server(&queue, &options);
    let properties = AmqpProperties::default().with_reply_to("nobody".into());
    Peer::connect().publish(&queue, b"30", properties);
    assert_eq!(server.next_line(), " [.] fib(30)");
    server.stop();
    assert_eq!(Peer::connect().message_count(&queue), Some(1));
}
