//! Promise: the function can be any program. `rpc-server -- PROGRAM` runs it once for each request:
//! the body is its standard input, its standard output the reply, its exit code the outcome.
//! Whatever it does, the caller gets an answer, and nothing is left behind.

use crate::support::broker;
use crate::support::peer::{call, Peer, Queue};
use crate::support::programs::{assert_output, bash, client, command, program_folder, Program};
use crate::support::served::{decode, failure, wait_until_ended, Served};
use crate::support::{eventually, Folder};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use rpc_common::message::{Answer, ErrorCode};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use std::{fs, process};

#[test]
fn every_byte_is_passed_and_comes_back_unchanged() {
    let served = Served::start("every_byte", &["--", "cat"]);
    let bytes: Vec<u8> = (0..=255).collect();
    let answer =
        |body: &[u8]| Answer::new(body.into()).with_content_type("application/octet-stream".into());
    assert_eq!(served.ask(&bytes), Ok(answer(&bytes)));
    assert_eq!(served.ask(b""), Ok(answer(b"")));
    assert_eq!(
        served.server.stop(),
        [" [.] cat (256 bytes)", " [.] cat (0 bytes)"]
    );
    let served = Served::start(
        "content_type",
        &["-q", "--content-type", "image/png", "--", "cat"],
    );
    assert_eq!(
        served.ask(b"x"),
        Ok(Answer::new(b"x".into()).with_content_type("image/png".into()))
    );
    assert!(served.server.stop().is_empty());
}

#[test]
fn what_is_larger_than_the_limits_is_too_large() {
    const LIMIT: usize = 8 << 20;
    let served = Served::start("limits", &["--", "cat"]);
    let body = vec![b'x'; LIMIT + 1];
    served.assert_answer(&body[1..], &body[1..]);
    let message = format!(
        "the request of {} bytes is too large: {LIMIT} are accepted here",
        LIMIT + 1
    );
    assert_eq!(
        served.ask(&body),
        Err(failure(ErrorCode::TooLarge, &message))
    );
    let served = Served::script(
        "reply_limit",
        &["--max-reply", "1KiB"],
        "head -c $(cat) /dev/zero",
    );
    assert_eq!(served.ask(b"1024").unwrap().body.len(), 1024);
    let message = "the reply is too large: 1024 bytes are accepted here";
    assert_eq!(
        served.ask(b"1025"),
        Err(failure(ErrorCode::TooLarge, message))
    );
    assert_eq!(
        served.ask(b"100000000"),
        Err(failure(ErrorCode::TooLarge, message))
    );
}

#[test]
fn a_program_may_read_and_write_in_any_order() {
    let body = vec![b'x'; 8 << 20];
    Served::start("reads_nothing", &["--", "true"]).assert_answer(&body, b"");
    let script = "head -c 8000000 /dev/zero; cat >/dev/null";
    Served::script("writes_first", &[], script).assert_answer(&body, &vec![0; 8_000_000]);
    Served::script("closes_early", &[], "exec >&- 2>&-; sleep 0.2").assert_answer(b"x", b"");
}

