//! Where a password comes from, and that no log shows it.

use crate::server_log::level_and_text;
use crate::support::broker::{self, private_node};
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, command, program_folder, Program};
use crate::support::proxy::Proxy;
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, process};

#[test]
fn a_password_on_the_command_line_causes_a_warning() {
    let queue = Queue::named("password_warning");
    let _server = Program::start_server(&queue, &[]);
    let url = broker::url_with_credentials(broker::credentials());
    let warning =
        "rpc-client: warning: the password in --url is visible to all users (ps): use AMQP_URL or --password-file\n";
    assert_output(
        &mut client(&queue, &["--url", &url, "30"]),
        0,
        "832040\n",
        warning,
    );
    assert_output(
        &mut client(&queue, &["--url", &url, "30", "-q"]),
        0,
        "832040\n",
        "",
    );
    assert_output(
        client(&queue, &["30"]).env("AMQP_URL", &url),
        0,
        "832040\n",
        "",
    );
}

#[test]
fn a_password_file_supplies_the_password_of_the_url() {
    let queue = Queue::named("password_file");
    let (user, password) = broker::credentials()
        .split_once(':')
        .expect("both are in the URL");
    let url = broker::url_with_credentials(user);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("password");
    let name = file.to_str().expect("the target folder is UTF-8");
    fs::write(&file, format!("{password}\n")).expect("the folder is writable");
    let _server = Program::start_server_at(&url, &queue, &["--password-file", name]);
    let mut call = client(&queue, &["--password-file", name, "30"]);
    assert_output(call.env("AMQP_URL", &url), 0, "832040\n", "");
}

/// The file is read for every connection.
#[test]
fn a_rotated_password_is_used_for_the_next_connection() {
    let node = private_node();
    let user = "rotated";
    let queue = Queue::named("rotated_password");
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rotated-password");
    let name = file.to_str().expect("the target folder is UTF-8");
    fs::write(&file, "first").expect("the folder is writable");
    node.add_user(user, "first");
    let url = format!("amqp://{user}@{}", node.authority());
    let server = Program::start_server_at(&url, &queue, &["--password-file", name]);
    node.rabbitmqctl(&["change_password", user, "second"]);
    fs::write(&file, "second").expect("the folder is writable");
    node.rabbitmqctl(&["close_all_user_connections", user, "test"]);
    server.wait_for_log("retrying");
    server.wait_for_log("connected to");
    assert_output(
        client(&queue, &["-q", "30"]).env("AMQP_URL", node.url()),
        0,
        "832040\n",
        "",
    );
    server.stop();
    node.rabbitmqctl(&["delete_user", user]);
}

/// A pipe can be read only once, so the check of the options must leave it to the connection.
#[test]
fn a_password_file_may_be_a_pipe() {
    let queue = Queue::named("password_pipe");
    let _server = Program::start_server(&queue, &[]);
    let (user, password) = broker::credentials()
        .split_once(':')
        .expect("both are in the URL");
    let url = broker::url_with_credentials(user);
    let options = format!(
        "--queue {} --url {url} --password-file <(echo '{password}')",
        &*queue
    );
    bash(&format!("rpc-client {options} 30"))
        .code(0)
        .stdout("832040\n")
        .stderr("");
}

/// `<(command)` is empty when it is read again.
#[test]
fn a_password_from_a_pipe_is_kept_for_the_next_connection() {
    let node = private_node();
    let user = "piped";
    let queue = Queue::named("kept_password");
    node.add_user(user, "sesame");
    let server = program_folder().join("rpc-server");
    let script = format!(
        "exec {} --queue {} --password-file <(echo sesame)",
        server.display(),
        &*queue
    );
    let url = format!("amqp://{user}@{}", node.authority());
    let mut bash = Command::new("bash");
    let server = Program::spawn_command(bash.args(["-c", &script]).env("AMQP_URL", url));
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    node.rabbitmqctl(&["close_all_user_connections", user, "test"]);
    server.wait_for_log("retrying");
    server.wait_for_log("connected to");
    server.stop();
    node.rabbitmqctl(&["delete_user", user]);
}

