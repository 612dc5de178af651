//! `rpc-client` as a terminal and a shell script see it.

use crate::support::broker::exclusive_node;
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, command, Program};
use crate::support::proxy::Proxy;
use amiquip::AmqpProperties;
use rpc_common::fib::fib;
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

#[test]
fn one_call_prints_the_number_and_nothing_else() {
    let queue = Queue::named("one_call");
    let _server = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
}

#[test]
fn a_shell_script_gets_the_answer_into_a_variable() {
    let queue = Queue::named("variable");
    let _server = Program::start_server(&queue, &[]);
    let script = format!("answer=$(rpc-client --queue {} 30); echo \"<$answer> $?\"", &*queue);
    bash(&script).code(0).stdout("<832040> 0\n").stderr("");
}

#[test]
fn several_numbers_are_answered_in_the_order_asked() {
    let queue = Queue::named("several");
    let _server = Program::start_server(&queue, &[]);
    let answers = "0\n1\n1\n12200160415121876738\n19740274219868223167\n\
                   222232244629420445529739893461909967206666939096499764990979600\n";
    assert_output(&mut client(&queue, &["0", "1", "2", "93", "94", "300"]), 0, answers, "");
}

/// Several workers answer out of order, fewer places than calls make them wait for each other.
#[test]
fn many_calls_in_flight_keep_their_order() {
    let queue = Queue::named("in_flight");
    let _server = Program::start_server(&queue, &["--workers", "4", "--prefetch", "3", "-q"]);
    let numbers: Vec<u64> = (0..400).map(|i| i * 7919 % 1000).collect();
    let args: Vec<String> = numbers.iter().map(u64::to_string).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let answers: String = numbers.iter().map(|n| format!("{}\n", fib(*n))).collect();
    for in_flight in ["1", "7", "64"] {
        assert_output(client(&queue, &["-j", in_flight]).args(&args), 0, &answers, "");
    }
}

#[test]
fn repeat_asks_for_every_number_several_times() {
    let queue = Queue::named("repeat");
    let server = Program::start_server(&queue, &[]);
    assert_output(
        &mut client(&queue, &["--repeat", "3", "7", "8"]),
        0,
        "13\n13\n13\n21\n21\n21\n",
        "",
    );
    assert_eq!(server.stop().len(), 6);
}

#[test]
fn the_millionth_number_is_exact() {
    let queue = Queue::named("million");
    let _server = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["1000000"]), 0, &format!("{}\n", fib(1_000_000)), "");
}

#[test]
fn text_output_is_the_tutorials_conversation() {
    let queue = Queue::named("text");
    let _server = Program::start_server(&queue, &[]);
    let (got, asked) = (" [.] Got 832040\n", " [x] Requesting fib(30)\n");
    assert_output(&mut client(&queue, &["-o", "text", "30"]), 0, got, asked);
    assert_output(&mut client(&queue, &["-o", "text", "-q", "30"]), 0, got, "");
}

#[test]
fn on_a_terminal_the_output_is_text() {
    let queue = Queue::named("terminal");
    let _server = Program::start_server(&queue, &[]);
    let script = format!("script -qec 'rpc-client --queue {} 30' /dev/null", &*queue);
    bash(&script).code(0).stdout(" [x] Requesting fib(30)\r\n [.] Got 832040\r\n");
}

#[test]
fn a_reader_that_goes_away_ends_it_like_sigpipe() {
    let queue = Queue::named("sigpipe");
    let _server = Program::start_server(&queue, &["-q"]);
    let script = format!(
        "rpc-client --queue {} --repeat 100000 30 | head -1; echo ${{PIPESTATUS[0]}}",
        &*queue
    );
    bash(&script).code(0).stdout("832040\n141\n").stderr("");
}

#[test]
fn a_full_disk_is_an_error_of_its_own() {
    let queue = Queue::named("full_disk");
    let _server = Program::start_server(&queue, &[]);
    bash(&format!("rpc-client --queue {} 30 >/dev/full", &*queue))
        .code(6)
        .stdout("")
        .stderr("rpc-client: cannot write to standard output: no space left on device\n");
}

#[test]
fn sigint_and_sigterm_end_it_at_once() {
    let queue = Queue::declare("client_signals");
    for signal in [Signal::INT, Signal::TERM] {
        let mut call = Program::spawn("rpc-client", &["--queue", &queue, "30"]);
        call.wait_for_log("no server is consuming");
        call.send_signal(signal);
        assert_eq!(call.wait().signal(), Some(signal.as_raw()), "a shell adds 128 to it");
    }
}

/// A foreign server answers with an id that is not ours, without one, and twice.
/// One round trip is TCP's own, which no proxy sees; and the last one is the farewell.
#[test]
fn a_cold_call_takes_seven_round_trips() {
    let queue = Queue::named("round_trips");
    let _server = Program::start_server(&queue, &[]);
    for (kind, round_trips) in [("queue", 7), ("direct", 8)] {
        let seen = eventually("an answer before it looks where that is", || {
            let proxy = Proxy::start();
            let mut call = client(&queue, &["--reply-to", kind, "30"]);
            let begun = Instant::now();
            assert_output(call.env("AMQP_URL", proxy.url()), 0, "832040\n", "");
            (begun.elapsed() < Duration::from_millis(500)).then(|| proxy.round_trips())
        });
        assert_eq!(1 + seen, round_trips, "--reply-to {kind}");
    }
}

#[test]
fn direct_reply_to_makes_no_queue() {
    let broker = exclusive_node();
    let server = Peer::connect_to(broker.url());
    server.declare_default("direct");
    for (kind, queues) in [("queue", 1), ("direct", 0)] {
        let args = ["--queue", "direct", "-q", "-t", "1h", "--reply-to", kind, "30"];
        let client = Program::spawn_at(broker.url(), "rpc-client", &args);
        let request = server.take("direct");
        eventually(&format!("{queues} reply queues, --reply-to {kind}"), || {
            let names = broker.rabbitmqctl(&["list_queues", "--no-table-headers", "name"]);
            (names.matches("rpc.reply.").count() == queues).then_some(())
        });
        server.reply(&request, b"832040");
        assert_eq!(client.next_line(), "832040");
        assert_eq!(client.wait_for_exit_code(), Some(0));
    }
}

#[test]
fn replies_to_no_call_in_hand_are_discarded() {
    let queue = Queue::declare("unknown_ids");
    let server = std::thread::spawn({
        let queue = queue.to_owned();
        move || {
            let peer = Peer::connect();
            for answer in ["5", "8"] {
                let request = peer.take(&queue);
                let reply_to = request.properties.reply_to().as_deref().expect("ours set it");
                let with_id = |id: String| AmqpProperties::default().with_correlation_id(id);
                peer.publish(reply_to, b"1", with_id("no such call".into()));
                peer.publish(reply_to, b"2", with_id(uuid::Uuid::new_v4().to_string()));
                peer.publish(reply_to, b"3", AmqpProperties::default());
                peer.reply(&request, answer.as_bytes());
                peer.reply(&request, b"4");
            }
        }
    });
    assert_output(&mut client(&queue, &["-q", "-j", "1", "5", "6"]), 0, "5\n8\n", "");
    server.join().expect("the peer was served");
}

#[test]
fn the_examples_call_another_function_with_the_same_loops() {
    let server = Program::spawn("examples/serve_upper", &[]);
    assert_eq!(server.next_line(), "serving upper_queue, Ctrl-C stops");
    assert_output(
        command("examples/call_upper").args(["hello", "Grüße"]),
        0,
        "HELLO\nGRÜSSE\n",
        "",
    );
    server.stop();
}
