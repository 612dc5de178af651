//! What the programs print on standard output: `--output`, `--summary`, `--quiet`, and the
//! tutorial's lines.

use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, Program};
use rpc_common::fib::fib;
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::thread;

#[test]
fn raw_output_is_the_number_and_nothing_else() {
    let queue = Queue::named("one_call");
    let _server = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
}

#[test]
fn a_shell_script_gets_the_answer_into_a_variable() {
    let queue = Queue::named("variable");
    let _server = Program::start_server(&queue, &[]);
    let script = format!(
        "answer=$(rpc-client --queue {} 30); echo \"<$answer> $?\"",
        &*queue
    );
    bash(&script).code(0).stdout("<832040> 0\n").stderr("");
}

#[test]
fn the_millionth_number_is_exact() {
    let queue = Queue::named("million");
    let _server = Program::start_server(&queue, &[]);
    assert_output(
        &mut client(&queue, &["1000000"]),
        0,
        &format!("{}\n", fib(1_000_000)),
        "",
    );
}

#[test]
fn text_output_is_what_the_tutorials_client_prints() {
    let queue = Queue::named("text");
    let _server = Program::start_server(&queue, &[]);
    let got = " [.] Got 832040\n";
    let asked = " [x] Requesting fib(30)\n";
    assert_output(&mut client(&queue, &["-o", "text", "30"]), 0, got, asked);
    assert_output(&mut client(&queue, &["-o", "text", "-q", "30"]), 0, got, "");
    let several = " [.] fib(30) = 832040\n [.] fib(7) = 13\n";
    assert_output(
        &mut client(&queue, &["-o", "text", "-q", "30", "7"]),
        0,
        several,
        "",
    );
}

#[test]
fn on_a_terminal_the_output_is_text() {
    let queue = Queue::named("terminal");
    let _server = Program::start_server(&queue, &[]);
    let script = format!("script -qec 'rpc-client --queue {} 30' /dev/null", &*queue);
    bash(&script)
        .code(0)
        .stdout(" [x] Requesting fib(30)\r\n [.] Got 832040\r\n");
}

#[test]
fn a_server_prints_the_tutorials_lines() {
    let queue = Queue::named("lines");
    let server = Program::start_server(&queue, &[]);
    assert_output(&mut client(&queue, &["30", "7"]), 0, "832040\n13\n", "");
    assert_eq!(server.stop(), [" [.] fib(30)", " [.] fib(7)"]);
}

#[test]
fn a_quiet_server_prints_only_that_it_awaits_requests() {
    let queue = Queue::named("quiet");
    let server = Program::start_server(&queue, &["--quiet"]);
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", "");
    assert_eq!(server.stop(), [""; 0]);
}

/// A JSON line without the fields whose values differ between runs.
fn without_varying_fields(json: &str) -> String {
    let remove = |text: &str, name: &str| match text.split_once(&format!(",\"{name}\":")) {
        Some((before, after)) => {
            let rest = after.find([',', '}']).map_or("", |end| &after[end..]);
            format!("{before}{rest}")
        }
        None => text.to_owned(),
    };
    remove(&remove(json, "latency_ms"), "correlation_id")
}

