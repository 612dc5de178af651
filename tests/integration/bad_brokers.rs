//! A broker that breaks the protocol cannot stop a server, or make it use much memory; and a client
//! asks it nothing too often. The broker is a scripted one.

use crate::support::programs::{assert_output, client, Program};
use crate::support::scripted_broker::{
    Action, Flood, Method, ScriptedBroker, CHANNEL_OPEN, CONSUME, PUBLISH, QOS, QUEUE_DECLARE,
    START_OK,
};
use crate::support::TEST_TIMEOUT;
use std::thread;
use std::time::Duration;

/// The limit of a server's resident memory: several times that of an idle server.
const MAX_MEMORY_KIB: u64 = 64 << 10;

/// The server pauses longer before each attempt, and the limited log stays short.
#[test]
fn a_server_backs_off_from_a_broker_that_does_not_let_it_consume() {
    let wrong_answers: [(Method, Action); 3] = [
        (CONSUME, Action::Cancel),
        (QOS, Action::AnswerWith((60, 21))),
        (CONSUME, Action::AnswerWith((60, 11))),
    ];
    for (method, action) in wrong_answers {
        let broker = ScriptedBroker::start(method, action);
        let server = Program::spawn_at(&broker.url, "rpc-server", &["--queue", "q", "-q"]);
        let wait_for_attempt = || {
            broker
                .received
                .recv_timeout(TEST_TIMEOUT)
                .expect("the server tries again")
        };
        let first = wait_for_attempt();
        let eighth = [(); 7].map(|()| wait_for_attempt())[6];
        // The pauses are at least 100, 200, 400, 800, 1,600, 2,500 and 2,500 ms. They start again
        // at 100 ms after a connection that lasted; even then eight attempts take more than a
        // second.
        assert!(
            eighth - first > Duration::from_secs(1),
            "eight attempts in {:?}",
            eighth - first
        );
        let log = server.new_log();
        assert!(log.len() < 40, "{log:#?}");
    }
}

#[test]
fn a_challenge_of_a_login_is_one_line_that_does_not_show_it() {
    let broker = ScriptedBroker::start(START_OK, Action::Challenge(b"3\n\x1b\\"));
    let address = broker.url.replace("amqp://", "");
    let error = format!(
        "rpc-client: {address} failed the AMQP handshake: the login was answered by a challenge, or by another method that is not supported: enable PLAIN at the broker\n"
    );
    let mut call = client("q", &["-q", "30"]);
    assert_output(call.env("AMQP_URL", &broker.url), 3, "", &error);
}

#[test]
fn a_server_ends_the_connection_to_a_broker_that_floods_it() {
    for (flood, line) in [
        (
            Flood::Deliveries,
            "the broker sent more messages than we asked for",
        ),
        (
            Flood::Returns,
            "the broker sent more messages than we asked for",
        ),
        (
            Flood::Blocked,
            "the broker sent more than 100 notifications a minute",
        ),
    ] {
        let broker = ScriptedBroker::start(CONSUME, Action::Flood(flood));
        let server = Program::spawn_at(&broker.url, "rpc-server", &["--queue", "q", "-q"]);
        broker
            .flood_ended
            .recv_timeout(TEST_TIMEOUT)
            .expect("the server ends the connection");
        server.wait_for_log(line);
        let memory = server.memory_kib().expect("the server is running");
        assert!(memory < MAX_MEMORY_KIB, "{memory} KiB");
    }
}

/// The pauses grow though calls expire and others begin meanwhile. Before this was so, a call of a
/// second caused ten connections.
#[test]
fn a_client_whose_calls_expire_backs_off_from_a_broker_that_resets_each_connection() {
    let broker = ScriptedBroker::start(PUBLISH, Action::CloseSocket);
    let mut calls = client("q", &["-q", "-t", "1s", "-j", "1", "--repeat", "6", "30"]);
    let output = calls.env("AMQP_URL", &broker.url).output();
    let output = output.expect("the client runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!((output.status.code(), &*stdout), (Some(5), "\n\n\n\n\n\n"));
    assert!(stderr.contains("was disconnected"), "{stderr}");
    let connections = broker.received.try_iter().count();
    assert!((6..=18).contains(&connections), "{connections} connections");
}

/// 200 waiting clients that each opened a channel every second cost a broker 14 % of a core.
#[test]
fn a_waiting_client_asks_less_and_less_often_and_uses_one_channel_for_that() {
    let calls = [(CHANNEL_OPEN, 2..=2), (QUEUE_DECLARE, 2..=4)].map(|(method, expected)| {
        let broker = ScriptedBroker::start(method, Action::Answer);
        let mut call = client("q", &["-q", "-t", "8s", "30"]);
        call.env("AMQP_URL", &broker.url);
        let run = move || call.output().expect("the client runs").status.code();
        (thread::spawn(run), broker, method, expected)
    });
    for (call, broker, method, expected) in calls {
        assert_eq!(call.join().expect("the client runs"), Some(5));
        let count = broker.received.try_iter().count();
        assert!(expected.contains(&count), "{method:?}: {count} times");
    }
}
