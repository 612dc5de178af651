//! Each exit code of rpc-client and rpc-server, with the line that a user sees. `messages.txt` has
//! more of these lines.

use crate::support::broker::{self, exclusive_node};
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, command, Program};
use crate::support::proxy::{Proxy, Traffic};
use crate::support::scripted_broker::{Action, ScriptedBroker, EXCHANGE_REFUSED, PUBLISH};
use amiquip::AmqpProperties;
use rustix::process::Signal;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

#[test]
fn an_error_reply_is_exit_code_1_and_stops_nothing() {
    let queue = Queue::named("remote_error");
    let server = Program::start_server(&queue, &["--max-n", "100"]);
    let error =
        "rpc-client: fib(101): out of range: 101 is larger than 100, the largest n served here\n";
    assert_output(
        &mut client(&queue, &["7", "101", "8"]),
        1,
        "13\n\n21\n",
        error,
    );
    assert_eq!(server.stop(), [" [.] fib(7)", " [.] fib(8)"]);
}

#[test]
fn a_reply_that_is_not_a_number_is_exit_code_1() {
    let queue = Queue::declare("bad_reply");
    let nonsense = ["", "NaN", "abc", "-1", "1\n", "12345678"];
    let server = thread::spawn({
        let queue = queue.to_owned();
        move || {
            let peer = Peer::connect();
            for reply in nonsense {
                let request = peer.take(&queue);
                peer.reply(&request, reply.as_bytes());
            }
        }
    });
    for reply in nonsense {
        let error =
            format!(
            "rpc-client: fib(30): the reply '{}' is {}: does another program serve this queue?\n",
            reply.escape_debug(),
            if reply.len() == 8 { "longer than the answer can be" } else { "not a number" }
        );
        assert_output(&mut client(&queue, &["-q", "30"]), 1, "", &error);
    }
    server.join().expect("the peer sent its replies");
}

/// By the server, and not again by the client.
#[test]
fn data_in_an_error_is_escaped_once() {
    let queue = Queue::named("escaped_once");
    let _server = Program::start_server(&queue, &[]);
    let error =
        "rpc-client: invalid argument: '3\\n' is not a whole number (digits only, such as 30)\n";
    bash(&format!(
        "printf '3\\n' | rpc-client --queue {} --data @-",
        &*queue
    ))
    .code(1)
    .stdout("")
    .stderr(error);
}

#[test]
fn check_says_whether_a_queue_is_served() {
    let queue = Queue::named("check");
    let name = &*queue;
    let broker = broker::authority();
    let missing = format!("rpc-client: no queue '{name}' on {broker}: is rpc-server running?\n");
    assert_output(&mut client(&queue, &["--check"]), 4, "", &missing);
    let server = Program::start_server(&queue, &["--delay", "365d", "--workers", "2"]);
    Peer::connect().publish(
        &queue,
        b"1",
        AmqpProperties::default().with_reply_to("nobody".into()),
    ); // keeps one busy
    assert_eq!(server.next_line(), " [.] fib(1)");
    let report = format!("{name} on {broker}: 2 consumers, 0 messages waiting\n");
    assert_output(&mut client(&queue, &["--check"]), 0, &report, "");
    let json = client(&queue, &["--check", "-o", "json"])
        .assert()
        .code(0)
        .stderr("")
        .get_output()
        .stdout
        .clone();
    let json: serde_json::Value = serde_json::from_slice(&json).expect("it is JSON");
    assert_eq!(
        (&json["queue"], &json["consumers"], &json["messages"]),
        (&name.into(), &2.into(), &0.into())
    );
    drop(server);
    let mut peer = Peer::connect();
    peer.wait_for_consumers(&queue, 0);
    let report = format!("{name} on {broker}: 0 consumers, 1 message waiting\n");
    let error = format!("rpc-client: no server is consuming '{name}' on {broker}: nothing ran\n");
    peer.wait_for_messages(&queue, 1);
    assert_output(&mut client(&queue, &["--check"]), 4, &report, &error);
}

#[test]
fn without_waiting_a_queue_without_consumers_is_exit_code_4_and_nothing_is_sent() {
    let queue = Queue::declare("no_wait");
    let error = format!(
        "rpc-client: no server is consuming '{}' on {}: nothing ran\n",
        &*queue,
        broker::authority()
    );
    assert_output(&mut client(&queue, &["--no-wait", "30"]), 4, "", &error);
    assert!(Peer::connect().try_take(&queue).is_none());
    let _server = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["--no-wait", "30"]), 0, "832040\n", "");
}

