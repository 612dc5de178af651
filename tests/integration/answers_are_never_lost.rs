//! Promise: an answer that arrived is never lost, however slowly standard output is read.

use crate::support::peer::{Peer, Queue};
use crate::support::programs::{bash, program_folder, Program};
use crate::support::{broker, eventually};
use procfs::process::Process;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fcntl_setfl, OFlags};
use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{kill_process, Pid, Signal};
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{self, Child, Stdio};
use std::time::{Duration, Instant};

/// The answers are larger than the buffer of the pipe, and their calls time out before the reader
/// begins to read.
#[test]
fn answers_are_printed_to_a_reader_that_begins_after_the_timeout() {
    let queue = Queue::named("slow_reader");
    let _server = Program::start_server(&queue, &["-q", "--prefetch", "64"]);
    let script = format!(
        "rpc-client --queue {} -t 2s --repeat 30000 30 | {{ sleep 5; uniq -c; }}
         echo ${{PIPESTATUS[0]}}",
        &*queue
    );
    bash(&script)
        .code(0)
        .stdout("  30000 832040\n0\n")
        .stderr("");
}

#[test]
fn a_standard_output_that_cannot_be_written_is_exit_code_6_and_nothing_runs() {
    let queue = Queue::named("read_only_output");
    let server = Program::start_server(&queue, &[]);
    let call = format!("rpc-client --queue {} 30", &*queue);
    let error = "rpc-client: cannot write to standard output: bad file descriptor\n";
    bash(&format!("{call} 1</dev/null"))
        .code(6)
        .stdout("")
        .stderr(error);
    // Closed on purpose: the answer is not wanted.
    bash(&format!("{call} >&-")).code(0).stdout("").stderr("");
    assert_eq!(server.stop().len(), 1);
    for program in ["rpc-client", "rpc-server"] {
        for option in ["-h", "--help", "--version"] {
            let error = format!("{program}: cannot write the help: no space left on device\n");
            bash(&format!("{program} {option} >/dev/full"))
                .code(6)
                .stderr(error);
            let error = format!("{program}: cannot write the help: bad file descriptor\n");
            bash(&format!("{program} {option} 1</dev/null"))
                .code(6)
                .stderr(error);
        }
    }
}

/// Another program has set the files of both to non-blocking, and the reader is slow.
#[test]
fn non_blocking_standard_streams_are_waited_for() {
    let queue = Queue::named("non_blocking");
    let _server = Program::start_server(&queue, &["--", "cat"]);
    let (out_reader, out_writer) = io::pipe().unwrap();
    let (in_reader, mut in_writer) = io::pipe().unwrap();
    fcntl_setfl(&out_writer, OFlags::NONBLOCK).unwrap();
    fcntl_setfl(&in_reader, OFlags::NONBLOCK).unwrap();
    let mut child = process::Command::new(program_folder().join("rpc-client"))
        .args(["--queue", &queue, "-q", "--lines", "-"])
        .env("AMQP_URL", broker::url())
        .stdin(in_reader)
        .stdout(out_writer)
        .spawn()
        .unwrap();
    let line = "x".repeat(9_999);
    let lines = 50; // more than a pipe takes
    for _ in 0..lines {
        writeln!(in_writer, "{line}").unwrap();
    }
    drop(in_writer);
    eventually("a full pipe", || {
        (ioctl_fionread(&out_reader).unwrap() > 50_000).then_some(())
    });
    let answers = BufReader::new(out_reader).lines().map(Result::unwrap);
    assert!(answers.filter(|answer| *answer == line).count() == lines);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A child that a failed test does not leave running.
struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill(); // fails if it has ended already
        let _ = self.0.wait();
    }
}

