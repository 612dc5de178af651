//! The log of a server: one form of line on standard error, in a terminal or a file, and another
//! one in systemd's journal.

use crate::support::broker;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, program_folder, Program};
use crate::support::proxy::Proxy;
use crate::support::scripted_broker::{Action, ScriptedBroker, START_OK};
use crate::support::{eventually, TEST_TIMEOUT};
use amiquip::AmqpProperties;
use rustix::process::Signal;
use serde_json::Value;
use std::process::Command;

/// The level and the text of a log line, which looks like `[2026-01-31T12:00:00.000Z INFO ] text`.
pub(crate) fn level_and_text(line: &str) -> Option<(&str, &str)> {
    let (header, text) = line.split_once("] ")?;
    let (_timestamp, level) = header.split_once(' ')?;
    Some((level.trim(), text))
}

/// Stops a server, and returns its log.
fn stop(mut server: Program) -> Vec<String> {
    server.send_signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    server.remaining_output().1
}

/// A caller's mistake is no warning.
#[test]
fn with_verbose_each_request_has_a_line_with_its_id_outcome_and_time() {
    let queue = Queue::named("log_requests");
    let server = Program::start_server(&queue, &["-vv", "--max-n", "100"]);
    server.wait_for_log("connected to");
    let output = client(&queue, &["--output", "json", "30", "101"])
        .assert()
        .code(1)
        .get_output()
        .stdout
        .clone();
    let answers = String::from_utf8(output).expect("JSON is text");
    let [ok_id, failed_id] = [0, 1].map(|index| {
        let answer: Value =
            serde_json::from_str(answers.lines().nth(index).expect("a line")).expect("JSON");
        answer["correlation_id"].as_str().expect("an id").to_owned()
    });
    let log = stop(server);
    let lines: Vec<_> = log.iter().filter_map(|line| level_and_text(line)).collect();
    for (level, text) in [
        ("TRACE", format!("request[{ok_id}]: 2 bytes")),
        ("DEBUG", format!("request[{ok_id}]: ok after ")),
        (
            "INFO",
            format!("request[{failed_id}]: answered with the error out-of-range: out of range: 101 is larger than"),
        ),
        ("DEBUG", format!("request[{failed_id}]: out-of-range after ")),
    ] {
        let count = lines.iter().filter(|line| line.0 == level && line.1.starts_with(&text)).count();
        assert_eq!(count, 1, "{level} {text}: {log:#?}");
    }
    assert_eq!(lines.len(), log.len(), "all lines have one form: {log:#?}");
    let summary = "stopped: 1 served, 1 failed, 0 expired, 0 rejected, up for ";
    assert!(
        lines
            .last()
            .is_some_and(|line| line.0 == "INFO" && line.1.starts_with(summary)),
        "{log:#?}"
    );
    assert!(!log.iter().any(|line| line.contains("WARN")), "{log:#?}");
}

#[test]
fn the_same_error_is_counted_while_a_broker_does_not_work() {
    let broker = ScriptedBroker::start(START_OK, Action::CloseSocket);
    let server = Program::spawn_at(&broker.url, "rpc-server", &[]);
    for _ in 0..4 {
        broker
            .received
            .recv_timeout(TEST_TIMEOUT)
            .expect("the server tries again");
    }
    let log = stop(server);
    let lines: Vec<_> = log.iter().filter_map(|line| level_and_text(line)).collect();
    let [(level, error), (_, counted), (_, stopping), ..] = lines[..] else {
        panic!("{log:#?}")
    };
    assert!(
        level == "WARN" && error.ends_with("; retrying") && stopping.starts_with("stopping"),
        "{log:#?}"
    );
    let counted = counted
        .strip_prefix("suppressed ")
        .and_then(|line| line.split_once(" similar lines; the last: "));
    assert!(
        counted.is_some_and(
            |(count, last)| count.parse().is_ok_and(|count: u32| count >= 2) && last == error
        ),
        "{log:#?}"
    );
}

/// Each line is about another request.
#[test]
fn failures_are_counted_for_each_error_code() {
    let queue = Queue::named("log_failures");
    let server = Program::start_server(&queue, &["-q", "--max-n", "100"]);
    let call = |args: &[&str]| client(&queue, args).assert().code(1);
    call(&["-q", "--repeat", "150", "101"]);
    call(&["-q", "--repeat", "10", "--data", "ten"]);
    let peer = Peer::connect();
    for n in 0..10_u8 {
        peer.publish(&queue, &[b'a' + n], AmqpProperties::default()); // without a reply_to
        let gone = AmqpProperties::default().with_reply_to("log_failures.gone".into());
        peer.publish(&queue, b"30", gone);
    }
    assert_output(&mut client(&queue, &["-q", "30"]), 0, "832040\n", "");
    let log = stop(server);
    let count = |text: &str| log.iter().filter(|line| line.contains(text)).count();
    let failed = |code: &str| count(&format!("]: answered with the error {code}: "));
    let suppressed = "suppressed 50 similar lines (out-of-range); the last: request[";
    assert_eq!(count(suppressed), 1, "{log:#?}");
    assert_eq!(failed("out-of-range"), 101, "{log:#?}");
    assert_eq!(failed("invalid-argument"), 10, "{log:#?}");
    assert_eq!(count("] rejected a request "), 10, "{log:#?}");
    assert_eq!(count("] a reply was returned: "), 10, "{log:#?}");
}

