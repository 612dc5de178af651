//! Brokers as no real one is, by a scripted one.

use crate::support::programs::{client, Program};
use crate::support::scripted::{Act, Flood, Method, ScriptedBroker, CONSUME, QOS};
use crate::support::PATIENCE;
use std::time::{Duration, Instant};

/// What a server has in memory at the most, in KiB: some times what it has when it idles.
const MOST_MEMORY: u64 = 64 << 10;

/// What ends as soon as it begins is not begun again without a pause, nor without end in the log.
#[test]
fn a_server_backs_off_from_a_broker_that_does_not_let_it_consume() {
    let wrong_answers: [(Method, Act); 3] = [
        (CONSUME, Act::Cancel),
        (QOS, Act::AnswerWith((60, 21))),
        (CONSUME, Act::AnswerWith((60, 11))),
    ];
    for (method, act) in wrong_answers {
        let broker = ScriptedBroker::start(method, act);
        let server = Program::spawn_at(&broker.url, "rpc-server", &["--queue", "q", "-q"]);
        let round = || broker.acted.recv_timeout(PATIENCE).expect("it tries again");
        let first = round();
        let eighth = [(); 7].map(|()| round())[6];
        // Pauses of at least 100, 200, 400, 800, 1,600, 2,500 and 2,500 ms, but those that are short again after one
        // that lasted: never eight in less than a second.
        assert!(eighth - first > Duration::from_secs(1), "eight rounds in {:?}", eighth - first);
        let log = server.log();
        assert!(log.len() < 40, "{log:#?}");
    }
}

#[test]
fn a_server_ends_the_connection_to_a_broker_that_floods_it() {
    for (flood, line) in [
        (Flood::Deliveries, "the broker sent more than 66 messages that were not asked for"),
        (Flood::Returns, "the broker sent more than 66 returns that were not asked for"),
        (Flood::Notices, "the broker sent more than 100 notices a minute"),
    ] {
        let broker = ScriptedBroker::start(CONSUME, Act::Flood(flood));
        let server = Program::spawn_at(&broker.url, "rpc-server", &["--queue", "q", "-q"]);
        broker.flooded.recv_timeout(PATIENCE).expect("the server ends the connection");
        server.await_log(line);
        let memory = server.memory();
        assert!(memory < MOST_MEMORY, "{memory} KiB");
    }
}

/// Its consumer ends just before the deadline, and the broker answers nothing any more: closing waits no longer than the
/// call.
#[test]
fn a_silent_broker_does_not_hold_a_client_at_the_end_of_its_session() {
    let broker = ScriptedBroker::start(CONSUME, Act::CancelAndFallSilent);
    let mut call = client("q", &["-q", "-t", "500ms", "30"]);
    let begun = Instant::now();
    call.env("AMQP_URL", &broker.url).assert().code(5).stdout("\n");
    let took = begun.elapsed();
    eprintln!("a silent broker at the end of a session: 0.5 s, took {:.3} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(10), "{took:?}");
}
