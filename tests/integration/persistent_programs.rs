//! Promise: a program can stay. `rpc-server --persistent -- PROGRAM` keeps a process for each
//! worker, which handles one request after the other, as lines of JSON. No caller gets another
//! caller's answer, and nothing is left behind.

use crate::support::peer::{Peer, Queue};
use crate::support::programs::{client, command, Program};
use crate::support::served::{failure, wait_until_ended, Served};
use crate::support::{eventually, Folder};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use rpc_common::message::{Answer, ErrorCode, Failure};
use rpc_common::properties::{TableBuilder, Value};
use rustix::process::{kill_process, Pid, Signal};
use std::collections::BTreeMap;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{env, fs};

/// Answers with the request, or does what the request says, badly.
const HANDLER: &str = r#"
import json, os, sys, time
def write(text):
    sys.stdout.write(text); sys.stdout.flush()
def say(**reply):
    write(json.dumps(reply) + "\n")
sys.stderr.write("starting\n")
say(ready=True)
for line in sys.stdin:
    request = json.loads(line)
    i, data = request["id"], request.get("data")
    good = json.dumps({"id": i, "result": "right"}) + "\n"
    if data == "request": say(id=i, result=request)
    elif data == "environment": say(id=i, result=[os.environ.get("RPC_PERSISTENT"), os.environ.get("RPC_REQUEST_QUEUE")])
    elif data == "pid": say(id=i, result=os.getpid())
    elif data == "bytes": say(id=i, result_base64="AP8=")
    elif data == "number": write('{"id":%d,"result":1.50e3}\n' % i)
    elif data == "typed": say(id=i, result="x", content_type="text/x", type="t", headers={"h": "v", "n": 7})
    elif data == "error": say(id=i, error={"code": "quota", "message": "no more"})
    elif data == "blank": write("\n \n" + good)
    elif data == "stray": write("debug: here\n" + good)
    elif data == "other id": say(id=i + 1, result="wrong")
    elif data == "id as text": say(id=str(i), result="wrong")
    elif data == "half": write(good[:9]); os._exit(0)
    elif data == "not UTF-8": sys.stdout.buffer.write(b'{"id":%d,"result":"\xff"}\n' % i); sys.stdout.flush()
    elif data == "NUL": write('{"id":%d,"result":"\0"}\n' % i)
    elif data == "twice the key": write('{"id":%d,"result":"a","result":"b"}\n' % i)
    elif data == "both": say(id=i, result="a", error={"code": "c", "message": "m"})
    elif data == "neither": say(id=i)
    elif data == "deep": write('{"id":%d,"error":%s}\n' % (i, "[" * 9999 + "]" * 9999))
    elif data == "two": write(good + good)
    elif data == "then stray": write(good); time.sleep(0.1); write("after\n")
    elif data == "endless":
        while True: write("x" * 1000000)
    elif data == "large": say(id=i, result="x" * 2000000)
    elif data == "hang": time.sleep(1000)
    elif data == "slow": time.sleep(1.5); write(good)
    elif data == "log": sys.stderr.write("before the reply\n"); sys.stderr.flush(); write(good)
    elif data == "log later": write(good); time.sleep(0.1); sys.stderr.write("while idle\n"); sys.stderr.flush()
    elif data == "answer and exit": write(good); os._exit(1)
    elif data == "close": os.close(0); time.sleep(1000)
    elif data.startswith("exit"): os._exit(int(data[5:]))
    elif data.startswith("signal"): os.kill(os.getpid(), int(data[7:]))
    else: write(good)
"#;

const DISAGREED: &str =
    "internal error: the program did not answer as it should, see the server's log";

fn process_id(served: &Served) -> Pid {
    let answer = served.ask(b"pid").expect("it answers");
    let number = String::from_utf8(answer.body).unwrap();
    Pid::from_raw(number.parse().unwrap()).unwrap()
}

/// Asks in the background, for 5 seconds. Returns what the client prints.
fn ask_in_background(served: &Served, data: &'static str) -> JoinHandle<String> {
    let queue = served.queue.to_string();
    thread::spawn(move || {
        let output = client(&queue, &["-t", "5s", "--data", data]).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    })
}

#[track_caller]
fn assert_right(served: &Served) {
    served.assert_answer(b"which?", b"right");
}