#[test]
fn with_wait_a_missing_queue_is_waited_for_until_the_deadline() {
    let queue = Queue::named("wait");
    let error = format!(
        "rpc-client: no queue '{}' on {}: is rpc-server running?\n",
        &*queue,
        broker::authority()
    );
    assert_output(
        &mut client(&queue, &["--wait", "-q", "-t", "1s", "30"]),
        4,
        "",
        &error,
    );
    let caller = Program::spawn("rpc-client", &["--queue", &queue, "--wait", "-v", "30"]);
    caller.wait_for_log("sending again");
    let _server = Program::start_server(&queue, &[]);
    assert_eq!(caller.next_line(), "832040");
}

/// The network is so slow that at some of the deadlines a resend would be on its way.
#[test]
fn with_wait_a_missing_queue_is_exit_code_4_whenever_the_deadline_passes() {
    let queue = Queue::named("wait_slow");
    let proxy = Proxy::start();
    proxy.set_traffic(Traffic::Delayed(Duration::from_millis(100)));
    let error = format!(
        "rpc-client: no queue '{}' on {}: is rpc-server running?\n",
        &*queue,
        proxy.authority()
    );
    thread::scope(|scope| {
        for timeout in 0..8 {
            let timeout = format!("{}ms", 4_000 + 50 * timeout);
            let mut call = client(&queue, &["--wait", "-q", "-t", &timeout, "30"]);
            call.env("AMQP_URL", proxy.url());
            scope.spawn(|| assert_output(&mut { call }, 4, "", &error));
        }
    });
}

#[test]
fn a_call_that_waited_behind_others_says_so() {
    let queue = Queue::named("ahead");
    let _server = Program::start_server(&queue, &["--delay", "1s"]);
    let calls = client(&queue, &["-q", "-t", "2500ms", "1", "2", "3", "4"])
        .assert()
        .code(5);
    let errors = String::from_utf8_lossy(&calls.get_output().stderr).into_owned();
    let expected =
        "; 3 calls of this run were ahead of it: lower --in-flight, or raise --timeout\n";
    assert!(errors.ends_with(expected), "{errors}");
}

#[test]
fn no_broker_is_exit_code_3() {
    let unused = TcpListener::bind("127.0.0.1:0")
        .expect("a port is free")
        .local_addr()
        .expect("the socket is bound");
    let stderr = format!(
        "rpc-client: {unused} cannot be reached (from AMQP_URL): connection refused: is RabbitMQ running there?\n"
    );
    let unreachable = format!("amqp://{unused}");
    assert_output(
        client("any", &["1", "2"]).env("AMQP_URL", &unreachable),
        3,
        "\n",
        &stderr,
    );
    assert_output(
        client("any", &["1", "-o", "text", "-q"]).env("AMQP_URL", &unreachable),
        3,
        "",
        &stderr,
    );
}

/// The broker does not say which of several requests it refused. The others may have run.
#[test]
fn a_refused_request_is_exit_code_3_if_it_is_the_only_one_and_else_5() {
    for (count, numbers, code, answers) in [(1, &["30"][..], 3, ""), (2, &["30", "7"], 5, "\n\n")] {
        let broker = ScriptedBroker::start(PUBLISH, Action::Refuse(count));
        let authority = broker.url.trim_start_matches("amqp://");
        let refused = format!("refused: {EXCHANGE_REFUSED}: the user lacks this permission");
        let error = format!("rpc-client: {authority} {refused}\n");
        let mut call = client("q", &["-q", "-t", "1h", "-j", "2"]);
        call.env("AMQP_URL", &broker.url).args(numbers);
        assert_output(&mut call, code, answers, &error);
    }
}

#[test]
fn too_many_workers_for_the_broker_are_exit_code_3() {
    let broker = exclusive_node();
    let _few = broker.set_variable("channel_max", "3");
    let mut server = command("rpc-server");
    server
        .args(["--queue", "few_channels", "--workers", "8"])
        .env("AMQP_URL", broker.url());
    let output = server.assert().code(3).get_output().clone();
    let log = String::from_utf8_lossy(&output.stderr);
    let error = format!(
        "rpc-server: {} allows no more channels: reduce --workers, or raise the broker's channel_max\n",
        broker.authority()
    );
    assert!(log.ends_with(&error), "{log}");
}

