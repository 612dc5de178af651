//! Promise: an answer that arrived is never lost, however slowly standard output is read.

use crate::support::peer::Queue;
use crate::support::programs::{bash, program_folder, Program};
use crate::support::{broker, eventually};
use rustix::fs::{fcntl_setfl, OFlags};
use rustix::io::ioctl_fionread;
use std::io::{self, BufRead, BufReader, Write};
use std::process;

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
