//! Promise: stopping is graceful. A server that is stopped answers what it has begun, and leaves
//! the rest to others.

use crate::server_log::level_and_text;
use crate::support::broker::{self, exclusive_node};
use crate::support::broker_features::{broker_version, report_not_applicable};
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{
    assert_output, call_in_background, client, program_folder, Program,
};
use crate::support::proxy::{Proxy, Traffic};
use amiquip::AmqpProperties;
use rpc_common::fib::fib;
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn sigterm_sigint_and_sighup_let_a_server_finish_what_it_has_begun() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let queue = Queue::named(&format!("graceful_{}", signal.as_raw()));
        let mut server = Program::start_server(&queue, &["--delay", "2s"]);
        let caller = call_in_background(&queue, &["30"], "832040\n");
        assert_eq!(server.next_line(), " [.] fib(30)");
        server.send_signal(signal);
        assert_eq!(server.wait().code(), Some(0));
        caller.join().expect("the caller got its answer");
        assert_eq!(
            Peer::connect().message_count(&queue),
            Some(0),
            "it is acknowledged"
        );
    }
}

#[test]
fn a_stopping_server_leaves_prefetched_requests_to_other_servers() {
    let queue = Queue::named("leaves_the_rest");
    let first = Program::start_server(&queue, &["--prefetch", "10", "--delay", "3s"]);
    let caller = call_in_background(&queue, &["10", "20", "30"], "55\n6765\n832040\n");
    assert_eq!(first.next_line(), " [.] fib(10)");
    assert_eq!(first.stop(), [""; 0]);
    let second = Program::start_server(&queue, &[]);
    caller.join().expect("the caller got its answers");
    assert_eq!(second.stop(), [" [.] fib(20)", " [.] fib(30)"]);
}

/// A delivery limit drops requests that kill their servers. Before RabbitMQ 4.3 it counts every
/// return.
#[test]
fn prefetched_requests_of_a_stopping_server_do_not_count_as_deliveries() {
    if broker_version() < (4, 3) {
        return report_not_applicable("", "it counts every return as a delivery");
    }
    let queue = Queue::named("not_counted");
    let server = Program::start_server(
        &queue,
        &[
            "--queue-type",
            "quorum",
            "--prefetch",
            "10",
            "--delay",
            "2s",
        ],
    );
    let peer = Peer::connect();
    for body in ["20", "30"] {
        peer.publish(
            &queue,
            body.as_bytes(),
            AmqpProperties::default().with_reply_to("nobody".into()),
        );
    }
    assert_eq!(server.next_line(), " [.] fib(20)");
    assert_eq!(server.stop(), [""; 0]);
    let returned = peer.take(&queue);
    assert_eq!((&*returned.body, returned.redelivered), (&b"30"[..], true));
    let headers = returned.properties.headers().clone().unwrap_or_default();
    assert_eq!(headers.get("x-delivery-count"), None, "{headers:?}");
}

#[test]
fn a_second_signal_ends_a_server_at_once() {
    let queue = Queue::named("second_signal");
    let mut server = Program::start_server(&queue, &["--delay", "365d"]);
    let properties = AmqpProperties::default().with_reply_to("nobody".into());
    Peer::connect().publish(&queue, b"30", properties);
    assert_eq!(server.next_line(), " [.] fib(30)");
    server.send_signal(Signal::TERM);
    server.wait_for_log("stopping");
    server.send_signal(Signal::TERM); // the same signal within a second counts once
    server.send_signal(Signal::INT);
    assert_eq!(
        server.wait().signal(),
        Some(Signal::INT.as_raw()),
        "a shell reports 130"
    );
}

/// A terminal that is closed, or whose ssh connection breaks.
#[test]
fn a_server_whose_terminal_is_closed_finishes_what_it_has_begun() {
    let queue = Queue::named("closed_terminal");
    // The program ends only if it may: it is in another process group.
    let server = format!(
        "rpc-server --queue {} -- sh -c \"sleep 2; printf 8\"",
        &*queue
    );
    let path = format!("{}:/usr/bin:/bin", program_folder().display());
    let mut terminal = Command::new("script");
    terminal
        .args(["-qefc", &server, "/dev/null"])
        .env("AMQP_URL", broker::url())
        .env("PATH", path);
    let mut terminal = Program::spawn_command(&terminal);
    Peer::connect().wait_for_consumers(&queue, 1);
    let caller = Program::spawn("rpc-client", &["--queue", &queue, "6"]);
    while !terminal.next_line().contains("(1 byte)") {}
    terminal.send_signal(Signal::KILL);
    terminal.wait();
    assert_eq!(caller.next_line(), "8");
    Peer::connect().wait_for_consumers(&queue, 0);
}