#[test]
fn no_queue_is_exit_code_4() {
    let queue = Queue::named("no_queue");
    let error = format!(
        "rpc-client: no queue '{}' on {}: is rpc-server running?\n",
        &*queue,
        broker::authority()
    );
    assert_output(&mut client(&queue, &["30"]), 4, "", &error);
    assert_output(
        &mut client(&queue, &["-o", "text", "-q", "30"]),
        4,
        "",
        &error,
    );
}

#[test]
fn a_request_that_a_server_drops_is_exit_code_5() {
    let queue = Queue::declare("drops");
    let server = thread::spawn({
        let peer = Peer::connect();
        let queue = queue.to_owned();
        move || peer.take(&queue)
    });
    let error = format!(
        "rpc-client: fib(30): no answer from '{}' on {} within 5s: \
         no server is consuming, 0 messages are waiting\n",
        &*queue,
        broker::authority()
    );
    assert_output(
        &mut client(&queue, &["-q", "-t", "5s", "30"]),
        5,
        "",
        &error,
    );
    server.join().expect("the peer took the request");
}

/// A server that answers without the correlation id, as an example of pika does, or with another
/// one.
#[test]
fn a_reply_without_the_calls_id_is_named_by_the_error_of_exit_code_5() {
    let queue = Queue::declare("foreign_reply");
    let error = format!(
        "rpc-client: fib(30): no answer from '{}' on {} within 6s: a reply without this call's id was \
         discarded: does the server copy correlation_id?\n",
        &*queue,
        broker::authority()
    );
    for properties in [
        AmqpProperties::default(),
        AmqpProperties::default().with_correlation_id("1".into()),
    ] {
        let mut call = client(&queue, &["-q", "-t", "6s", "30"]);
        let call = thread::spawn(move || call.output().expect("the client runs"));
        let peer = Peer::connect();
        let request = peer.take(&queue);
        let reply_to = request.properties.reply_to().as_ref();
        peer.publish(reply_to.expect("it is a call"), b"832040", properties);
        let output = call.join().expect("the client runs");
        let text = |bytes| String::from_utf8(bytes).expect("it is text");
        assert_eq!(
            (
                output.status.code(),
                text(output.stdout),
                text(output.stderr)
            ),
            (Some(5), String::new(), error.clone())
        );
    }
}

#[test]
fn a_full_disk_is_exit_code_6() {
    let queue = Queue::named("full_disk");
    let _server = Program::start_server(&queue, &[]);
    bash(&format!("rpc-client --queue {} 30 >/dev/full", &*queue))
        .code(6)
        .stdout("")
        .stderr("rpc-client: cannot write to standard output: no space left on device\n");
}

#[test]
fn a_reader_of_standard_output_that_goes_away_is_exit_code_141() {
    let queue = Queue::named("sigpipe");
    let _server = Program::start_server(&queue, &["-q"]);
    let script = format!(
        "rpc-client --queue {} --repeat 100000 30 | head -1; echo ${{PIPESTATUS[0]}}",
        &*queue
    );
    bash(&script).code(0).stdout("832040\n141\n").stderr("");
}

#[test]
fn a_reader_that_goes_away_is_exit_code_141_even_if_the_input_never_ends() {
    let queue = Queue::named("endless");
    let _server = Program::start_server(&queue, &["-q", "--prefetch", "64"]);
    let script = format!(
        "yes 30 | rpc-client --queue {} - | head -2; echo ${{PIPESTATUS[1]}}",
        &*queue
    );
    bash(&script)
        .code(0)
        .stdout("832040\n832040\n141\n")
        .stderr("");
}

#[test]
fn sigint_and_sigterm_end_a_client_at_once() {
    let queue = Queue::declare("client_signals");
    for signal in [Signal::INT, Signal::TERM] {
        let mut call = Program::spawn("rpc-client", &["--queue", &queue, "30"]);
        call.wait_for_log("no server is consuming");
        call.send_signal(signal);
        assert_eq!(
            call.wait().signal(),
            Some(signal.as_raw()),
            "a shell reports 128 more"
        );
    }
}