#[test]
fn a_process_that_is_left_in_the_background_holds_nobody_up() {
    let folder = Folder::new("background");
    let script = format!("sleep 1000 & echo $! >{}; echo done", folder.path("pids"));
    Served::script("background", &[], &script).assert_answer(b"", b"done\n");
    wait_until_ended(&folder.process_ids("pids", 1));
    // In a session of its own it is not killed, and keeps the pipes open.
    let served = Served::script("daemon", &[], "setsid sleep 31 & echo done");
    let begun = Instant::now();
    served.assert_answer(b"", b"done\n");
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn at_the_time_limit_all_processes_of_a_run_are_stopped() {
    let folder = Folder::new("time_limit");
    let pids = folder.path("pids");
    let script =
        format!("trap '' TERM; (trap '' TERM; exec sleep 1000) & echo $$ >{pids}; echo $! >>{pids}; sleep 1000");
    let served = Served::script(
        "time_limit",
        &["--time-limit", "300ms", "--kill-after", "300ms"],
        &script,
    );
    let message = "the program was stopped: it ran longer than 300ms";
    assert_eq!(served.ask(b""), Err(failure(ErrorCode::TimeLimit, message)));
    wait_until_ended(&folder.process_ids("pids", 2));
}

#[test]
fn a_program_can_end_properly_at_sigterm() {
    let folder = Folder::new("sigterm");
    let script = format!(
        "trap 'echo cleaned >{}; exit 0' TERM; sleep 1000 & wait",
        folder.path("file")
    );
    let served = Served::script(
        "sigterm",
        &["--time-limit", "300ms", "--kill-after", "60s"],
        &script,
    );
    assert_eq!(served.ask(b"").unwrap_err().code, ErrorCode::TimeLimit);
    assert_eq!(
        fs::read_to_string(folder.path("file")).unwrap(),
        "cleaned\n"
    );
}

#[test]
fn at_the_callers_deadline_the_program_is_stopped() {
    let folder = Folder::new("deadline");
    let script = format!("echo $$ >{}; exec sleep 1000", folder.path("pid"));
    let served = Served::script("deadline", &[], &script);
    // The answer of the stopped program may come just before the deadline passes here.
    client(&served.queue, &["-q", "-t", "2s", "30"])
        .assert()
        .code(vec![1, 5]);
    wait_until_ended(&folder.process_ids("pid", 1));
    served
        .server
        .wait_for_log("the program was stopped: the caller's deadline has passed");
}

#[test]
fn the_program_of_a_caller_that_has_gone_is_stopped() {
    for reply_to in ["queue", "direct"] {
        let folder = Folder::new(&format!("gone_{reply_to}"));
        let script = format!("echo $$ >>{}; exec sleep 1000", folder.path("pid"));
        let served = Served::script(&format!("gone_{reply_to}"), &[], &script);
        let caller = Program::spawn(
            "rpc-client",
            &[
                "--queue",
                &served.queue,
                "-t",
                "10m",
                "--reply-to",
                reply_to,
                "30",
            ],
        );
        let pids = folder.process_ids("pid", 1);
        drop(caller);
        wait_until_ended(&pids);
        served
            .server
            .wait_for_log("the program was stopped: its caller has gone");
    }
}

#[test]
fn a_long_run_goes_on_while_its_caller_waits() {
    for reply_to in ["queue", "direct"] {
        let served = Served::script(&format!("long_{reply_to}"), &[], "sleep 11; printf 8");
        assert_output(
            &mut client(&served.queue, &["--reply-to", reply_to, "6"]),
            0,
            "8\n",
            "",
        );
    }
}

#[test]
fn the_exit_code_says_how_it_ended() {
    let failed = |message: &str| failure(ErrorCode::Failed, message);
    let with_code =
        |code, exit_code, message: &str| failure(code, message).with_exit_code(exit_code);
    let served = Served::start("exit_codes", &["--", "sh"]);
    for (script, expected) in [
        (
            "exit 1",
            with_code(ErrorCode::Failed, 1, "the program failed with exit code 1"),
        ),
        (
            "echo ' no such image '; exit 3",
            with_code(ErrorCode::Failed, 3, "no such image"),
        ),
        (
            "echo bad >&2; exit 65",
            with_code(
                ErrorCode::InvalidArgument,
                65,
                "the program failed with exit code 65",
            ),
        ),
        (
            "echo busy; exit 75",
            with_code(ErrorCode::Unavailable, 75, "busy"),
        ),
        (
            "exit 77",
            with_code(
                ErrorCode::PermissionDenied,
                77,
                "the program failed with exit code 77",
            ),
        ),
        (
            "printf '\\377'; exit 255",
            with_code(
                ErrorCode::Failed,
                255,
                "the program failed with exit code 255",
            ),
        ),
        (
            "printf '\\033[2J'; exit 9",
            with_code(ErrorCode::Failed, 9, "\u{1b}[2J"),
        ),
        (
            "yes ä | tr -d '\\n' | head -c 5001; exit 1",
            with_code(ErrorCode::Failed, 1, "the program failed with exit code 1"),
        ),
        (
            "head -c 5000 /dev/zero | tr '\\0' x; exit 1",
            with_code(ErrorCode::Failed, 1, &"x".repeat(4096)),
        ),
        (
            "kill -TERM $$",
            failed("the program was ended by signal 15 (SIGTERM)"),
        ),
        (
            "ulimit -c 0; kill -SEGV $$",
            failed("the program was ended by signal 11 (SIGSEGV)"),
        ),
    ] {
        assert_eq!(served.ask(script.as_bytes()), Err(expected), "{script}");
    }
    // The caller's terminal is safe.
    let served = Served::script("escaped", &[], "printf '\\033[2J'; exit 9");
    let expected = "rpc-client: fib(30): \\u{1b}[2J\n";
    assert_output(&mut client(&served.queue, &["30"]), 1, "", expected);
}

#[test]
fn standard_error_goes_to_the_log_with_the_correlation_id_and_never_to_the_caller() {
    let script = "printf 'one\\n\\033[2J\\n' >&2; yes x | head -n 1000 >&2; printf unfinished >&2";
    let served = Served::script("standard_error", &[], script);
    let properties = AmqpProperties::default().with_correlation_id("id\n1".into());
    assert_eq!(served.ask_with(b"", properties).unwrap().body, b"");
    served.server.wait_for_log("program[id\\n1]: one");
    let last = served.server.wait_for_log("more lines");
    assert!(last.ends_with("program[id\\n1]: 903 more lines"), "{last}");
    let lines = served.server.new_log();
    assert!(
        !lines.iter().any(|line| line.contains("program[")),
        "{lines:?}"
    );
    // A gigabyte that is one line.
    let served = Served::script(
        "gigabyte",
        &[],
        "head -c 1000000000 /dev/zero >&2; echo done",
    );
    served.assert_answer(b"", b"done\n");
    assert!(served.server.memory_kib().unwrap() < 50 << 10);
    let line = served.server.wait_for_log("program[none]");
    assert!(line.len() < 10_000 && line.ends_with('…'), "{line}");
}

#[test]
fn the_environment_describes_the_request_and_holds_no_secret() {
    let queue = Queue::named("environment");
    let mut command = process::Command::new(program_folder().join("rpc-server"));
    command.args([
        "--queue",
        &queue,
        "--",
        "sh",
        "-c",
        "env -0 | sort -z | grep -z -e ^RPC_ -e ^AMQP -e ^KEPT | tr '\\0' '\\n'",
    ]);
    command
        .env("AMQP_URL", broker::url())
        .env("RPC_CLIENT_TIMEOUT", "1s")
        .env("RPC_SECRET", "x")
        .env("KEPT", "yes");
    let served = Served {
        queue,
        server: Program::spawn_command(&command),
    };
    assert_eq!(served.server.next_line(), " [x] Awaiting RPC requests");
    let queue = format!(
        "RPC_REQUEST_QUEUE={}\nRPC_REQUEST_REDELIVERED=0\n",
        &*served.queue
    );
    served.assert_answer(b"", format!("KEPT=yes\n{queue}").as_bytes());

    let text = |text: &str| AmqpValue::LongString(text.into());
    let mut headers = FieldTable::from([
        ("x-Trace_id".into(), text("a b=c\n")),
        ("bool".into(), AmqpValue::Boolean(true)),
        ("int".into(), AmqpValue::LongInt(-7)),
        ("double".into(), AmqpValue::Double(1.5)),
        ("void".into(), AmqpValue::Void),
        ("bytes".into(), AmqpValue::ByteArray(vec![1])),
        ("table".into(), AmqpValue::FieldTable(FieldTable::new())),
        ("LD_PRELOAD".into(), text("/evil.so")),
        ("PATH".into(), text("/evil")),
        ("a=b".into(), text("x")),
        ("with blank".into(), text("x")),
        (String::new(), text("x")),
        ("nul".into(), text("a\0b")),
        ("long".into(), text(&"x".repeat(4097))),
        (
            "x-deadline-ms".into(),
            AmqpValue::LongLongInt(9_999_999_999_999),
        ),
    ]);
    let properties = AmqpProperties::default()
        .with_content_type("text/plain".into())
        .with_content_encoding("gzip".into())
        .with_correlation_id("id".into())
        .with_message_id("message".into())
        .with_type_("type".into())
        .with_app_id("app".into())
        .with_headers(headers.clone());
    let expected = format!(
        "KEPT=yes\nRPC_REQUEST_APP_ID=app\nRPC_REQUEST_CONTENT_ENCODING=gzip\nRPC_REQUEST_CONTENT_TYPE=text/plain\n\
         RPC_REQUEST_CORRELATION_ID=id\nRPC_REQUEST_DEADLINE_MS=9999999999999\nRPC_REQUEST_HEADER_BOOL=true\n\
         RPC_REQUEST_HEADER_DOUBLE=1.5\nRPC_REQUEST_HEADER_INT=-7\nRPC_REQUEST_HEADER_LD_PRELOAD=/evil.so\n\
         RPC_REQUEST_HEADER_PATH=/evil\nRPC_REQUEST_HEADER_X_DEADLINE_MS=9999999999999\n\
         RPC_REQUEST_HEADER_X_TRACE_ID=a b=c\n\nRPC_REQUEST_MESSAGE_ID=message\n{queue}RPC_REQUEST_TYPE=type\n"
    );
    assert_eq!(
        String::from_utf8(served.ask_with(b"", properties).unwrap().body).unwrap(),
        expected
    );
    headers.extend((0..5_000).map(|number| (format!("many{number}"), AmqpValue::Boolean(true))));
    let answer = served
        .ask_with(b"", AmqpProperties::default().with_headers(headers))
        .unwrap();
    assert!(String::from_utf8(answer.body)
        .unwrap()
        .contains("\nRPC_REQUEST_HEADER_MANY4999=true\n"));
}

#[test]
fn a_program_can_be_rpc_client_itself() {
    let fib = Queue::named("inner");
    let _fib_server = Program::start_server(&fib, &[]);
    let client_path = program_folder().join("rpc-client");
    let args = [
        "--",
        client_path.to_str().unwrap(),
        "--url",
        broker::url(),
        "--queue",
        &fib,
        "-",
    ];
    let served = Served::start("outer", &args);
    served.assert_answer(b"10\n30\n", b"55\n832040\n");
}

#[test]
fn the_first_signal_lets_programs_finish_and_the_second_one_kills_them() {
    let folder = Folder::new("signals");
    let script = format!(
        "echo $$ >>{}; cat >/dev/null; sleep 2; printf 8",
        folder.path("pids")
    );
    let mut served = Served::script("signals", &[], &script);
    let caller = Program::spawn("rpc-client", &["--queue", &served.queue, "6"]);
    folder.process_ids("pids", 1);
    served.server.send_signal(Signal::INT);
    assert_eq!(caller.next_line(), "8");
    assert_eq!(served.server.wait().code(), Some(0));

    let script = format!("echo $$ >>{}; exec sleep 1000", folder.path("killed"));
    let mut served = Served {
        server: Program::start_server(&served.queue, &["--", "sh", "-c", &script]),
        ..served
    };
    let caller = Program::spawn("rpc-client", &["--queue", &served.queue, "6"]);
    let pids = folder.process_ids("killed", 1);
    served.server.send_signal(Signal::INT);
    served.server.wait_for_log("stopping");
    served.server.send_signal(Signal::TERM);
    assert_eq!(served.server.wait().code(), None, "ended by the signal");
    wait_until_ended(&pids);
    Peer::connect().wait_for_messages(&served.queue, 1);
    drop(caller);
}

#[test]
fn after_a_server_is_killed_its_program_ends_by_itself_and_the_request_runs_again() {
    let folder = Folder::new("killed_server");
    let script = format!(
        "echo $$ >>{}; sleep 2; printf $RPC_REQUEST_REDELIVERED",
        folder.path("pids")
    );
    let mut served = Served::script("killed_server", &[], &script);
    let caller = Program::spawn("rpc-client", &["--queue", &served.queue, "2"]);
    let pids = folder.process_ids("pids", 1);
    served.server.send_signal(Signal::KILL);
    served.server.wait();
    let _served = Served {
        server: Program::start_server(&served.queue, &["--", "sh", "-c", &script]),
        ..served
    };
    assert_eq!(caller.next_line(), "1");
    wait_until_ended(&pids);
}

#[test]
fn a_thousand_runs_leave_no_process_and_no_descriptor_behind() {
    let served = Served::start("no_leaks", &["-q", "--workers", "16", "--", "cat"]);
    let open = || {
        fs::read_dir(format!("/proc/{}/fd", served.server.process_id()))
            .unwrap()
            .count()
    };
    let children = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", served.server.process_id())).unwrap();
        let children = tasks.map(|task| {
            fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default()
        });
        children.collect::<String>()
    };
    let run = |count: u32| {
        let calls = format!(
            "yes 12 | head -n {count} | rpc-client --queue {} -q -j 32 -",
            &*served.queue
        );
        bash(&format!("{calls} | uniq -c"))
            .success()
            .stdout(format!("{count:>7} 12\n"));
    };
    run(100);
    let before = open();
    run(1_000);
    eventually("as many descriptors as before", || {
        (open() <= before).then_some(())
    });
    assert_eq!(children(), "");
}

