//! The limits of the system.

use crate::support::broker;
use crate::support::peer::Queue;
use crate::support::programs::{assert_output, client, program_folder, Program};
use std::process::Command;

#[test]
fn many_workers_raise_the_limit_of_open_files() {
    let queue = Queue::named("limit_of_files");
    let start = |limit: &str| {
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--nofile={limit}"))
            .arg(program_folder().join("rpc-server"))
            .args(["--queue", &queue, "-q", "--workers", "40", "--", "sh", "-c"])
            .arg("sleep 1; printf %s $(ulimit -n)")
            .env("AMQP_URL", broker::url());
        let server = Program::spawn_command(&command);
        assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
        server
    };
    // 8 for each worker, and 64.
    let server = start("100:1000");
    assert_output(
        &mut client(&queue, &["-j", "40", "--repeat", "40", "--data", ""]),
        0,
        &"384\n".repeat(40),
        "",
    );
    assert!(!server
        .new_log()
        .iter()
        .any(|line| line.contains("hard limit")));
    server.stop();
    let server = start("100:300");
    server.wait_for_log("40 workers need 384 open files, and the hard limit is 300");
    assert_output(&mut client(&queue, &["--data", ""]), 0, "300", "");
    server.stop();
}