/// Starts a server whose log nobody reads until a line is written to its standard input.
fn start_with_stalled_log(queue: &str, args: &[&str]) -> Program {
    let mut command = Command::new("bash");
    command
        .args([
            "-c",
            r#"exec 3<&0; exec "$0" "$@" 2> >(read -r _ <&3; exec cat >&2)"#,
        ])
        .arg(program_folder().join("rpc-server"))
        .args(["-q", "--queue", queue])
        .args(args)
        .env("AMQP_URL", broker::url());
    let server = Program::spawn_command(&command);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server
}

/// Reads the log until it says how many lines were dropped, and stops the server. Returns that
/// count, and the whole log.
fn read_stalled_log(mut server: Program, what: &str) -> (usize, Vec<String>) {
    assert!(server.write_line("go on"));
    let mut log = Vec::new();
    let dropped = eventually("the count of dropped lines", || {
        let new = server.new_log();
        let count = new.iter().find_map(|line| {
            let (level, text) = level_and_text(line)?;
            let count = text.strip_prefix("dropped ")?.strip_suffix(what)?;
            (level == "WARN").then(|| count.parse().expect("a number"))
        });
        log.extend(new);
        count
    });
    log.extend(stop(server));
    (dropped, log)
}

#[test]
fn lines_that_the_reader_is_too_slow_for_are_counted() {
    let queue = Queue::named("log_dropped");
    let server = start_with_stalled_log(&queue, &["-vv"]);
    let answers = "1\n".repeat(7_000);
    let mut calls = client(&queue, &["-q", "--repeat", "7000", "1"]);
    assert_output(&mut calls, 0, &answers, "");
    let (dropped, log) = read_stalled_log(server, " lines: the reader of the log was too slow");
    let requests = log.iter().filter(|line| line.contains(" request[")).count();
    assert!(requests + dropped >= 14_000, "{requests} + {dropped}");
}

#[test]
fn the_lines_of_programs_do_not_displace_those_of_the_server() {
    let queue = Queue::named("log_of_programs");
    let program = r#"read -r word; [ "$word" = fail ] && exit 7; seq 100 >&2"#;
    let options = ["--workers", "4", "--", "bash", "-c", program];
    let server = start_with_stalled_log(&queue, &options);
    let call = |data, times, code| {
        let args = ["-q", "--repeat", times, "--data", data];
        client(&queue, &args).assert().code(code);
    };
    call("write", "130", 0);
    call("fail", "1", 1);
    let what = " lines of programs: the reader of the log was too slow";
    let (dropped, log) = read_stalled_log(server, what);
    let count = |text: &str| log.iter().filter(|line| line.contains(text)).count();
    assert_eq!(count(" program[") + dropped, 13_000);
    assert_eq!(count("answered with the error failed"), 1);
}

/// The journal knows the time; a line begins with its priority, see sd-daemon(3).
#[test]
fn in_the_journal_a_line_has_a_priority_and_no_time() {
    let queue = Queue::named("log_journal");
    let proxy = Proxy::start();
    let start = |stream: &str, url: &str| {
        let mut command = Command::new("bash");
        command.args(["-c", &format!("JOURNAL_STREAM={stream} exec \"$0\" \"$@\"")]);
        command
            .arg(program_folder().join("rpc-server"))
            .args(["--queue", &queue])
            .env("AMQP_URL", url);
        Program::spawn_command(&command)
    };
    let standard_error = "$(stat -L -c %d:%i /dev/stderr)";
    let server = start(standard_error, &proxy.url());
    let connected = server.wait_for_log("connected to");
    assert!(connected.starts_with("<6>connected to"), "{connected}");
    proxy.close_connections();
    let lost = server.wait_for_log("retrying");
    assert!(
        lost.starts_with(&format!("<4>{} was disconnected", proxy.authority())),
        "{lost}"
    );
    stop(server);
    let (_, log) = start(standard_error, "").remaining_output();
    assert_eq!(
        log,
        ["<3>rpc-server: bad AMQP_URL: it is empty: set it to a URL, or unset it"]
    );
    // Standard error does not go to the journal, as with `2>file` in a unit.
    let server = start("8:12345", broker::url());
    let connected = server.wait_for_log("connected to");
    assert_eq!(
        level_and_text(&connected).map(|(level, _)| level),
        Some("INFO"),
        "{connected}"
    );
    stop(server);
}
