//! `rpc-server` as an operator sees it: how it serves, shares, stops and survives.

use crate::support::broker::{self, exclusive_node};
use crate::support::broker_features::{permitted_queue_types, report_not_applicable};
use crate::support::peer::{default_queue_type, permits_transient_queues, Peer, Queue};
use crate::support::programs::{assert_output, client, command, Program};
use amiquip::AmqpProperties;
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::thread;

/// Runs `calls` with `rpc-client` in the background; the thread fails if they do not go well.
fn calling(queue: &Queue, args: &[&str], answers: &'static str) -> thread::JoinHandle<()> {
    // Quiet, because for a while there may be no consumer, which draws a warning.
    let mut command = client(queue, &[&["-q"], args].concat());
    thread::spawn(move || assert_output(&mut command, 0, answers, ""))
}

#[test]
fn it_prints_the_tutorials_lines() {
    let queue = Queue::named("lines");
    let server = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["30", "7"]), 0, "832040\n13\n", "");
    assert_eq!(server.stop(), [" [.] fib(30)", " [.] fib(7)"]);
}

#[test]
fn quiet_leaves_only_the_awaiting_line() {
    let queue = Queue::named("quiet");
    let server = Program::start_server(&queue, &["--quiet"]);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
    assert_eq!(server.stop(), [""; 0]);
}

/// Stopped while it computes, it finishes and answers, and exits with 0.
#[test]
fn sigterm_and_sigint_let_it_finish_what_it_has_begun() {
    for signal in [Signal::TERM, Signal::INT] {
        let queue = Queue::named(&format!("graceful_{}", signal.as_raw()));
        let mut server = Program::start_server(&queue, &["--delay", "2s"]);
        let caller = calling(&queue, &["30"], "832040\n");
        assert_eq!(server.next_line(), " [.] fib(30)");
        server.send_signal(signal);
        assert_eq!(server.wait().code(), Some(0));
        caller.join().expect("the caller got its answer");
        assert_eq!(Peer::connect().message_count(&queue), Some(0), "it was acknowledged, too");
    }
}

/// What was delivered to it in advance is not begun, and goes to the next server.
#[test]
fn stopping_leaves_the_rest_to_the_other_servers() {
    let queue = Queue::named("leaves_the_rest");
    let first = Program::start_server(&queue, &["--prefetch", "10", "--delay", "3s"]);
    let caller = calling(&queue, &["10", "20", "30"], "55\n6765\n832040\n");
    assert_eq!(first.next_line(), " [.] fib(10)");
    assert_eq!(first.stop(), [""; 0]);
    let second = Program::start_server(&queue, &[]);
    caller.join().expect("the caller got its answers");
    assert_eq!(second.stop(), [" [.] fib(20)", " [.] fib(30)"]);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let queue = Queue::named("second_signal");
    let mut server = Program::start_server(&queue, &["--delay", "365d"]);
    let properties = AmqpProperties::default().with_reply_to("nobody".into());
    Peer::connect().publish(&queue, b"30", properties);
    assert_eq!(server.next_line(), " [.] fib(30)");
    server.send_signal(Signal::TERM);
    server.wait_for_log("stopping");
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait().signal(), Some(Signal::TERM.as_raw()), "a shell calls it 143");
}