#[test]
fn a_program_that_cannot_run_is_exit_code_2() {
    let folder = Folder::new("not_executable");
    fs::write(folder.path("script"), "#!/bin/sh\n").unwrap();
    let script = folder.path("script");
    for (args, error) in [
        (
            &["--"][..],
            "no PROGRAM after '--': is a variable unset? see --help".into(),
        ),
        (&["--", ""], "cannot run '': its name is empty".into()),
        (
            &["--", "no-such-program"],
            "cannot run 'no-such-program': not found on PATH".into(),
        ),
        (
            &["--", "/no/such/program"],
            "cannot run '/no/such/program': no such file or directory".into(),
        ),
        (&["--", "/"], "cannot run '/': it is a directory".into()),
        (
            &["--", &script],
            format!("cannot run '{script}': it is not executable"),
        ),
        (
            &["--max-n", "3", "--", "cat"],
            "the argument '--max-n <N>' cannot be used with '[PROGRAM]...'; see --help".into(),
        ),
        (
            &["--delay", "3", "--", "cat"],
            "the argument '--delay <DURATION>' cannot be used with '[PROGRAM]...'; see --help"
                .into(),
        ),
        (
            &["--time-limit", "3"],
            "the following required arguments were not provided: <PROGRAM>...; see --help".into(),
        ),
    ] {
        let error = format!("rpc-server: {error}\n");
        assert_output(command("rpc-server").args(args), 2, "", &error);
    }
}