/// A FIFO, removed when this is dropped.
struct Fifo(PathBuf);

impl Fifo {
    fn new(name: &str) -> Self {
        let name = format!("{name}.{}", process::id());
        let fifo = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let made = Command::new("mkfifo").arg(&fifo).status();
        assert!(made.expect("mkfifo, of coreutils, runs").success());
        Fifo(fifo)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("the target folder is UTF-8")
    }

    /// Waits until a program has opened it for reading, and opens it for writing.
    fn open_for_writing(&self) -> File {
        let mut options = OpenOptions::new();
        // Without NONBLOCK, opening waits without a limit.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        options.write(true).custom_flags(flags);
        eventually("a reader of the FIFO", || options.open(&self.0).ok())
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Opening such a FIFO blocks.
#[test]
fn a_call_whose_files_are_pipes_without_a_writer_ends_by_its_timeout() {
    let fifo = Fifo::new("silent-file");
    let path = fifo.path();
    let cert = ["--cert-file", path, "--key-file", path];
    for (url, options) in [
        ("amqp://localhost:1", &["--password-file", path][..]),
        ("amqps://localhost:1", &["--ca-file", path]),
        ("amqps://localhost:1", &cert),
    ] {
        let mut call = client("any", &[options, &["-t", "200ms", "30"]].concat());
        let error = format!(
            "rpc-client: {} {path}: timed out after 200ms while reading it: does a program write to it, and close it?\n",
            options[0]
        );
        assert_output(call.env("AMQP_URL", url), 2, "", &error);
    }
}

#[test]
fn a_server_waits_for_the_writer_of_its_password_file_and_can_be_stopped_meanwhile() {
    let fifo = Fifo::new("late-password");
    let queue = Queue::named("late_password");
    let (user, password) = broker::credentials()
        .split_once(':')
        .expect("both are in the URL");
    let url = broker::url_with_credentials(user);
    let args = ["--queue", &queue, "--password-file", fifo.path()];
    let server = Program::spawn_at(&url, "rpc-server", &args);
    let silent_writer = fifo.open_for_writing();
    server.stop();
    drop(silent_writer);
    let server = Program::spawn_at(&url, "rpc-server", &args);
    let mut writer = fifo.open_for_writing();
    writer
        .write_all(password.as_bytes())
        .expect("the server has opened it");
    drop(writer);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.stop();
}

/// RabbitMQ closes the socket after 3 s, without a reason, if a client does not announce that it
/// understands one.
#[test]
fn a_wrong_password_is_reported_at_once() {
    let url = broker::url_with_credentials("nobody:wrong");
    let error = format!(
        "{} refused user 'nobody': is the password right?",
        broker::authority()
    );
    let mut call = client("any", &["-t", "2500ms", "30"]);
    assert_output(
        call.env("AMQP_URL", &url),
        3,
        "",
        &format!("rpc-client: {error}\n"),
    );
    let server = Program::spawn_at(&url, "rpc-server", &[]);
    let warning = server.wait_for_log(&error);
    let retrying = format!("{error}; retrying once, in 3s");
    assert_eq!(level_and_text(&warning), Some(("WARN", &*retrying)));
}

/// What checks logins, such as LDAP, may start later than the server does.
#[test]
fn a_server_tries_a_refused_login_once_more() {
    let node = private_node();
    let queue = Queue::named("refused_login");
    node.add_user("early-server", "other");
    let proxy = Proxy::start_to(node.authority());
    let url = format!("amqp://early-server:secret@{}", proxy.authority());
    let server = Program::spawn_at(&url, "rpc-server", &["--queue", &queue]);
    server.wait_for_log("refused user 'early-server'");
    proxy.refuse(true); // until the password is right, however long that takes
    node.rabbitmqctl(&["change_password", "early-server", "secret"]);
    proxy.refuse(false);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.stop();
    Peer::connect_to(node.url()).delete_queue(&queue);
}

#[test]
fn a_login_that_is_refused_twice_ends_the_server() {
    let url = broker::url_with_credentials("nobody:wrong");
    let mut server = Program::spawn_at(&url, "rpc-server", &[]);
    assert_eq!(server.wait().code(), Some(3));
    let (lines, log) = server.remaining_output();
    assert_eq!(lines, [""; 0]);
    let error = format!(
        "rpc-server: {} refused user 'nobody': is the password right?",
        broker::authority()
    );
    let [warning, last] = &log[..] else {
        panic!("{log:#?}")
    };
    assert!(warning.contains("retrying once"), "{log:#?}");
    assert_eq!(*last, error);
}

#[test]
fn no_log_shows_a_password() {
    let queue = Queue::named("secrets");
    let _server = Program::start_server(&queue, &[]);
    // The password is percent-encoded in the URL only: the log shows whether it took it from the
    // URL or from the wire.
    let (user, password) = broker::credentials()
        .split_once(':')
        .expect("both are in the URL");
    let encoded = password
        .bytes()
        .map(|byte| format!("%{byte:02x}"))
        .collect::<String>();
    let secret = broker::url_with_credentials(&format!("{user}:{encoded}"));
    let output = client(&queue, &["30"])
        .env("AMQP_URL", secret)
        .env(
            "RUST_LOG",
            "trace,amiquip=trace,amiquip::io_loop::handshake_state=trace",
        )
        .assert()
        .code(0)
        .get_output()
        .clone();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.len() > 1_000, "trace logs: {log}");
    let on_the_wire = format!("\\u{{0}}{password}");
    assert!(
        !log.contains(&encoded) && !log.contains(&on_the_wire),
        "{log}"
    );
    assert!(!log.contains("StartOk"), "{log}");
}

/// A URL may stand where it does not belong.
#[test]
fn a_password_in_the_wrong_place_is_masked() {
    for (program, args) in [
        ("rpc-client", &["amqp://me:sesame@host", "30"][..]),
        ("rpc-client", &["-t", "amqp://me:ses/ame@host", "30"]),
        ("rpc-client", &["--summary=amqp://me:sesame@host", "30"]),
        ("rpc-client", &["--lines", "amqp://me:sesame@host"]),
        ("rpc-client", &["--url", "amqp://me:12/sesame@host", "30"]),
        ("rpc-client", &["--url=amqps://me:sesame@host:x", "30"]),
        ("rpc-server", &["--workers", "amqp://me:sesame@host"]),
        ("rpc-server", &["amqp://me:sesame@host"]),
        ("rpc-server", &["--", "amqp://me:sesame@host"]),
    ] {
        let output = command(program).args(args).assert().code(2);
        let output = output.get_output();
        let shown = [&*output.stdout, &output.stderr].concat();
        let shown = String::from_utf8_lossy(&shown);
        assert!(!shown.contains("ame@"), "{program} {args:?}: {shown}");
    }
}

#[test]
fn a_password_file_of_windows_is_read_and_an_empty_one_is_exit_code_2() {
    let queue = Queue::named("windows_password");
    let _server = Program::start_server(&queue, &[]);
    let (user, password) = broker::credentials()
        .split_once(':')
        .expect("both are in the URL");
    let file =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("windows_password.{}", process::id()));
    let name = file.to_str().expect("the folder is UTF-8");
    let url = broker::url_with_credentials(user);
    let mut call = client(&queue, &["--password-file", name, "30"]);
    call.env("AMQP_URL", url);
    fs::write(&file, format!("\u{feff}{password}\r\n")).expect("there is room");
    assert_output(&mut call, 0, "832040\n", "");
    fs::write(&file, "\r\n").expect("there is room");
    let error = format!("rpc-client: --password-file {name}: is empty\n");
    assert_output(&mut call, 2, "", &error);
    fs::remove_file(file).expect("it is ours");
}
