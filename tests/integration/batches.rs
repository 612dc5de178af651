//! Many calls in one run: from arguments, `--repeat` and standard input.

use crate::support::peer::Queue;
use crate::support::programs::{assert_output, bash, client, Program};
use crate::support::proxy::{Proxy, Traffic};
use rpc_common::fib::fib;
use std::time::Duration;

#[test]
fn several_numbers_are_answered_in_the_order_asked() {
    let queue = Queue::named("several");
    let _server = Program::start_server(&queue, &[]);
    let answers = "0\n1\n1\n12200160415121876738\n19740274219868223167\n\
                   222232244629420445529739893461909967206666939096499764990979600\n";
    assert_output(
        &mut client(&queue, &["0", "1", "2", "93", "94", "300"]),
        0,
        answers,
        "",
    );
}

/// Several workers answer out of order, and with fewer places than calls the calls wait for each
/// other.
#[test]
fn many_calls_in_flight_keep_their_order() {
    let queue = Queue::named("in_flight");
    let _server = Program::start_server(&queue, &["--workers", "4", "--prefetch", "3", "-q"]);
    let numbers: Vec<u64> = (0..400).map(|i| i * 7919 % 1000).collect();
    let args: Vec<String> = numbers.iter().map(u64::to_string).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let answers: String = numbers.iter().map(|n| format!("{}\n", fib(*n))).collect();
    for in_flight in ["1", "7", "64"] {
        assert_output(
            client(&queue, &["-j", in_flight]).args(&args),
            0,
            &answers,
            "",
        );
    }
}

#[test]
fn repeat_makes_every_call_several_times() {
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
fn standard_input_has_one_number_per_line() {
    let queue = Queue::named("stdin");
    let _server = Program::start_server(&queue, &[]);
    let mut call = client(&queue, &["5", "-", "8"]);
    assert_output(
        call.write_stdin("30\n 7\t\r\n9"),
        0,
        "5\n832040\n13\n34\n21\n",
        "",
    );
    assert_output(client(&queue, &["-"]).write_stdin(""), 0, "", "");
}

/// A bad line and a failed call print an empty line and an error.
#[test]
fn a_bad_line_is_reported_and_does_not_stop_the_rest() {
    let queue = Queue::named("bad_line");
    let _server = Program::start_server(&queue, &["--max-n", "100"]);
    let stderr = "rpc-client: line 2: 'abc' is not a whole number (digits only, such as 30)\n\
                  rpc-client: line 3: '' is not a whole number (digits only, such as 30)\n\
                  rpc-client: line 4: fib(101): out of range: 101 is larger than 100, the largest n served here\n";
    let mut call = client(&queue, &["-j", "1", "-"]);
    assert_output(
        call.write_stdin("7\nabc\n\n101\n8\n"),
        2,
        "13\n\n\n\n21\n",
        stderr,
    );
}

#[test]
fn the_first_answer_is_printed_before_the_input_ends() {
    let queue = Queue::named("streamed");
    let _server = Program::start_server(&queue, &[]);
    let script = format!(
        "coproc CALL {{ rpc-client --queue {} -; }}
         echo 30 >&${{CALL[1]}}; read -r first <&${{CALL[0]}}; echo first $first
         echo 7 >&${{CALL[1]}}; read -r second <&${{CALL[0]}}; echo second $second",
        &*queue
    );
    bash(&script)
        .code(0)
        .stdout("first 832040\nsecond 13\n")
        .stderr("");
}

/// The broker is slow to report the state of the queue, which the client asks for when a call times
/// out. The other calls keep their connection, and are sent once.
#[test]
fn a_call_that_times_out_does_not_disturb_the_others() {
    let queue = Queue::named("far_away");
    let proxy = Proxy::start();
    let server = Program::start_server(&queue, &["--workers", "2", "--delay", "5s"]);
    proxy.set_traffic(Traffic::Delayed(Duration::from_millis(50)));
    let args = ["--queue", &queue, "-q", "-t", "8s", "-"];
    let mut client = Program::spawn_at(&proxy.url(), "rpc-client", &args);
    for n in ["11", "12", "13"] {
        client.write_line(n);
    }
    assert_eq!(client.next_line(), "89");
    client.write_line("14");
    client.close_stdin();
    let answers = ["144", "", "377"].map(|_| client.next_line());
    assert_eq!(
        answers,
        ["144", "", "377"],
        "the third waited for a worker for too long"
    );
    assert_eq!(client.wait_for_exit_code(), Some(5));
    assert_eq!(
        server
            .stop()
            .iter()
            .filter(|line| line.ends_with("fib(14)"))
            .count(),
        1
    );
}
