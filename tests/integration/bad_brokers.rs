//! A broker that breaks the protocol cannot stop a server, or make it use much memory. The broker
//! is a scripted one.

use crate::support::programs::Program;
use crate::support::scripted_broker::{Action, Flood, Method, ScriptedBroker, CONSUME, QOS};
use crate::support::TEST_TIMEOUT;
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