#[test]
fn a_request_is_a_line_of_json() {
    let served = Served::python("a_line", &[], HANDLER);
    let headers = FieldTable::from([
        ("Lang".into(), AmqpValue::LongString("de".into())),
        ("tries".into(), AmqpValue::LongInt(2)),
    ]);
    let properties = AmqpProperties::default()
        .with_content_type("text/plain".into())
        .with_correlation_id("c1".into())
        .with_message_id("m1".into())
        .with_type_("t".into())
        .with_app_id("a".into())
        .with_headers(headers);
    let answer = served.ask_with(b"request", properties).unwrap();
    let request: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let expected = serde_json::json!({
        "id": 1, "data": "request", "content_type": "text/plain", "message_id": "m1", "type": "t",
        "app_id": "a", "correlation_id": "c1", "headers": {"Lang": "de", "tries": 2}, "redelivered": false,
    });
    assert_eq!(request, expected);
    assert_eq!(answer.content_type.as_deref(), Some("application/json"));
    let environment = served.ask(b"environment").unwrap().body;
    let expected = format!(r#"["1", "{}"]"#, &*served.queue);
    assert_eq!(String::from_utf8_lossy(&environment), expected);
}

#[test]
fn a_reply_is_text_json_bytes_or_an_error() {
    let served = Served::python("replies", &["--content-type", "text/plain"], HANDLER);
    let text = Answer::from("right".to_owned());
    assert_eq!(served.ask(b"blank"), Ok(text));
    let number = Answer::new(b"1.50e3".into()).with_content_type("application/json".into());
    assert_eq!(served.ask(b"number"), Ok(number));
    let bytes = Answer::new(b"\0\xff".into()).with_content_type("text/plain".into());
    assert_eq!(served.ask(b"bytes"), Ok(bytes));
    let headers = TableBuilder::default()
        .with_text("h", "v")
        .with("n", Value::Integer(7));
    let typed = Answer::new(b"x".into())
        .with_content_type("text/x".into())
        .with_type("t".into())
        .with_headers(headers);
    assert_eq!(served.ask(b"typed"), Ok(typed));
    let error = Failure::new("quota".into(), "no more");
    assert_eq!(served.ask(b"error"), Err(error));
}

#[test]
fn a_line_that_is_not_the_reply_is_internal_and_no_caller_gets_another_ones_answer() {
    let served = Served::python("stray_lines", &[], HANDLER);
    for bad in [
        "stray",
        "other id",
        "id as text",
        "not UTF-8",
        "NUL",
        "twice the key",
        "both",
        "neither",
        "deep",
    ] {
        let before = process_id(&served);
        let expected = Err(failure(ErrorCode::Internal, DISAGREED));
        assert_eq!(served.ask(bad.as_bytes()), expected, "{bad}");
        served
            .server
            .wait_for_log("a line on standard output that is no reply: '");
        assert_right(&served);
        assert_ne!(process_id(&served), before, "{bad}");
    }
    // The reply is right. A line behind it may come when the next request is in hand.
    let internal = failure(ErrorCode::Internal, DISAGREED);
    for stray in ["two", "then stray"] {
        served.assert_answer(stray.as_bytes(), b"right");
        for _ in 0..20 {
            match served.ask(b"which?") {
                Ok(answer) => assert_eq!(answer.body, b"right"),
                Err(failure) => assert_eq!(failure, internal),
            }
        }
        assert_right(&served);
    }
}

#[test]
fn a_request_that_the_program_ends_in_fails_with_its_exit_code_or_signal() {
    let served = Served::python("ends", &[], HANDLER);
    let failed = |message: &str| failure(ErrorCode::Failed, message);
    for (end, expected) in [
        (
            "exit 3",
            failed("the program failed with exit code 3").with_exit_code(3),
        ),
        (
            "exit 75",
            failure(
                ErrorCode::Unavailable,
                "the program failed with exit code 75",
            )
            .with_exit_code(75),
        ),
        (
            "signal 11",
            failed("the program was ended by signal 11 (SIGSEGV)"),
        ),
        // Another process is asked, once.
        ("exit 0", failed("the program ended before it answered")),
        ("half", failed("the program ended before it answered")),
    ] {
        assert_eq!(served.ask(end.as_bytes()), Err(expected), "{end}");
        assert_right(&served);
    }
    served.assert_answer(b"answer and exit", b"right");
    assert_right(&served);
}

#[test]
fn a_process_that_ends_without_taking_the_request_is_replaced_and_nobody_notices() {
    let served = Served::python("idle_end", &[], HANDLER);
    kill_process(process_id(&served), Signal::KILL).unwrap();
    assert_right(&served);
    served
        .server
        .wait_for_log("has ended without a request; starting it again");
    // The first process ends at its first request, the second answers.
    let folder = Folder::new("once");
    let script = format!(
        "import os\nfile = '{}'\nif not os.path.exists(file):\n  open(file, 'w')\n  \
         print('{{\"ready\":true}}', flush=True)\n  input()\n  os._exit(0)\n{HANDLER}",
        folder.path("file")
    );
    assert_right(&Served::python("exits_once", &[], &script));
    // It was stopped before it could read the request.
    let process = process_id(&served);
    kill_process(process, Signal::STOP).unwrap();
    let caller = ask_in_background(&served, "which?");
    served.wait_for_request("(6 bytes)");
    kill_process(process, Signal::KILL).unwrap();
    assert_eq!(caller.join().unwrap(), "right");
}

#[test]
fn at_the_time_limit_the_process_is_stopped_and_its_late_answer_is_lost() {
    let options = ["--time-limit", "300ms", "--kill-after", "300ms"];
    let served = Served::python("time_limits", &options, HANDLER);
    let message = "the program was stopped: it ran longer than 300ms";
    for late in ["hang", "slow"] {
        let before = process_id(&served);
        let expected = Err(failure(ErrorCode::TimeLimit, message));
        assert_eq!(served.ask(late.as_bytes()), expected);
        assert_right(&served);
        assert_ne!(process_id(&served), before);
        wait_until_ended(&[before]);
    }
}

#[test]
fn a_process_may_answer_after_its_callers_deadline_and_lives_on() {
    let served = Served::python("late_answer", &["--kill-after", "60s"], HANDLER);
    let before = process_id(&served);
    client(&served.queue, &["-t", "500ms", "--data", "slow"])
        .assert()
        .code(5);
    assert_right(&served);
    assert_eq!(process_id(&served), before);
    let stopped = "the program was stopped: the caller's deadline has passed";
    served.server.wait_for_log(stopped);
    let served = Served::python("no_answer", &["--kill-after", "300ms"], HANDLER);
    let before = process_id(&served);
    client(&served.queue, &["-t", "500ms", "--data", "hang"])
        .assert()
        .code(vec![1, 5]);
    assert_right(&served);
    wait_until_ended(&[before]);
}

#[test]
fn the_process_of_a_caller_that_has_gone_is_stopped() {
    let served = Served::python("gone_persistent", &["--kill-after", "300ms"], HANDLER);
    let process = process_id(&served);
    let args = ["--queue", &served.queue, "-t", "10m", "--data", "hang"];
    let caller = Program::spawn("rpc-client", &args);
    served.wait_for_request("(4 bytes)");
    drop(caller);
    wait_until_ended(&[process]);
    served
        .server
        .wait_for_log("the program was stopped: its caller has gone");
    assert_right(&served);
}

#[test]
fn a_reply_that_is_too_large_is_an_error_and_takes_no_memory() {
    let served = Served::python("too_large", &["--max-reply", "1MiB"], HANDLER);
    let message = "the reply is too large: 1048576 bytes are accepted here";
    let expected = Err(failure(ErrorCode::TooLarge, message));
    assert_eq!(served.ask(b"large"), expected);
    assert_eq!(served.ask(b"endless"), expected);
    assert_right(&served);
    let peak = served.server.peak_memory_kib().unwrap();
    assert!(peak < 100 << 10, "{peak} KiB");
}

#[test]
fn standard_error_is_logged_with_the_request_in_hand() {
    let served = Served::python("stderr", &[], HANDLER);
    served.server.wait_for_log("program[process ");
    client(&served.queue, &["--data", "log"]).assert().code(0);
    let line = served.server.wait_for_log("before the reply");
    assert!(line.contains("program[") && !line.contains("program[process"));
    client(&served.queue, &["--data", "log later"])
        .assert()
        .code(0);
    let line = served.server.wait_for_log("while idle");
    assert!(line.contains("program[process "), "{line}");
}

#[test]
fn a_program_that_is_not_ready_is_exit_code_2() {
    let queue = Queue::named("not_ready");
    for (script, timeout, reason) in [
        (
            "print('{\"ready\":true}'); import time; time.sleep(1000)",
            "300ms",
            "it was not ready within 300ms: does it print {\"ready\":true}, and flush its standard output?",
        ),
        (
            "print('hello', flush=True); input()",
            "60s",
            "its first line is 'hello', not {\"ready\":true}",
        ),
        (
            "import sys; sys.exit(7)",
            "60s",
            "it ended before it was ready: exit status: 7",
        ),
    ] {
        let mut server = command("rpc-server");
        server.env_remove("PYTHONUNBUFFERED");
        server.args(["--queue", &queue, "--persistent", "--ready-timeout", timeout]);
        let output = server.args(["--", "python3", "-c", script]).assert().code(2);
        let stderr = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
        let last = stderr.lines().last().unwrap_or_default();
        assert_eq!(last, format!("rpc-server: cannot run 'python3 -c {script}': {reason}"));
        assert!(output.get_output().stdout.is_empty());
    }
}

#[test]
fn while_no_process_is_ready_no_request_is_taken() {
    let folder = Folder::new("not_ready_later");
    let file = folder.path("broken");
    let script = format!("import os, sys\nif os.path.exists('{file}'): sys.exit(9)\n{HANDLER}");
    let served = Served::python("not_ready_later", &["--prefetch", "5"], &script);
    fs::write(&file, "").unwrap();
    assert_eq!(served.ask(b"exit 3").unwrap_err().code, ErrorCode::Failed);
    let log = "it ended before it was ready: exit status: 9; starting it again in";
    served.server.wait_for_log(log);
    let mut peer = Peer::connect();
    peer.wait_for_consumers(&served.queue, 0);
    let caller = ask_in_background(&served, "which?");
    peer.wait_for_messages(&served.queue, 1);
    fs::remove_file(&file).unwrap();
    assert_eq!(caller.join().unwrap(), "right");
    assert_eq!(served.server.stop().len(), 2, "each request was taken once");
}

#[test]
fn after_max_requests_another_process_goes_on() {
    let options = ["--max-requests", "3"];
    let served = Served::python("max_requests", &options, HANDLER);
    let ids: Vec<Pid> = (0..9).map(|_| process_id(&served)).collect();
    assert!(ids
        .chunks(3)
        .all(|life| life.iter().all(|id| *id == life[0])));
    assert!(ids[0] != ids[3] && ids[3] != ids[6]);
    wait_until_ended(&ids[..6]);
}

#[test]
fn a_stop_closes_standard_input_and_waits() {
    let folder = Folder::new("stop_persistent");
    let file = folder.path("ended");
    let script = format!("{HANDLER}\nopen('{file}', 'w').write('at the end of its input')");
    let served = Served::python("stop_persistent", &["--workers", "2"], &script);
    let process = process_id(&served);
    served.server.stop();
    let text = fs::read_to_string(file).unwrap();
    assert_eq!(text, "at the end of its input");
    wait_until_ended(&[process]);
    // It ends at nothing but SIGKILL.
    let script = format!(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{HANDLER}\ntime.sleep(1000)"
    );
    for options in [["--kill-after", "200ms"], ["--stop-after", "200ms"]] {
        let served = Served::python("stop_deaf", &options, &script);
        let process = process_id(&served);
        served.server.stop();
        wait_until_ended(&[process]);
    }
}

#[test]
fn whatever_ends_the_server_no_process_is_left() {
    let served = Served::python("killed", &["--workers", "2"], HANDLER);
    let process = process_id(&served);
    served.server.send_signal(Signal::KILL);
    wait_until_ended(&[process]); // its standard input has ended
    let served = Served::python("second_signal", &[], HANDLER);
    let process = process_id(&served);
    let caller = ask_in_background(&served, "hang");
    served.wait_for_request("(4 bytes)");
    for signal in [Signal::TERM, Signal::INT] {
        served.server.send_signal(signal);
    }
    wait_until_ended(&[process]);
    caller.join().unwrap();
}

/// Each request costs a process; 1,000 of them leave nothing.
#[test]
fn a_thousand_processes_leave_no_file_and_no_zombie() {
    let script = "echo '{\"ready\":true}'; read line; echo '{\"id\":1,\"result\":\"x\"}'";
    let args = [
        "--persistent",
        "--max-requests",
        "1",
        "-q",
        "--",
        "sh",
        "-c",
        script,
    ];
    let served = Served::start("thousand", &args);
    let files = || {
        let folder = format!("/proc/{}/fd", served.server.process_id());
        fs::read_dir(folder).unwrap().count()
    };
    let repeat = |count: &str| {
        client(&served.queue, &["--data", "y", "--repeat", count])
            .assert()
            .code(0);
    };
    repeat("10");
    let before = files();
    repeat("1000");
    eventually("no more files than before", || {
        (files() <= before).then_some(())
    });
    let parent = i32::try_from(served.server.process_id()).unwrap();
    eventually("one process", || {
        let processes = procfs::process::all_processes().unwrap();
        let all = processes.filter_map(|process| process.ok()?.stat().ok());
        let children = all.filter(|stat| stat.ppid == parent);
        let states = children.map(|stat| stat.state).collect::<Vec<_>>();
        (states.len() == 1 && states[0] != 'Z').then_some(())
    });
}

/// The program that people copy, in Python; that in JavaScript is among the peers.
#[test]
fn the_example_to_copy_answers() {
    assert_copied("copied_python", "python3", "persistent.py");
}

pub(crate) fn assert_copied(test: &str, interpreter: &str, file: &str) {
    let file = format!(
        "{}/../rpc-server/examples/{file}",
        env!("CARGO_MANIFEST_DIR")
    );
    let served = Served::start(test, &["--persistent", "--", interpreter, &file]);
    let answer = served.ask("to be or not tö be".as_bytes()).unwrap().body;
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer, serde_json::json!({"words": 6}));
    let not_text = failure(ErrorCode::InvalidArgument, "not text");
    assert_eq!(served.ask(b"\xff"), Err(not_text));
}

