//! The broker of the tests: the one of `AMQP_URL`, or a private node; and nodes whose state a test
//! changes.

use super::broker_features::broker_version_at;
use super::eventually;
use rpc_common::connection::{Connection, Deadline, Endpoint, Owner};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use std::{env, fs, io, process};

/// The URL of the broker. The first call starts the private node, unless `AMQP_URL` names a broker.
pub(crate) fn url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| {
        let Some(url) = env::var("AMQP_URL").ok().filter(|url| !url.is_empty()) else {
            return private_node().url().to_owned();
        };
        let endpoint = Endpoint::parse(&url, "AMQP_URL").expect("AMQP_URL is well formed");
        let opened = Connection::open(
            &endpoint,
            "test",
            &Deadline::after(Duration::from_secs(10)),
            &Owner::Standby,
        );
        assert!(
            opened.is_ok(),
            "cannot use the broker of AMQP_URL: {:?}",
            opened.err()
        );
        url
    })
}

/// Host and port of the broker, as messages show them.
pub(crate) fn authority() -> String {
    Endpoint::parse(url(), "the test")
        .expect("the broker's URL is well formed")
        .address
}

/// The credentials (`user:password`) and the path of the broker's URL, still percent-encoded.
fn url_parts() -> (&'static str, &'static str) {
    let rest = url().trim_start_matches("amqp://");
    let (credentials, rest) = rest.rsplit_once('@').unwrap_or(("guest:guest", rest));
    (credentials, rest.find('/').map_or("", |path| &rest[path..]))
}

/// User and password of the broker's URL, still percent-encoded.
pub(crate) fn credentials() -> &'static str {
    url_parts().0
}

/// The broker's URL with another host and port.
pub(crate) fn url_at(authority: &str) -> String {
    let (credentials, path) = url_parts();
    format!("amqp://{credentials}@{authority}{path}")
}

/// The broker's URL with other credentials.
pub(crate) fn url_with_credentials(credentials: &str) -> String {
    format!("amqp://{credentials}@{}{}", authority(), url_parts().1)
}

/// The broker's URL with another vhost.
pub(crate) fn url_with_vhost(vhost: &str) -> String {
    format!("amqp://{}@{}/{vhost}", credentials(), authority())
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/broker.sh");

/// A running `broker.sh` with its nodes. They stop when the standard input of the script ends, so
/// at the latest when this process ends, for whatever reason.
struct RunningScript {
    folder: PathBuf,
    urls: Vec<String>,
    _process: Child,
}

impl RunningScript {
    /// Starts nodes with `config` added to `rabbitmq.conf`, and waits until they are ready. `mode`
    /// is `cluster` or nothing, and `nodes` is how many nodes the script starts in that mode.
    fn start(mode: &[&str], nodes: usize, name: &str, config: &str) -> Self {
        let common_config = env::var("NODE_CONFIG").unwrap_or_default();
        let folder = env::temp_dir().join(format!("rpc-tests-{name}-{}", process::id()));
        let mut process = Command::new(SCRIPT)
            .args(mode)
            .arg("run")
            .arg(&folder)
            .env("NODE_PLUGINS", "rabbitmq_auth_mechanism_ssl")
            .env("NODE_CONFIG", format!("{common_config}\n{config}"))
            .process_group(0) // Ctrl-C stops only the tests; their end stops the node
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash runs broker.sh");
        let urls = BufReader::new(process.stdout.take().expect("piped")).lines();
        let urls: Vec<String> = urls.take(nodes).map_while(Result::ok).collect();
        assert_eq!(
            urls.len(),
            nodes,
            "no private RabbitMQ: see the error of broker.sh above"
        );
        RunningScript {
            folder,
            urls,
            _process: process,
        }
    }
}

/// Runs a command of the script on the nodes below `folder`, and returns its output.
#[track_caller]
fn run_script(folder: &Path, mode: &[&str], command: &str, args: &[&str]) -> String {
    let mut script = Command::new(SCRIPT);
    let output = script
        .args(mode)
        .arg(command)
        .arg(folder)
        .args(args)
        .output();
    let output = output.expect("bash runs broker.sh");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(
        output.status.success(),
        "broker.sh {command} {args:?}: {text}"
    );
    text
}

/// A RabbitMQ node that the tests started.
pub(crate) struct Node(RunningScript);

/// The node that all tests share, to which they may add users, policies and listeners. It is also
/// the tests' broker, unless `AMQP_URL` names another one.
pub(crate) fn private_node() -> &'static Node {
    static NODE: OnceLock<Node> = OnceLock::new();
    NODE.get_or_init(|| Node::start("shared", ""))
}