#[test]
fn a_killed_servers_request_is_answered_by_the_next_one_once() {
    let queue = Queue::named("killed");
    let mut first = Program::start_server(&queue, &["--delay", "365d"]);
    let caller = calling(&queue, &["30"], "832040\n");
    assert_eq!(first.next_line(), " [.] fib(30)");
    first.send_signal(Signal::KILL);
    assert_eq!(first.wait().signal(), Some(Signal::KILL.as_raw()));
    let second = Program::start_server(&queue, &[]);
    caller.join().expect("the caller got its answer");
    assert_eq!(second.stop(), [" [.] fib(30)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn three_servers_share_the_calls_fairly() {
    let queue = Queue::named("three");
    let servers: Vec<Program> =
        (0..3).map(|_| Program::start_server(&queue, &["--delay", "1s"])).collect();
    assert_output(&mut client(&queue, &["--repeat", "30", "10"]), 0, &"55\n".repeat(30), "");
    let shares: Vec<usize> = servers.into_iter().map(|server| server.stop().len()).collect();
    assert_eq!(shares.iter().sum::<usize>(), 30);
    assert!(shares.iter().all(|share| (8..=12).contains(share)), "{shares:?}");
}

/// Four workers have four requests in hand at once; the others wait in the queue.
#[test]
fn workers_work_at_the_same_time() {
    let queue = Queue::named("workers");
    let server = Program::start_server(&queue, &["--workers", "4", "--delay", "365d"]);
    let mut peer = Peer::connect();
    for _ in 0..8 {
        peer.publish(&queue, b"30", AmqpProperties::default().with_reply_to("nobody".into()));
    }
    for _ in 0..4 {
        assert_eq!(server.next_line(), " [.] fib(30)");
    }
    peer.wait_for_messages(&queue, 4);
    assert_eq!(server.new_lines(), [""; 0]);
}

/// The second waits in its hands while it works on the first, for longer than its caller does.
#[test]
fn it_drops_what_has_expired_in_its_hands() {
    let queue = Queue::named("expired");
    let server = Program::start_server(&queue, &["--prefetch", "2", "--delay", "6s"]);
    client(&queue, &["-q", "-t", "3s", "1", "2"]).assert().code(5);
    server.wait_for_log("dropped a request that expired in our hands, 1 in all");
    assert_eq!(server.stop(), [" [.] fib(1)"]);
    assert_eq!(Peer::connect().message_count(&queue), Some(0));
}

#[test]
fn it_adopts_a_queue_of_any_type_as_it_is() {
    for queue_type in permitted_queue_types() {
        let queue = Queue::named(&format!("adopt_{queue_type}"));
        Peer::connect().declare(&queue, queue_type);
        for asked in ["auto", "transient", "classic", "quorum"] {
            let server = Program::start_server(&queue, &["--queue-type", asked]);
            server.wait_for_log(&format!("adopted queue '{}' as it is", &*queue));
            assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
            server.stop();
        }
    }
}

/// Declared again with the same arguments a queue is left alone, with others it is a 406.
#[test]
fn it_declares_a_missing_queue_as_it_is_told() {
    let auto = ("auto", default_queue_type(broker::url()));
    let explicit = permitted_queue_types().into_iter().map(|queue_type| (queue_type, queue_type));
    for (asked, declared) in explicit.chain([auto]) {
        let queue = Queue::named(&format!("declare_{asked}"));
        let server = Program::start_server(&queue, &["--queue-type", asked]);
        Peer::connect().declare(&queue, declared);
        server.stop();
    }
}

/// From RabbitMQ 4.3 on it may be configured not to permit them, and then closes the connection.
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
fn several_servers_may_start_at_once() {
    let queue = Queue::named("race");
    let queue = &*queue;
    thread::scope(|scope| {
        for queue_type in permitted_queue_types().into_iter().chain(["auto"]) {
            scope.spawn(move || Program::start_server(queue, &["--queue-type", queue_type]).stop());
        }
    });
}

#[test]
fn a_deleted_queue_is_declared_anew() {
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

/// fib of this is larger than the `max_message_size` of [`exclusive_node`].
const TOO_LARGE: &str = "1000000";

/// The broker closes the channel for such a reply and delivers the request again; it is not computed for
/// ever, and others are served.
#[test]
fn a_reply_that_is_too_large_for_the_broker_becomes_an_error() {
    let broker = exclusive_node();
    let queue = "too_large";
    let server = Program::start_server_at(broker.url(), queue, &[]);
    let mut call = client(queue, &["-q", "20", TOO_LARGE, "30"]);
    let error = "rpc-client: fib(1000000): internal error: \
                 the broker refused the answer, perhaps for its size\n";
    assert_output(call.env("AMQP_URL", broker.url()), 1, "6765\n\n832040\n", error);
    let begun = server.stop().iter().filter(|line| line.ends_with("fib(1000000)")).count();
    assert_eq!(begun, 2, "once to be refused, and once to know that it was this one");
}

/// What a worker sends on a channel after the broker has closed it would cost all workers their connection.
#[test]
fn a_channel_that_the_broker_closes_under_load_costs_no_connection() {
    let broker = exclusive_node();
    // But for the declaration of a transient queue, where that is not permitted.
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
    let numbers: Vec<&str> =
        (1..=1_000).map(|i| if i % 500 == 0 { TOO_LARGE } else { "30" }).collect();
    let answers: String =
        numbers.iter().map(|n| if *n == "30" { "832040\n" } else { "\n" }).collect();
    let mut call = client(queue, &["-q", "-"]);
    call.env("AMQP_URL", broker.url()).write_stdin(numbers.join("\n"));
    call.assert().code(1).stdout(answers);
    assert_eq!(errors() - before, 0, "{}", broker.log());
    server.stop();
}