/// As above, for what both programs print beside answers.
#[test]
fn non_blocking_output_of_both_programs_is_waited_for() {
    const PAGE: usize = 4096;
    let queue = Queue::named("non_blocking_log");
    let pipe = || {
        let (reader, writer) = io::pipe().unwrap();
        fcntl_setpipe_size(&writer, PAGE).unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        (BufReader::new(reader), writer)
    };
    let spawn = |program: &str, args: &[&str]| {
        let mut command = process::Command::new(program_folder().join(program));
        command
            .args(["--queue", &queue])
            .args(args)
            .env("AMQP_URL", broker::url());
        command
    };
    let (mut help, mut writer) = pipe();
    writer.write_all(&[b'x'; 1_000]).unwrap(); // the help is longer than the rest
    let mut program = spawn("rpc-client", &["--help"])
        .stdout(writer)
        .spawn()
        .unwrap();
    eventually("the program waits, or has ended", || {
        let process = Process::new(Pid::from_child(&program).as_raw_pid()).unwrap();
        ['S', 'Z']
            .contains(&process.stat().unwrap().state)
            .then_some(())
    });
    let mut text = String::new();
    help.read_to_string(&mut text).unwrap();
    assert!(text.contains("Exit codes:"), "{text}");
    assert_eq!(program.wait().unwrap().code(), Some(0));
    let calls = 1_000; // their lines are more than a page
    let (mut requests, writer) = pipe();
    let server = spawn("rpc-server", &[])
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn();
    let mut server = KilledOnDrop(server.unwrap());
    let mut ready = String::new();
    requests.read_line(&mut ready).unwrap();
    let (mut announced, writer) = pipe();
    let args = ["-o", "text", "--repeat", "1000", "30"];
    let mut client = spawn("rpc-client", &args)
        .stdout(Stdio::null())
        .stderr(writer)
        .spawn()
        .unwrap();
    let line = " [x] Requesting fib(30)\n";
    let mut announcements = String::new();
    let code = loop {
        let ended = eventually("a pipe without room for a line, or the end", || {
            let unread = ioctl_fionread(announced.get_ref()).unwrap();
            let is_full = usize::try_from(unread).unwrap() + line.len() > PAGE;
            let ended = client.try_wait().unwrap();
            (is_full || ended.is_some()).then_some(ended)
        });
        if let Some(status) = ended {
            break status.code();
        }
        announced.read_line(&mut announcements).unwrap();
        announcements += str::from_utf8(announced.buffer()).unwrap();
        announced.consume(announced.buffer().len());
    };
    announced.read_to_string(&mut announcements).unwrap();
    assert!(announcements == line.repeat(calls), "{announcements}");
    assert_eq!(code, Some(0));
    kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
    let requests = requests.lines().map(Result::unwrap);
    assert_eq!(
        requests.filter(|line| line == " [.] fib(30)").count(),
        calls
    );
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

/// A client that writes to a pipe whose reader is slow.
struct SlowlyRead {
    client: KilledOnDrop,
    reader: PipeReader,
    writer: PipeWriter,
}

impl SlowlyRead {
    /// Starts the client, for which SIGINT has its default action or is ignored, and waits until the
    /// pipe is full.
    fn start(option_of_env: &str, pipe_size: usize, queue: &str, args: &[&str]) -> Self {
        let (reader, writer) = io::pipe().unwrap();
        fcntl_setpipe_size(&writer, pipe_size).unwrap();
        let client = process::Command::new("env")
            .arg(option_of_env)
            .arg(program_folder().join("rpc-client"))
            .args(["--queue", queue, "-q"])
            .args(args)
            .env("AMQP_URL", broker::url())
            .stdout(writer.try_clone().unwrap())
            .spawn()
            .expect("env, of coreutils, runs");
        let started = SlowlyRead {
            client: KilledOnDrop(client),
            reader,
            writer,
        };
        started.wait_until_full();
        started
    }

    fn wait_until_full(&self) {
        eventually("a full pipe", || {
            let mut pipe = [PollFd::new(&self.writer, PollFlags::OUT)];
            (poll(&mut pipe, Some(&Timespec::default())) == Ok(0)).then_some(())
        });
    }

    fn interrupt(&self) {
        kill_process(Pid::from_child(&self.client.0), Signal::INT).expect("it is running");
    }

    /// Reads until the client has ended. Returns the output, the exit code and the signal.
    fn read_to_end(mut self) -> (String, Option<i32>, Option<i32>) {
        drop(self.writer);
        let mut output = String::new();
        self.reader.read_to_string(&mut output).unwrap();
        let status = self.client.0.wait().unwrap();
        (output, status.code(), status.signal())
    }
}

/// Each number has 2,090 digits: two of them are more than a page of the pipe.
#[test]
fn an_interrupted_client_leaves_no_part_of_a_number_to_a_slow_reader() {
    const PAGE: usize = 4096;
    let queue = Queue::named("interrupted_output");
    let _server = Program::start_server(&queue, &["-q", "--prefetch", "64"]);
    // The page that the client writes last begins at another byte each time.
    for pages in [200, 201] {
        let args = ["--repeat", "100000", "10000"];
        let mut client = SlowlyRead::start("--default-signal=INT", 4 * PAGE, &queue, &args);
        let mut page = [0; PAGE];
        let mut output = Vec::new();
        for _ in 0..pages {
            client.reader.read_exact(&mut page).unwrap();
            output.extend(page);
            client.wait_until_full();
        }
        client.interrupt();
        let (rest, code, signal) = client.read_to_end();
        output.extend(rest.into_bytes());
        let last_line = output.split_inclusive(|byte| *byte == b'\n').next_back();
        assert_eq!(last_line.map(<[u8]>::len), Some(2_091));
        assert_eq!((code, signal), (None, Some(Signal::INT.as_raw())));
    }
}

/// The number has 6,270 digits.
#[test]
fn an_interrupted_client_ends_when_a_long_number_is_written_or_a_second_later() {
    let queue = Queue::named("interrupted_number");
    let _server = Program::start_server(&queue, &["-q"]);
    let interrupted = (None, Some(Signal::INT.as_raw()));
    for args in [&["30000"][..], &["30000", "--repeat", "9"]] {
        let start = |option: &str| SlowlyRead::start(option, 4096, &queue, args);
        for (option, end) in [
            ("--default-signal=INT", interrupted),
            ("--ignore-signal=INT", (Some(0), None)),
        ] {
            let client = start(option);
            client.interrupt();
            let (output, code, signal) = client.read_to_end();
            assert_eq!((code, signal), end, "{args:?}");
            assert!(output.ends_with('\n'), "{args:?}: {} bytes", output.len());
            assert!(output.lines().all(|number| number.len() == 6_270));
        }
        // The reader has stopped.
        let mut client = start("--default-signal=INT");
        client.interrupt();
        let status = client.client.0.wait().unwrap();
        assert_eq!((status.code(), status.signal()), interrupted);
    }
}

/// A container that is paused, a laptop whose lid is closed: the answer is in the socket when the
/// deadline passes.
#[test]
fn an_answer_that_arrived_while_the_program_was_stopped_is_printed_after_the_deadline() {
    const CALLS: usize = 14;
    let queue = Queue::declare("stopped_client");
    let peer = Peer::connect();
    let timeout = Duration::from_secs(10);
    let args = ["--queue", &queue, "-t", "10s", "30"];
    let calls = [(); CALLS].map(|()| Program::spawn("rpc-client", &args));
    let spawned = Instant::now();
    for call in &calls {
        call.wait_for_log("no server is consuming"); // so the client is, from its reply queue
        call.send_signal(Signal::STOP);
    }
    for _ in 0..CALLS {
        peer.reply(&peer.take(&queue), b"832040");
    }
    eventually("the deadline", || {
        (spawned.elapsed() > timeout + Duration::from_secs(1)).then_some(())
    });
    for call in calls {
        call.send_signal(Signal::CONT);
        assert_eq!(call.next_line(), "832040");
        let (answers, errors) = call.remaining_output();
        assert!(answers.is_empty() && errors.is_empty(), "{errors:?}");
        assert_eq!(call.wait_for_exit_code(), Some(0));
    }
}