/// A node that only one test at a time uses, for what would disturb other tests. Its largest
/// message is 100,000 bytes.
pub(crate) fn exclusive_node() -> MutexGuard<'static, Node> {
    static NODE: OnceLock<Mutex<Node>> = OnceLock::new();
    let node =
        NODE.get_or_init(|| Mutex::new(Node::start("exclusive", "max_message_size = 100000")));
    // The state of the node is sound after a failed test: guards restore it when they are dropped.
    node.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Starts a node with `config` added to `rabbitmq.conf`.
    pub(crate) fn start(name: &str, config: &str) -> Self {
        Node(RunningScript::start(&[], 1, name, config))
    }

    pub(crate) fn url(&self) -> &str {
        &self.0.urls[0]
    }

    /// Host and port, as messages show them.
    pub(crate) fn authority(&self) -> &str {
        self.url().trim_start_matches("amqp://")
    }

    pub(crate) fn port(&self) -> u16 {
        self.url()
            .rsplit(':')
            .next()
            .and_then(|port| port.parse().ok())
            .expect("the URL has a port")
    }

    /// The node's folder. The node can read it, and removes it when it stops.
    pub(crate) fn folder(&self) -> &Path {
        &self.0.folder
    }

    /// Runs `rabbitmqctl` on this node, and returns its output.
    #[track_caller]
    pub(crate) fn rabbitmqctl(&self, args: &[&str]) -> String {
        run_script(self.folder(), &[], "ctl", args)
    }

    /// The whole log of the node.
    pub(crate) fn log(&self) -> String {
        let files = fs::read_dir(self.folder().join("1/log")).expect("the node logs there");
        let text = |file: io::Result<fs::DirEntry>| fs::read(file.ok()?.path()).ok();
        String::from_utf8_lossy(&files.filter_map(text).collect::<Vec<_>>().concat()).into_owned()
    }

    /// Waits until all connections are closed, and returns how many, since the node started, were
    /// closed without the AMQP close handshake.
    pub(crate) fn unclean_closes(&self) -> usize {
        eventually("the end of all connections", || {
            let connections = self.rabbitmqctl(&["list_connections", "--no-table-headers", "name"]);
            connections.trim().is_empty().then_some(())
        });
        self.log()
            .matches("client unexpectedly closed TCP connection")
            .count()
    }

    /// Adds a user who may do everything.
    #[track_caller]
    pub(crate) fn add_user(&self, user: &str, password: &str) {
        self.rabbitmqctl(&["add_user", user, password]);
        self.rabbitmqctl(&["set_permissions", user, ".*", ".*", ".*"]);
    }

    /// Waits until a queue has neither ready nor unacknowledged messages.
    #[track_caller]
    pub(crate) fn wait_until_empty(&self, queue: &str) {
        eventually("an empty queue", || {
            let columns = ["name", "messages_ready", "messages_unacknowledged"];
            let args = [&["list_queues", "--no-table-headers"][..], &columns].concat();
            let table = self.rabbitmqctl(&args);
            let empty = format!("{queue}\t0\t0");
            table.lines().any(|line| line == empty).then_some(())
        });
    }

    /// Removes the consumers of a classic queue, without telling them.
    pub(crate) fn forget_consumers(&self, queue: &str) {
        let cancel = match broker_version_at(self.url()) {
            (4.., _) => "{stop_consumer, #{pid => element(1, C), consumer_tag => element(2, C), user => <<>>}}",
            _ => "{basic_cancel, element(1, C), element(2, C), undefined, <<>>}",
        };
        let name = format!("rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)");
        let cancel_all =
            format!("[gen_server2:call(amqqueue:get_pid(Q), {cancel}) || C <- rabbit_amqqueue:consumers(Q)]");
        self.rabbitmqctl(&[
            "eval",
            &format!("{{ok, Q}} = rabbit_amqqueue:lookup({name}), {cancel_all}."),
        ]);
    }

    /// Kills the process of a classic queue when the next message arrives, which it does not take.
    /// The broker nacks the message, and starts the process again.
    pub(crate) fn kill_queue_at_next_message(&self, queue: &str) {
        let name = format!("rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)");
        let process =
            format!("{{ok, Q}} = rabbit_amqqueue:lookup({name}), P = amqqueue:get_pid(Q)");
        let is_message =
            "fun({'$gen_cast', Cast}) -> element(1, Cast) =:= deliver; (_) -> false end";
        let has_message =
            format!("{{messages, All}} = process_info(P, messages), lists:any({is_message}, All)");
        let kill = format!(
            "Kill = fun Wait() -> case begin {has_message} end of \
             true -> exit(P, kill); false -> timer:sleep(1), Wait() end end"
        );
        let expression = format!("{process}, {kill}, sys:suspend(P), spawn(Kill).");
        self.rabbitmqctl(&["eval", &expression]);
    }

    /// Blocks publishers by a memory alarm, until the guard is dropped.
    pub(crate) fn block_publishers(&self) -> impl Drop + '_ {
        self.rabbitmqctl(&["set_vm_memory_high_watermark", "0"]);
        RunOnDrop(|| drop(self.rabbitmqctl(&["set_vm_memory_high_watermark", "0.4"])))
    }

    /// Lets user guest open no more connections, until the guard is dropped.
    pub(crate) fn limit_connections(&self) -> impl Drop + '_ {
        self.rabbitmqctl(&["set_user_limits", "guest", r#"{"max-connections":0}"#]);
        RunOnDrop(|| drop(self.rabbitmqctl(&["clear_user_limits", "guest", "max-connections"])))
    }

    /// Sets a variable of the application `rabbit`, until the guard is dropped.
    pub(crate) fn set_variable(&self, variable: &str, value: &str) -> impl Drop + '_ {
        let old = self.rabbitmqctl(&["eval", &format!("application:get_env(rabbit, {variable}).")]);
        let old = old
            .trim()
            .trim_start_matches("{ok,")
            .trim_end_matches('}')
            .to_owned();
        let set = move |variable: &str, value: &str| {
            let expression = format!("application:set_env(rabbit, {variable}, {value}).");
            self.rabbitmqctl(&["eval", &expression]);
        };
        set(variable, value);
        let variable = variable.to_owned();
        RunOnDrop(move || set(&variable, &old))
    }

    /// A function that stops the node's processes by SIGSTOP, and a guard that continues them when
    /// it is dropped.
    pub(crate) fn freezer(&self) -> (impl FnOnce() + Send + 'static, impl Drop) {
        let [freeze, thaw] = ["freeze", "thaw"].map(|name| {
            let folder = self.folder().to_owned();
            move || drop(run_script(&folder, &[], name, &[]))
        });
        (freeze, RunOnDrop(thaw))
    }
}

const CLUSTER_MODE: &[&str] = &["cluster"];
const CLUSTER_NODES: usize = 3;

/// A cluster of three private nodes, numbered 1 to 3.
pub(crate) struct Cluster(RunningScript);

impl Cluster {
    pub(crate) fn start(name: &str) -> Self {
        Cluster(RunningScript::start(CLUSTER_MODE, CLUSTER_NODES, name, ""))
    }

    /// The URLs of the nodes 1, 2 and 3.
    pub(crate) fn urls(&self) -> &[String] {
        &self.0.urls
    }

    /// Runs a command of the script on the node with this number, and returns its output.
    #[track_caller]
    pub(crate) fn run_on_node(&self, number: usize, command: &str, args: &[&str]) -> String {
        let number = number.to_string();
        let args = [&[&*number], args].concat();
        run_script(&self.0.folder, CLUSTER_MODE, command, &args)
    }
}

struct RunOnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for RunOnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