/// Answers with the data in upper case, but sometimes ends, prints something else, or hangs.
const UNRELIABLE: &str = r#"
import json, os, random, sys, time
def write(text):
    sys.stdout.write(text); sys.stdout.flush()
write('{"ready":true}\n')
for line in sys.stdin:
    request = json.loads(line)
    reply = json.dumps({"id": request["id"], "result": request["data"].upper()}) + "\n"
    chance = random.randrange(1000)
    if chance < 5: os._exit(random.choice([0, 1, 75]))
    elif chance < 10: write("debug: a line\n" + reply)
    elif chance < 15: write(reply + "debug: a line\n")
    elif chance < 20: write(reply + reply)
    elif chance < 25: write(json.dumps({"id": request["id"] - 1, "result": "WRONG"}) + "\n")
    elif chance < 30: write(reply[:random.randrange(len(reply))]); os._exit(0)
    elif chance < 32: time.sleep(1000)
    elif chance < 34: write(reply); time.sleep(0.3); os._exit(1)
    else: write(reply)
"#;

/// `SOAK_SECONDS` is the duration (10). `--nocapture` shows how the calls ended.
#[test]
fn no_caller_gets_a_wrong_answer_whatever_the_program_does() {
    let seconds = env::var("SOAK_SECONDS").map_or(10, |text| text.parse().unwrap());
    let options = [
        "-q",
        "--workers",
        "4",
        "--prefetch",
        "4",
        "--time-limit",
        "1s",
        "--kill-after",
        "200ms",
        "--max-requests",
        "300",
    ];
    let served = Served::python("persistent_soak", &options, UNRELIABLE);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut ended: BTreeMap<String, usize> = BTreeMap::new();
    let mut number = 0;
    while Instant::now() < end {
        let lines: String = (number..number + 1000)
            .map(|n| format!("call {n}\n"))
            .collect();
        number += 1000;
        let options = ["--lines", "-", "-j", "32", "-o", "json", "-q"];
        let output = client(&served.queue, &options).write_stdin(lines).output();
        let stdout = String::from_utf8(output.unwrap().stdout).unwrap();
        assert_eq!(stdout.lines().count(), 1000);
        for line in stdout.lines() {
            let call: serde_json::Value = serde_json::from_str(line).unwrap();
            let data = call["data"].as_str().unwrap();
            let how = match (call["result"].as_str(), call["error"]["code"].as_str()) {
                (Some(result), None) => {
                    assert_eq!(result, data.to_uppercase());
                    "right"
                }
                (None, Some(code @ ("failed" | "internal" | "time-limit" | "unavailable"))) => code,
                _ => panic!("{line}"),
            };
            *ended.entry(how.to_owned()).or_default() += 1;
        }
    }
    println!("{number} calls: {ended:?}");
    assert!(ended["right"] > number / 2);
}
