//! Batches, as shell scripts use them: numbers from standard input, JSON, a summary.

use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, Program};
use std::thread;

#[test]
fn standard_input_is_a_number_per_line() {
    let queue = Queue::named("stdin");
    let _server = Program::start_server(&queue, &[]);
    let mut call = client(&queue, &["5", "-", "8"]);
    assert_output(call.write_stdin("30\n 7\t\r\n9"), 0, "5\n832040\n13\n34\n21\n", "");
    assert_output(client(&queue, &["-"]).write_stdin(""), 0, "", "");
}

/// A bad line and a failed call leave a gap, name themselves, and stop nothing.
#[test]
fn a_bad_line_is_named_and_does_not_stop_the_rest() {
    let queue = Queue::named("bad_line");
    let _server = Program::start_server(&queue, &["--max-n", "100"]);
    let stderr = "rpc-client: line 2: 'abc' is not a natural number in decimal digits, 20 at most\n\
                  rpc-client: line 3: '' is not a natural number in decimal digits, 20 at most\n\
                  rpc-client: line 4: fib(101): out of range: 101 is larger than 100, the largest n served here\n";
    let mut call = client(&queue, &["-j", "1", "-"]);
    assert_output(call.write_stdin("7\nabc\n\n101\n8\n"), 2, "13\n\n\n\n21\n", stderr);
}

#[test]
fn the_first_answer_comes_before_the_input_ends() {
    let queue = Queue::named("streamed");
    let _server = Program::start_server(&queue, &[]);
    let script = format!(
        "coproc CALL {{ rpc-client --queue {} -; }}
         echo 30 >&${{CALL[1]}}; read -r first <&${{CALL[0]}}; echo first $first
         echo 7 >&${{CALL[1]}}; read -r second <&${{CALL[0]}}; echo second $second",
        &*queue
    );
    bash(&script).code(0).stdout("first 832040\nsecond 13\n").stderr("");
}

/// A JSON line without what differs from run to run.
fn without_noise(json: &str) -> String {
    let cut = |text: &str, name: &str| match text.split_once(&format!(",\"{name}\":")) {
        Some((before, after)) => {
            let rest = after.find([',', '}']).map_or("", |end| &after[end..]);
            format!("{before}{rest}")
        }
        None => text.to_owned(),
    };
    cut(&cut(json, "latency_ms"), "correlation_id")
}

#[test]
fn json_is_an_object_for_each_call_and_bad_line() {
    let queue = Queue::named("json");
    let _server = Program::start_server(&queue, &["--max-n", "100"]);
    let mut call = client(&queue, &["-o", "json", "-"]);
    let output = call.write_stdin("30\nabc\n101\n").assert().code(2).get_output().clone();
    let stdout = String::from_utf8(output.stdout).expect("JSON is text");
    let lines: Vec<String> = stdout.lines().map(without_noise).collect();
    let expected = [
        r#"{"n":30,"result":"832040"}"#,
        r#"{"input":"abc","error":{"code":"usage","message":"line 2: 'abc' is not a natural number in decimal digits, 20 at most"}}"#,
        r#"{"n":101,"error":{"code":"out-of-range","message":"out of range: 101 is larger than 100, the largest n served here"}}"#,
    ];
    assert_eq!(lines, expected);
    assert_eq!(stdout.matches("\"latency_ms\":").count(), 2);
    assert_eq!(stdout.matches("\"correlation_id\":").count(), 2);

    let missing = Queue::named("json_missing");
    let mut call = client(&missing, &["-o", "json", "1"]);
    let output = call.assert().code(4).get_output().clone();
    let stdout = String::from_utf8(output.stdout).expect("JSON is text");
    assert!(stdout.contains(r#""error":{"code":"no-server","message":"no queue"#), "{stdout}");
}

/// What is asked for first is answered last.
#[test]
fn unordered_answers_come_as_they_are_ready() {
    let queue = Queue::declare("unordered");
    let mut call = client(&queue, &["-q", "-o", "json", "--unordered", "30", "7", "8"]);
    let caller = thread::spawn(move || call.assert().code(0).stderr("").get_output().clone());
    let server = Peer::connect();
    let [first, second, third] = [(); 3].map(|()| server.take(&queue));
    for (request, answer) in [(second, "13"), (third, "21"), (first, "832040")] {
        server.reply(&request, answer.as_bytes());
    }
    let output = caller.join().expect("the caller got its answers");
    let stdout = String::from_utf8(output.stdout).expect("JSON is text");
    let order: Vec<&str> =
        stdout.lines().map(|line| line.split([':', ',']).nth(1).unwrap_or_default()).collect();
    assert_eq!(order, ["7", "8", "30"]);
    let stderr = "rpc-client: --unordered needs --output json, or answers cannot be told apart: try --help\n";
    assert_output(&mut client(&queue, &["--unordered", "7"]), 2, "", stderr);
}

#[test]
fn the_summary_counts_calls_and_errors() {
    let queue = Queue::named("summary");
    let _server = Program::start_server(&queue, &["--max-n", "100"]);
    let mut call = client(&queue, &["-q", "--summary=json", "7", "101", "8"]);
    let output = call.assert().code(1).stdout("13\n\n21\n").get_output().clone();
    let stderr = String::from_utf8(output.stderr).expect("JSON is text");
    let summary = stderr.lines().last().unwrap_or_default();
    assert!(
        summary.starts_with(r#"{"calls":3,"errors":{"out-of-range":1},"seconds":"#),
        "{stderr}"
    );
    for name in ["calls_per_second", "latency_ms", "min", "p50", "p90", "p99", "p99.9", "max"] {
        assert!(summary.contains(&format!("\"{name}\":")), "{name}: {summary}");
    }
    let output =
        client(&queue, &["--summary", "7"]).assert().code(0).stdout("13\n").get_output().clone();
    let stderr = String::from_utf8(output.stderr).expect("it is text");
    assert!(stderr.starts_with("rpc-client: 1 call in "), "{stderr}");
    assert!(stderr.ends_with("; errors: none\n"), "{stderr}");
}

/// The input goes on without end; its reader does not.
#[test]
fn an_endless_input_ends_with_its_reader() {
    let queue = Queue::named("endless");
    let _server = Program::start_server(&queue, &["-q", "--prefetch", "64"]);
    let script =
        format!("yes 30 | rpc-client --queue {} - | head -2; echo ${{PIPESTATUS[1]}}", &*queue);
    bash(&script).code(0).stdout("832040\n832040\n141\n").stderr("");
}
