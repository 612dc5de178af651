//! Both programs as process 1 of a container: signals have no default action, and orphans must be
//! reaped.

use crate::support::broker;
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, program_folder, Program};
use amiquip::AmqpProperties;
use procfs::process::{all_processes, Process};
use rustix::process::{kill_process, Pid, Signal};
use std::process::Command;

/// A PID namespace, as a container has one. It ends with `unshare`.
const UNSHARE: &str = "unshare --pid --fork --kill-child --mount-proc";

/// A program that is process 1. The exit code of `unshare` is that of the program.
pub(crate) struct Container(pub(crate) Program);

impl Container {
    pub(crate) fn start(program: &str, args: &[&str]) -> Self {
        let mut words = UNSHARE.split(' ');
        let mut command = Command::new(words.next().expect("it has a name"));
        command
            .args(words)
            .arg(program_folder().join(program))
            .args(args)
            .env("AMQP_URL", broker::url());
        Container(Program::spawn_command(&command))
    }

    fn start_server(queue: &str, args: &[&str]) -> Self {
        let server = Container::start("rpc-server", &[&["--queue", queue], args].concat());
        assert_eq!(server.0.next_line(), " [x] Awaiting RPC requests");
        server
    }

    /// The program's process id outside of the container.
    fn process_1(&self) -> i32 {
        let unshare = i32::try_from(self.0.process_id()).expect("it is an id");
        let children = eventually("process 1", || {
            let unshare = Process::new(unshare).ok()?;
            let children = unshare.task_main_thread().ok()?.children().ok()?;
            (!children.is_empty()).then_some(children)
        });
        i32::try_from(children[0]).expect("it is an id")
    }

    pub(crate) fn send_signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.process_1()).expect("it is not 0");
        kill_process(pid, signal).expect("the program is running");
    }

    /// Number of children that have exited and are not reaped.
    fn zombies(&self) -> usize {
        let process_1 = self.process_1();
        let processes = all_processes().expect("there is /proc");
        let stats = processes.filter_map(|process| process.ok()?.stat().ok());
        stats
            .filter(|stat| stat.ppid == process_1 && stat.state == 'Z')
            .count()
    }
}

#[test]
fn as_process_1_a_server_stops_at_the_first_signal_and_ends_at_the_second() {
    for (first, second, code) in [
        (Signal::TERM, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
    ] {
        let queue = Queue::named("container_signals");
        let server = Container::start_server(&queue, &[]);
        server.send_signal(first);
        assert_eq!(server.0.wait_for_exit_code(), Some(0));

        let server = Container::start_server(&queue, &["--delay", "365d"]);
        let properties = AmqpProperties::default().with_reply_to("nobody".into());
        Peer::connect().publish(&queue, b"30", properties);
        assert_eq!(server.0.next_line(), " [.] fib(30)");
        server.send_signal(first);
        server.0.wait_for_log("stopping");
        server.send_signal(second);
        assert_eq!(server.0.wait_for_exit_code(), Some(code));
    }
}

/// Every run leaves a process behind that ends soon, and another one that holds the output open for
/// a while: as long as that lasts, the run's own process is not reaped.
#[test]
fn as_process_1_a_server_reaps_what_programs_leave_behind() {
    const CALLS: &str = "60";
    let queue = Queue::named("container_orphans");
    let script = "setsid sleep 0.01 >/dev/null 2>&1 & setsid sleep 0.1 & printf 8; exit 0";
    let args = ["-q", "--workers", "4", "--", "sh", "-c", script];
    let server = Container::start_server(&queue, &args);
    assert_output(
        &mut client(&queue, &["-j", "8", "--repeat", CALLS, "6"]),
        0,
        &"8\n".repeat(60),
        "",
    );
    eventually("no process is left unreaped", || {
        (server.zombies() == 0).then_some(())
    });
    // An exit code still arrives.
    drop(server);
    let args = ["--", "sh", "-c", "exit 65"];
    let _server = Container::start_server(&queue, &args);
    let error = "rpc-client: the program failed with exit code 65\n";
    assert_output(&mut client(&queue, &["-q", "--data", ""]), 1, "", error);
}

#[test]
fn as_process_1_sigint_and_sigterm_end_a_client() {
    let queue = Queue::declare("container_client");
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let call = Container::start("rpc-client", &["--queue", &queue, "30"]);
        call.0.wait_for_log("no server is consuming");
        call.send_signal(signal);
        assert_eq!(call.0.wait_for_exit_code(), Some(code));
    }
}

#[test]
fn as_process_1_a_client_prints_its_summary_at_ctrl_c() {
    let queue = Queue::named("container_summary");
    let _server = Program::start_server(&queue, &["-q"]);
    let args = ["--queue", &queue, "--repeat", "1000000", "--summary", "6"];
    let mut caller = Container::start("rpc-client", &args);
    assert_eq!(caller.0.next_line(), "8");
    caller.send_signal(Signal::INT);
    assert_eq!(caller.0.wait().code(), Some(130));
    let (_, stderr) = caller.0.remaining_output();
    assert!(
        stderr.iter().any(|line| line.contains("; errors: none;")),
        "{stderr:?}"
    );
}

#[test]
fn as_process_1_a_client_takes_its_progress_off_the_terminal() {
    let queue = Queue::declare("container_progress");
    // `timeout` sends the signal to the container's processes, too: they are in its group.
    let call = format!(
        "timeout --preserve-status -s INT 3 {UNSHARE} rpc-client --queue {} 30",
        &*queue
    );
    let terminal = bash(&format!("TERM=xterm script -qec '{call}' /dev/null")).code(130);
    let shown = String::from_utf8_lossy(&terminal.get_output().stdout).into_owned();
    assert!(
        shown.contains("waiting for an answer from") && shown.ends_with("s\r\x1b[K"),
        "{shown:?}"
    );
}