#[test]
fn a_server_whose_program_cannot_be_started_any_more_takes_no_request_until_it_can() {
    let folder = Folder::new("removed");
    let script = folder.path("script");
    let write_script = || {
        fs::write(&script, "#!/bin/sh\nprintf 8\n").unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    write_script();
    let served = Served::start("removed", &["--", &script]);
    served.assert_answer(b"6", b"8");
    fs::remove_file(&script).unwrap();
    let unavailable = failure(
        ErrorCode::Unavailable,
        "the program cannot be started at the moment",
    );
    assert_eq!(served.ask(b"6"), Err(unavailable));
    let log = |text: &str| served.server.wait_for_log(text);
    log(&format!("cannot start {script}: no such file or directory"));
    log("the function is unavailable: taking no request for ");
    log("the function cannot run: no such file or directory");
    let mut peer = Peer::connect();
    peer.wait_for_consumers(&served.queue, 0);
    // Another server can take the requests meanwhile.
    let healthy = Program::start_server(&served.queue, &["--", "printf", "9"]);
    for _ in 0..20 {
        served.assert_answer(b"6", b"9");
    }
    healthy.stop();
    write_script();
    peer.wait_for_consumers(&served.queue, 1);
    served.assert_answer(b"6", b"8");
}

/// They start well, and then each request is answered with "try later".
#[test]
fn a_script_that_cannot_be_executed_is_exit_code_2() {
    let folder = Folder::new("scripts");
    let path = folder.path("script");
    let crlf = "'/bin/sh\\r': no such file or directory (the script has CRLF line ends)";
    let env_crlf = "'sh\\r': not found on PATH (the script has CRLF line ends)";
    for (text, reason) in [
        (
            "echo hello\n",
            "it is not a program, and has no first line such as #!/bin/sh".into(),
        ),
        (
            "",
            "it is not a program, and has no first line such as #!/bin/sh".into(),
        ),
        (
            "#!/bin/sh\r\necho hello\r\n",
            format!("its interpreter {crlf}"),
        ),
        (
            "#!/usr/bin/env sh\r\necho\r\n",
            format!("its interpreter {env_crlf}"),
        ),
        (
            "#!/no/such/python3 -u\n",
            "its interpreter '/no/such/python3': no such file or directory".into(),
        ),
        (
            "#!/usr/bin/env no-such-python\n",
            "its interpreter 'no-such-python': not found on PATH".into(),
        ),
    ] {
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let error = format!("rpc-server: cannot run '{path}': {reason}\n");
        assert_output(command("rpc-server").args(["--", &path]), 2, "", &error);
    }
}

/// The kernel stops a background process that reads from its terminal.
#[test]
fn a_program_that_asks_on_the_terminal_of_the_server_gets_an_error() {
    let queue = Queue::named("terminal");
    let server = program_folder().join("rpc-server").display().to_string();
    // `script` gives the server a terminal.
    let line = format!(
        "exec {server} --queue {queue} -q -- sh -c 'read x </dev/tty; echo $?'",
        queue = &*queue
    );
    let mut command = process::Command::new("script");
    command
        .args(["-qec", &line, "/dev/null"])
        .env("AMQP_URL", broker::url());
    let server = Program::spawn_command(&command);
    Peer::connect().wait_for_consumers(&queue, 1);
    let reply = decode(call(&queue, b"", AmqpProperties::default()));
    assert_eq!(
        String::from_utf8(reply.unwrap().body).unwrap(),
        "2\n",
        "as sh says"
    );
    drop(server);
}

#[test]
fn a_program_that_has_stopped_itself_is_continued_to_handle_sigterm() {
    let script = "trap 'exit 0' TERM; kill -STOP $$; sleep 1000 & wait";
    let served = Served::script(
        "stopped",
        &["--time-limit", "1s", "--kill-after", "1000s"],
        script,
    );
    let message = "the program was stopped: it ran longer than 1s";
    assert_eq!(served.ask(b""), Err(failure(ErrorCode::TimeLimit, message)));
}
