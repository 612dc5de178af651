//! What a server tells systemd, which here is a socket of the test.

use crate::support::broker;
use crate::support::peer::Queue;
use crate::support::programs::{assert_output, client, program_folder, Program};
use crate::support::proxy::Proxy;
use crate::support::TEST_TIMEOUT;
use rustix::process::Signal;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{self, Command};
use std::{env, fs};

const ALIVE: &str = "WATCHDOG=1\n";

/// A socket as systemd has it. Its file is removed when this is dropped.
struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

impl NotifySocket {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("rpc-tests-{name}-{}", process::id()));
        let socket = UnixDatagram::bind(&path).expect("the temporary folder is writable");
        socket
            .set_read_timeout(Some(TEST_TIMEOUT))
            .expect("the socket is open");
        NotifySocket { socket, path }
    }

    /// A server that must show every 200 ms that it is alive.
    fn server(&self, url: &str, queue: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program_folder().join("rpc-server"));
        command
            .args(["--queue", queue])
            .args(args)
            .env("AMQP_URL", url);
        command
            .env("NOTIFY_SOCKET", &self.path)
            .env("WATCHDOG_USEC", "200000");
        command
    }

    /// Waits for the next notification.
    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let len = self.socket.recv(&mut buffer).expect("a notification");
        String::from_utf8_lossy(&buffer[..len]).into()
    }

    /// Waits until the server says that it is alive, also between other states.
    fn wait_until_alive(&self) {
        let mut states = std::iter::repeat_with(|| self.next()).take(1000);
        assert!(
            states.any(|state| state == ALIVE),
            "the server has not said that it is alive"
        );
    }

    /// Waits for the next notification of anything but that the server is alive.
    fn next_state(&self) -> String {
        std::iter::repeat_with(|| self.next())
            .find(|state| state != ALIVE)
            .expect("it is repeated")
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[test]
fn systemd_learns_what_a_server_does() {
    let queue = Queue::named("notified");
    let proxy = Proxy::start();
    let systemd = NotifySocket::new("states");
    let broker = proxy.authority();
    proxy.refuse(true);
    let mut server =
        Program::spawn_command(&systemd.server(&proxy.url(), &queue, &["--delay", "1s"]));
    let waiting = systemd.next_state();
    assert!(
        waiting.starts_with(&format!("STATUS=waiting for {broker}: {broker} ")),
        "{waiting}"
    );
    systemd.wait_until_alive();
    proxy.refuse(false);
    let mut state = systemd.next_state();
    while state.starts_with("STATUS=waiting for") {
        state = systemd.next_state();
    }
    assert_eq!(state, "READY=1\n");
    assert_eq!(
        systemd.next_state(),
        format!("STATUS=connected to {broker}\n")
    );
    assert_eq!([systemd.next(), systemd.next()], [ALIVE; 2]);
    proxy.close_connections();
    let waiting = systemd.next_state();
    assert!(
        waiting.starts_with(&format!(
            "STATUS=waiting for {broker}: {broker} was disconnected"
        )),
        "{waiting}"
    );
    assert_eq!(
        systemd.next_state(),
        format!("STATUS=connected to {broker}\n")
    );
    let caller = Program::spawn("rpc-client", &["--queue", &queue, "-q", "30"]);
    assert_eq!(
        [server.next_line(), server.next_line()],
        [" [x] Awaiting RPC requests", " [.] fib(30)"]
    );
    server.send_signal(Signal::TERM);
    assert_eq!(
        systemd.next_state(),
        "STOPPING=1\nSTATUS=stopping: requests that have begun are answered\n"
    );
    assert_eq!(systemd.next(), ALIVE, "while a request is answered");
    assert_eq!(server.wait().code(), Some(0));
    assert_eq!(caller.next_line(), "832040");
}

/// systemd would take the notifications of a program, such as another rpc-server, for those of the
/// server.
#[test]
fn a_served_program_does_not_learn_of_systemd() {
    let queue = Queue::named("not_inherited");
    let systemd = NotifySocket::new("inherited");
    let script = "env | grep -E '^(NOTIFY|WATCHDOG)_' || echo none";
    let mut command = systemd.server(broker::url(), &queue, &["--", "sh", "-c", script]);
    let server = Program::spawn_command(command.env("WATCHDOG_PID", "1"));
    assert_eq!(systemd.next_state(), "READY=1\n");
    assert_output(&mut client(&queue, &["--data", ""]), 0, "none\n", "");
    server.stop();
}