#[test]
fn json_output_has_one_object_per_call_and_bad_line() {
    let queue = Queue::named("json");
    let _server = Program::start_server(&queue, &["--max-n", "100"]);
    let mut call = client(&queue, &["-o", "json", "-"]);
    let output = call
        .write_stdin("30\nabc\n101\n")
        .assert()
        .code(2)
        .get_output()
        .clone();
    let stdout = String::from_utf8(output.stdout).expect("JSON is text");
    let lines: Vec<String> = stdout.lines().map(without_varying_fields).collect();
    let expected = [
        r#"{"n":30,"result":"832040"}"#,
        r#"{"input":"abc","error":{"code":"usage","message":"line 2: 'abc' is not a whole number (digits only, such as 30)"}}"#,
        r#"{"n":101,"error":{"code":"out-of-range","message":"out of range: 101 is larger than 100, the largest n served here"}}"#,
    ];
    assert_eq!(lines, expected);
    assert_eq!(stdout.matches("\"latency_ms\":").count(), 2);
    assert_eq!(stdout.matches("\"correlation_id\":").count(), 2);

    let missing = Queue::named("json_missing");
    let mut call = client(&missing, &["-o", "json", "1"]);
    let output = call.assert().code(4).get_output().clone();
    let stdout = String::from_utf8(output.stdout).expect("JSON is text");
    assert!(
        stdout.contains(r#""error":{"code":"no-server","message":"no queue"#),
        "{stdout}"
    );
}

/// The peer answers the first call last.
#[test]
fn unordered_answers_are_printed_as_they_arrive() {
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
    let order: Vec<&str> = stdout
        .lines()
        .map(|line| line.split([':', ',']).nth(1).unwrap_or_default())
        .collect();
    assert_eq!(order, ["7", "8", "30"]);
    let stderr = "rpc-client: --unordered needs --output json, or answers cannot be told apart; see --help\n";
    assert_output(&mut client(&queue, &["--unordered", "7"]), 2, "", stderr);
}

#[test]
fn the_summary_counts_calls_and_errors() {
    let queue = Queue::named("summary");
    let _server = Program::start_server(&queue, &["--max-n", "100"]);
    let mut call = client(&queue, &["-q", "--summary=json", "7", "101", "8"]);
    let output = call
        .assert()
        .code(1)
        .stdout("13\n\n21\n")
        .get_output()
        .clone();
    let stderr = String::from_utf8(output.stderr).expect("JSON is text");
    let summary = stderr.lines().last().unwrap_or_default();
    assert!(
        summary.starts_with(r#"{"calls":3,"errors":{"out-of-range":1},"seconds":"#),
        "{stderr}"
    );
    for name in [
        "calls_per_second",
        "latency_ms",
        "min",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "max",
    ] {
        assert!(
            summary.contains(&format!("\"{name}\":")),
            "{name}: {summary}"
        );
    }
    let output = client(&queue, &["--summary", "7"])
        .assert()
        .code(0)
        .stdout("13\n")
        .get_output()
        .clone();
    let stderr = String::from_utf8(output.stderr).expect("the summary is text");
    assert!(stderr.starts_with("rpc-client: 1 call in "), "{stderr}");
    assert!(
        stderr.contains("; errors: none; latency in ms: min ") && stderr.lines().count() == 1,
        "{stderr}"
    );
}

#[test]
fn the_summary_of_what_was_done_is_printed_at_ctrl_c() {
    let queue = Queue::named("interrupted");
    let _server = Program::start_server(&queue, &["--delay", "10ms"]);
    let mut caller = Program::spawn(
        "rpc-client",
        &["--queue", &queue, "--repeat", "1000000", "--summary", "6"],
    );
    assert_eq!(caller.next_line(), "8");
    caller.send_signal(Signal::INT);
    assert_eq!(caller.wait().signal(), Some(Signal::INT.as_raw()));
    let (_, stderr) = caller.remaining_output();
    assert!(
        stderr
            .iter()
            .any(|line| line.contains("; errors: none; latency in ms: min ")),
        "{stderr:?}"
    );
}

/// What rpc-client prints on a terminal of this width, with its control characters.
fn on_terminal(columns: u32, queue: &str, args: &str) -> String {
    let call = format!("stty cols {columns} rows 24; rpc-client --queue {queue} {args}");
    let output = bash(&format!("TERM=xterm script -qec '{call}' /dev/null"))
        .success()
        .get_output()
        .stdout
        .clone();
    String::from_utf8(output).expect("the output is text")
}

#[test]
fn on_a_terminal_a_call_that_waits_and_a_batch_show_progress_which_is_gone_at_the_end() {
    let queue = Queue::named("progress");
    let _server = Program::start_server(&queue, &["--delay", "3s"]);
    let waiting = format!("waiting for an answer from '{}' … 1s", &*queue);
    let shown = on_terminal(80, &queue, "30");
    assert!(
        shown.contains(&waiting) && shown.ends_with("s\r\x1b[K [.] Got 832040\r\n"),
        "{shown:?}"
    );
    let shown = on_terminal(80, &queue, "30 7 2>&1 >/dev/null");
    assert!(
        shown.contains("0/2 calls, 0/s, 0 errors") && shown.ends_with("\r\x1b[K"),
        "{shown:?}"
    );
    assert!(
        !on_terminal(80, &queue, "-q 30").contains("waiting for"),
        "quiet"
    );
    assert_output(&mut client(&queue, &["30"]), 0, "832040\n", ""); // a pipe
}

#[test]
fn answers_that_go_to_a_file_do_not_take_the_progress_off_the_terminal() {
    let queue = Queue::named("progress_of_file");
    let _server = Program::start_server(&queue, &["--delay", "100ms"]);
    let shown = on_terminal(80, &queue, "-j 1 --repeat 20 30 >/dev/null");
    let cleared = shown.matches("\r\x1b[K").count();
    let drawn = shown.matches("/20 calls").count();
    assert!(
        drawn > 0 && cleared == drawn + 1,
        "drawn {drawn} times, cleared also at the end only: {shown:?}"
    );
}

#[test]
fn on_a_terminal_the_summary_is_a_histogram_that_fits() {
    let queue = Queue::named("histogram");
    let _server = Program::start_server(&queue, &[]);
    let shown = on_terminal(70, &queue, "--repeat 100 --summary 30 >/dev/null");
    let lines: Vec<_> = shown.lines().filter(|line| line.contains(" ms ")).collect();
    assert_eq!(lines.len(), 6, "{shown:?}");
    assert!(
        lines.iter().all(|line| line.chars().count() <= 70)
            && lines.iter().any(|line| line.contains('▇')),
        "{shown:?}"
    );
    let shown = on_terminal(40, &queue, "--repeat 100 --summary 30 >/dev/null");
    assert!(shown.contains("latency in ms: min"), "{shown:?}");
}

/// It would draw over the shell's prompt.
#[test]
fn a_background_job_shows_no_progress() {
    let queue = Queue::declare("background_progress");
    let call = format!("rpc-client --queue {} -t 2.5s 30", &*queue);
    let job = format!("bash -c \"set -m; {call} & wait\"");
    for (command, is_shown) in [(&job, false), (&call, true)] {
        let output = bash(&format!("TERM=xterm script -qec '{command}' /dev/null"));
        let output = output.get_output().clone();
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        let waiting = shown.contains("waiting for an answer");
        assert_eq!(waiting, is_shown, "{command}: {shown}");
        assert!(shown.contains("no answer from"), "{shown}");
    }
}

/// With `stty tostop` its first line would stop the job.
#[test]
fn a_background_job_is_not_stopped_by_its_progress() {
    let queue = Queue::named("background_tostop");
    let _server = Program::start_server(&queue, &["--delay", "2500ms"]);
    let job = format!("bash -c \"set -m; stty tostop; rpc-client --queue {} -o raw 30 >/dev/null & wait \\$!; echo job \\$?\"", &*queue);
    let output = bash(&format!("TERM=xterm script -qec '{job}' /dev/null"));
    let shown = String::from_utf8_lossy(&output.get_output().stdout).into_owned();
    assert!(shown.ends_with("job 0\r\n"), "{shown}");
    assert!(!shown.contains("waiting for an answer"), "{shown}");
}
