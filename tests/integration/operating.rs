//! What rpc-server/README.md tells operators to set up: permissions, and a policy for requests that
//! kill their server. The test below it runs the command as it is written there.

use crate::support::broker::private_node;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, client, command, Program};
use amiquip::AmqpProperties;
use std::fs;
use std::path::PathBuf;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const GUIDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../rpc-server/README.md");

/// The arguments of the first command `rabbitmqctl -q` of the guide that contains these texts, for
/// another queue.
fn documented_command(queue: &str, texts: &[&str]) -> Vec<String> {
    let guide = fs::read_to_string(GUIDE)
        .expect("the page can be read")
        .replace("rpc_queue", queue);
    let commands = guide
        .lines()
        .filter_map(|line| line.trim().strip_prefix("$ rabbitmqctl -q "));
    let command = commands
        .into_iter()
        .find(|command| texts.iter().all(|text| command.contains(text)));
    let command = command.unwrap_or_else(|| panic!("the guide has no command with {texts:?}"));
    command
        .split(' ')
        .map(|word| word.trim_matches('\'').to_owned())
        .collect()
}

/// Runs `rabbitmqctl` on the private node.
fn rabbitmqctl(args: &[String]) {
    private_node().rabbitmqctl(&args.iter().map(String::as_str).collect::<Vec<_>>());
}

/// A user of the private node with the permissions that the guide gives to the user `role`:
/// configure, write and read, or without one of them. Returns its URL.
fn add_user(name: &str, role: &str, queue: &str, without: Option<usize>) -> String {
    let node = private_node();
    node.rabbitmqctl(&["add_user", name, "secret"]);
    let mut command = documented_command(queue, &["set_permissions", role]);
    assert_eq!(command[..2], ["set_permissions", role]);
    command[1] = name.into();
    if let Some(permission) = without {
        command[2 + permission] = "^$".into();
    }
    rabbitmqctl(&command);
    format!("amqp://{name}:secret@{}", node.authority())
}

const PERMISSIONS: [usize; 3] = [0, 1, 2];

#[test]
fn a_client_needs_the_permissions_of_the_guide_and_no_others() {
    let queue = Queue::named("permissions_of_client");
    let server = Program::start_server_at(private_node().url(), &queue, &[]);
    let call = |name: &str, without| {
        let mut call = client(&queue, &["-q", "-t", "5s", "30"]);
        call.env("AMQP_URL", add_user(name, "caller", &queue, without));
        call
    };
    assert_output(&mut call("least-caller", None), 0, "832040\n", "");
    for permission in PERMISSIONS {
        let assert = call(&format!("less-caller-{permission}"), Some(permission))
            .assert()
            .stdout("");
        let error = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert!(
            error.contains("ACCESS_REFUSED"),
            "without permission {permission}: {error}"
        );
    }
    server.stop();
    Peer::connect_to(private_node().url()).delete_queue(&queue);
}

#[test]
fn a_server_needs_the_permissions_of_the_guide_and_no_others() {
    let node = private_node();
    let queue = Queue::named("permissions_of_server");
    let call = |code, answer| {
        let mut call = client(&queue, &["-q", "-t", "3s", "30"]);
        call.env("AMQP_URL", node.url())
            .assert()
            .code(code)
            .stdout(answer);
    };
    // Without permission to configure it cannot declare the queue.
    let url = add_user("less-server-0", "server", &queue, Some(0));
    let refused = |url: &str| {
        let assert = command("rpc-server")
            .args(["--queue", &queue])
            .env("AMQP_URL", url)
            .assert()
            .code(3)
            .stdout("");
        let error = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert!(error.contains("ACCESS_REFUSED"), "{error}");
    };
    refused(&url);
    let server = Program::start_server_at(
        &add_user("least-server", "server", &queue, None),
        &queue,
        &[],
    );
    call(0, "832040\n");
    server.stop();
    // But it can use one that exists.
    let server = Program::start_server_at(&url, &queue, &[]);
    call(0, "832040\n");
    server.stop();
    // Without permission to write, its replies would be refused.
    refused(&add_user("less-server-1", "server", &queue, Some(1)));
    refused(&add_user("less-server-2", "server", &queue, Some(2)));
    Peer::connect_to(node.url()).delete_queue(&queue);
}

/// The limit of the policy: so often a request is delivered again.
const DELIVERY_LIMIT: usize = 5;

#[test]
fn a_request_that_kills_its_servers_is_dead_lettered_after_the_limit_of_the_policy() {
    let node = private_node();
    let queue = Queue::named("deadly");
    let dead_letters = Queue::named("deadly.dead");
    let policy = documented_command(
        &queue,
        &[
            "set_policy",
            "delivery-limit\":5",
            "dead-letter-routing-key",
        ],
    );
    let policy = policy.iter().map(|word| {
        word.replace("rpc_dead", &dead_letters)
            .replace("rpc", &queue)
    });
    rabbitmqctl(&policy.collect::<Vec<_>>());
    let mut peer = Peer::connect_to(node.url());
    peer.declare(&dead_letters, "classic");
    peer.declare(&queue, "quorum");
    let replies = Queue::declare("deadly.replies");
    let properties = AmqpProperties::default().with_reply_to(replies.to_owned());
    peer.publish(&queue, b"deadly", properties);
    let mut killed = 0;
    while peer.message_count(&dead_letters) == Some(0) {
        let args = ["--queue", &queue, "--", "sh", "-c", "kill -9 $PPID"];
        let mut server = Program::spawn_at(node.url(), "rpc-server", &args);
        assert_eq!(server.wait().code(), None);
        killed += 1;
        assert!(killed <= 2 * DELIVERY_LIMIT, "{killed} servers were killed");
        peer.wait_for_consumers(&queue, 0);
    }
    assert_eq!(killed, DELIVERY_LIMIT + 1);
    assert_eq!(peer.take(&dead_letters).body, b"deadly");
    node.wait_until_empty(&queue);
    for queue in [&*queue, &*dead_letters] {
        peer.delete_queue(queue);
    }
}

/// In the table, `…` stands for what differs.
#[test]
fn the_lines_of_the_log_that_the_guide_explains_are_in_the_source() {
    let guide = fs::read_to_string(GUIDE).expect("the page can be read");
    let (_, table) = guide
        .split_once("| in the log |")
        .expect("the guide has the table");
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with("| "));
    let lines = rows.flat_map(|row| row.split('`').skip(1).step_by(2));
    let parts = lines
        .flat_map(|line| line.split(['…', ';']))
        .map(str::trim)
        .filter(|part| part.len() > 2);
    let folders = [
        "rpc-common/src/connection",
        "rpc-server/src",
        "rpc-server/src/bin/rpc-server",
        "rpc-server/src/program",
        "rpc-server/src/redelivery",
    ];
    let source = folders.map(|folder| {
        let files = fs::read_dir(format!("{ROOT}/{folder}")).expect("the folder exists");
        let files = files.map(|file| file.expect("it can be listed").path());
        let text = |file: PathBuf| fs::read_to_string(file).expect("it is text");
        files
            .filter(|file| file.is_file())
            .map(text)
            .collect::<String>()
    });
    let source = source.concat().replace("{queue}", "").replace("{}", "");
    let parts = parts.collect::<Vec<_>>();
    assert!(parts.len() > 10, "{parts:?}");
    for part in parts {
        assert!(source.contains(part), "no log line has '{part}'");
    }
}
