//! A cluster of three nodes: a node fails under load.

use crate::support::broker::Cluster;
use crate::support::broker_features::broker_version_at;
use crate::support::peer::Peer;
use crate::support::programs::Program;

const CALLS: usize = 600;

/// Each server is connected to another node; the client is connected to a node that survives. (RabbitMQ 3.10 loses what is
/// published on a new connection while the queue elects a leader.)
#[test]
fn every_call_is_answered_when_the_queues_leader_is_killed() {
    let cluster = Cluster::start("cluster");
    let queue = "survives";
    let args = ["--queue-type", "quorum", "--delay", "20ms", "-q"];
    let servers: Vec<Program> = cluster.urls().iter().map(|url| Program::start_server_at(url, queue, &args)).collect();
    // From RabbitMQ 4.3 on a quorum queue returns the messages of a consumer on a dead node after a timeout: a minute
    // by default.
    if broker_version_at(&cluster.urls()[0]) >= (4, 3) {
        let policy = r#"{"consumer-disconnected-timeout":1000}"#;
        cluster.run_on_node(1, "ctl", &["set_policy", "return", "^survives$", policy]);
    }
    let leader = leader(&cluster, queue);
    let survivor = &cluster.urls()[leader % cluster.urls().len()];
    let calls = CALLS.to_string();
    let args = ["--queue", queue, "-q", "-t", "1h", "-j", "64", "--repeat", &calls, "30"];
    let client = Program::spawn_at(survivor, "rpc-client", &args);
    assert_eq!(client.next_line(), "832040");

    cluster.run_on_node(leader, "kill", &[]);
    let before = 1 + client.new_lines().len();
    assert!(before + 64 < CALLS, "{before} calls were answered before the leader was killed");
    for _ in before..CALLS {
        assert_eq!(client.next_line(), "832040");
    }
    assert_eq!(client.remaining_output(), (vec![], vec![]));
    assert_eq!(client.wait_for_exit_code(), Some(0));

    cluster.run_on_node(leader, "start", &[]);
    Peer::connect_to(survivor).wait_for_consumers(queue, 3);
    for server in servers {
        server.stop();
    }
}

/// The number of the node that is the queue's leader.
fn leader(cluster: &Cluster, queue: &str) -> usize {
    let table = cluster.run_on_node(1, "ctl", &["list_queues", "--no-table-headers", "name", "leader"]);
    let node = table.lines().find_map(|line| line.strip_prefix(queue)).expect("it is listed");
    let port = node.trim().trim_start_matches("rpc-").trim_end_matches("@localhost");
    let position = cluster.urls().iter().position(|url| url.ends_with(port));
    position.expect("the leader is a node of the cluster") + 1
}
