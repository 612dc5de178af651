//! Brokers as no real one is, by a scripted one.

use crate::support::programs::{client, Program};
use crate::support::scripted_broker::{Action, Flood, Method, ScriptedBroker, CONSUME, QOS};
use crate::support::TEST_TIMEOUT;
use std::time::{Duration, Instant};

/// The limit of a server's resident memory: several times that of an idle server.
const MAX_MEMORY_KIB: u64 = 64 << 10;

/// What ends as soon as it begins is not begun again without a pause, nor without end in the log.
#[test]
fn a_server_backs_off_from_a_broker_that_does_not_let_it_consume() {
    let wrong_answers: [(Method, Action); 3] = [
        (CONSUME, Action::Cancel),
        (QOS, Action::AnswerWith((60, 21))),
        (CONSUME, Action::AnswerWith((60, 11))),
    ];
    for (method, act) in wrong_answers {
        let broker = ScriptedBroker::start(method, act);
        let server = Program::spawn_at(&broker.url, "rpc-server", &["--queue", "q", "-q"]);
        let round = || broker.received.recv_timeout(TEST_TIMEOUT).expect("it tries again");
        let first = round();
        let eighth = [(); 7].map(|()| round())[6];
        // Pauses of at least 100, 200, 400, 800, 1,600, 2,500 and 2,500 ms, but those that are short again after one
        // that lasted: never eight in less than a second.
        assert!(eighth - first > Duration::from_secs(1), "eight rounds in {:?}", eighth - first);
        let log = server.new_log();
        assert!(log.len() < 40, "{log:#?}");
    }
}

#[test]
fn a_server_ends_the_connection_to_a_broker_that_floods_it() {
    for (flood, line) in [
        (Flood::Deliveries, "the broker sent more than 66 messages that were not asked for"),
        (Flood::Returns, "the broker sent more than 66 returns that were not asked for"),
        (Flood::Blocked, "the broker sent more than 100 notices a minute"),
    ] {
        let broker = ScriptedBroker::start(CONSUME, Action::Flood(flood));
        let server = Program::spawn_at(&broker.url, "rpc-server", &["--queue", "q", "-q"]);
        broker.flood_ended.recv_timeout(TEST_TIMEOUT).expect("the server ends the connection");
        server.wait_for_log(line);
        let memory = server.memory_kib().expect("the server is running");
        assert!(memory < MAX_MEMORY_KIB, "{memory} KiB");
    }
}

/// Its consumer ends just before the deadline, and the broker answers nothing any more: closing waits no longer than the
/// call.
#[test]
fn a_silent_broker_does_not_hold_a_client_at_the_end_of_its_session() {
    let broker = ScriptedBroker::start(CONSUME, Action::CancelThenSilence);
    let mut call = client("q", &["-q", "-t", "500ms", "30"]);
    let begun = Instant::now();
    call.env("AMQP_URL", &broker.url).assert().code(5).stdout("\n");
    let took = begun.elapsed();
    eprintln!("a silent broker at the end of a session: 0.5 s, took {:.3} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(10), "{took:?}");
}