/// `nohup` starts a program with SIGHUP ignored.
#[test]
fn a_server_that_was_started_with_sighup_ignored_ignores_sighup() {
    let queue = Queue::named("nohup");
    let mut command = Command::new("env");
    command
        .arg("--ignore-signal=HUP")
        .arg(program_folder().join("rpc-server"))
        .args(["--queue", &queue])
        .env("AMQP_URL", broker::url());
    let server = Program::spawn_command(&command);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.send_signal(Signal::HUP);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
    assert_eq!(server.stop(), [" [.] fib(30)"]);
}

/// As after Ctrl-S in a terminal. The lines of 20,000 requests, and their log, are more than a pipe
/// takes.
#[test]
fn a_server_whose_output_and_log_are_not_read_answers_and_stops() {
    let queue = Queue::named("unread_stdout");
    let program = program_folder().join("rpc-server");
    // `tail` does not read its standard input, which is the server's standard output.
    let script = r#"exec "$0" "$@" > >(exec tail --pid=$$ -f /dev/null) 2>&1"#;
    let mut command = Command::new("bash");
    command
        .args(["-c", script])
        .arg(program)
        .args(["--queue", &queue, "--prefetch", "64", "-vvv"]);
    let mut server = Program::spawn_command(command.env("AMQP_URL", broker::url()));
    Peer::connect().wait_for_consumers(&queue, 1);
    assert_output(
        &mut client(&queue, &["-q", "--repeat", "20000", "1"]),
        0,
        &"1\n".repeat(20_000),
        "",
    );
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
}

/// One of three servers is stopped. All of them close their connections by the close handshake.
#[test]
fn a_server_that_stops_under_load_loses_nothing_and_repeats_nothing() {
    let broker = exclusive_node();
    let unclean_before = broker.unclean_closes();
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
        let answers = numbers
            .iter()
            .map(|&n| format!("{}\n", fib(n)))
            .collect::<String>();
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
    assert_eq!(broker.unclean_closes(), unclean_before);
}

/// After a while the server waits for an answer, too: it looks at the queue every 5 s.
#[test]
fn a_frozen_broker_does_not_prevent_a_server_from_stopping() {
    for (name, frozen_for) in [
        ("frozen_stop", Duration::ZERO),
        ("frozen_look", Duration::from_secs(8)),
    ] {
        let queue = Queue::named(name);
        let proxy = Proxy::start();
        let mut server = Program::start_server_at(&proxy.url(), &queue, &["--heartbeat", "600"]);
        proxy.set_traffic(Traffic::Frozen);
        thread::sleep(frozen_for);
        server.send_signal(Signal::TERM);
        let start = Instant::now();
        assert_eq!(server.wait().code(), Some(0));
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn a_frozen_broker_does_not_prevent_a_server_from_stopping_before_it_serves() {
    let queue = Queue::named("frozen_start");
    let proxy = Proxy::start();
    proxy.set_traffic(Traffic::Frozen);
    let args = ["--queue", &queue, "--heartbeat", "600"];
    let mut server = Program::spawn_at(&proxy.url(), "rpc-server", &args);
    proxy.wait_for_connection(); // by then the server handles signals
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    let (stdout, log) = server.remaining_output();
    assert_eq!(stdout, [""; 0]);
    let stopping = "stopping: requests that have begun are answered; a second signal stops at once";
    let log: Vec<_> = log.iter().filter_map(|line| level_and_text(line)).collect();
    let [(first, text), (last, summary)] = log[..] else {
        panic!("{log:?}")
    };
    assert_eq!([first, text, last], ["INFO", stopping, "INFO"]);
    assert!(
        summary.starts_with("stopped: 0 served, 0 failed, 0 expired, 0 rejected, up for "),
        "{summary}"
    );
}
