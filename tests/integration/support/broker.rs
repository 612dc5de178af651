//! The broker of the tests: that of `AMQP_URL`, or a private node; and nodes to be tampered with.

use rpc_common::broker::open;
use rpc_common::deadline::Deadline;
use rpc_common::target::Target;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use std::{env, fs, io, process};

/// The URL of the broker, which is started with the first call.
pub(crate) fn url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| {
        let Some(url) = env::var("AMQP_URL").ok().filter(|url| !url.is_empty()) else {
            return node().url().to_owned();
        };
        let target = Target::parse(&url).expect("AMQP_URL is well formed");
        let opened = open(&target, "test", &Deadline::after(Duration::from_secs(10)));
        assert!(
            opened.is_ok(),
            "the tests were pointed at the broker of AMQP_URL: {:?}",
            opened.err()
        );
        url
    })
}

/// Host and port of the broker, as messages name it.
pub(crate) fn authority() -> String {
    Target::parse(url()).expect("the broker's URL is well formed").to_string()
}

/// The broker's URL in parts: the user and password before the `@`, and the path behind the port.
fn parts() -> (&'static str, &'static str) {
    let rest = url().trim_start_matches("amqp://");
    let (user_info, rest) = rest.rsplit_once('@').unwrap_or(("guest:guest", rest));
    (user_info, rest.find('/').map_or("", |path| &rest[path..]))
}

/// The user and the password of the broker's URL, as they stand there.
pub(crate) fn user_info() -> &'static str {
    parts().0
}

/// The broker's URL with another host and port, or another user or path.
pub(crate) fn url_with(
    user_info: Option<&str>,
    authority: Option<&str>,
    path: Option<&str>,
) -> String {
    let user_info = user_info.unwrap_or_else(|| parts().0);
    let path = path.unwrap_or_else(|| parts().1);
    match authority {
        Some(authority) => format!("amqp://{user_info}@{authority}{path}"),
        None => format!("amqp://{user_info}@{}{path}", self::authority()),
    }
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/broker.sh");

/// Nodes that `broker.sh` runs below a folder, until its standard input ends, and that ends with this process,
/// however this process ends.
struct Script {
    folder: PathBuf,
    urls: Vec<String>,
    _process: Child,
}

impl Script {
    /// Starts a node, or as many as the `mode` of the script is for, with lines of `rabbitmq.conf`.
    fn run(mode: &[&str], nodes: usize, name: &str, config: &str) -> Self {
        let configured = env::var("NODE_CONFIG").unwrap_or_default();
        let folder = env::temp_dir().join(format!("rpc-tests-{name}-{}", process::id()));
        let mut process = Command::new(SCRIPT)
            .args(mode)
            .arg("run")
            .arg(&folder)
            .env("NODE_PLUGINS", "rabbitmq_auth_mechanism_ssl")
            .env("NODE_CONFIG", format!("{configured}\n{config}"))
            .process_group(0) // so that Ctrl-C ends us first, and the node then
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash runs broker.sh");
        let urls = BufReader::new(process.stdout.take().expect("piped")).lines();
        let urls: Vec<String> = urls.take(nodes).map_while(Result::ok).collect();
        assert_eq!(urls.len(), nodes, "no private RabbitMQ: what broker.sh says above is missing");
        Script { folder, urls, _process: process }
    }
}

/// Runs a command of the script on the nodes of a folder, and returns what it prints.
#[track_caller]
fn command(folder: &Path, mode: &[&str], command: &str, args: &[&str]) -> String {
    let mut script = Command::new(SCRIPT);
    let output = script.args(mode).arg(command).arg(folder).args(args).output();
    let output = output.expect("bash runs broker.sh");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "broker.sh {command} {args:?}: {text}");
    text
}

/// A private node.
pub(crate) struct Node(Script);

/// A node of ours, to which tests may add users and listeners; the plain tests' broker, too, unless
/// `AMQP_URL` names another.
pub(crate) fn node() -> &'static Node {
    static NODE: OnceLock<Node> = OnceLock::new();
    NODE.get_or_init(|| Node::start("shared", ""))
}

/// A node for one test at a time, which may do to it what would disturb others. It takes messages of 100,000 bytes
/// at the most.
pub(crate) fn victim() -> MutexGuard<'static, Node> {
    static NODE: OnceLock<Mutex<Node>> = OnceLock::new();
    let node = NODE.get_or_init(|| Mutex::new(Node::start("victim", "max_message_size = 100000")));
    // A test that failed has undone what it did: all of that is undone by drops.
    node.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    fn start(name: &str, config: &str) -> Self {
        Node(Script::run(&[], 1, name, config))
    }

    pub(crate) fn url(&self) -> &str {
        &self.0.urls[0]
    }

    /// Host and port, as messages name it.
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

    /// A folder that the node can read, and that goes with it.
    pub(crate) fn folder(&self) -> &Path {
        &self.0.folder
    }

    /// Runs `rabbitmqctl` on this node, and returns what it prints.
    #[track_caller]
    pub(crate) fn ctl(&self, args: &[&str]) -> String {
        command(self.folder(), &[], "ctl", args)
    }

    /// What the node has logged.
    pub(crate) fn log(&self) -> String {
        let files = fs::read_dir(self.folder().join("1/log")).expect("it logs there");
        let text = |file: io::Result<fs::DirEntry>| fs::read(file.ok()?.path()).ok();
        String::from_utf8_lossy(&files.filter_map(text).collect::<Vec<_>>().concat()).into_owned()
    }

    /// Blocks publishers, as the broker does when memory is short, until the guard is dropped.
    pub(crate) fn block_publishers(&self) -> impl Drop + '_ {
        self.ctl(&["set_vm_memory_high_watermark", "0"]);
        Undo(|| drop(self.ctl(&["set_vm_memory_high_watermark", "0.4"])))
    }

    /// Sets a variable of the broker's, until the guard is dropped.
    pub(crate) fn set(&self, variable: &str, value: &str) -> impl Drop + '_ {
        let old = self.ctl(&["eval", &format!("application:get_env(rabbit, {variable}).")]);
        let old = old.trim().trim_start_matches("{ok,").trim_end_matches('}').to_owned();
        let set = move |variable: &str, value: &str| {
            self.ctl(&["eval", &format!("application:set_env(rabbit, {variable}, {value}).")]);
        };
        set(variable, value);
        let variable = variable.to_owned();
        Undo(move || set(&variable, &old))
    }

    /// What stops the node's processes by SIGSTOP, and the guard that lets them go on when it is dropped.
    pub(crate) fn freezer(&self) -> (impl FnOnce() + Send + 'static, impl Drop) {
        let [freeze, thaw] = ["freeze", "thaw"].map(|name| {
            let folder = self.folder().to_owned();
            move || drop(command(&folder, &[], name, &[]))
        });
        (freeze, Undo(thaw))
    }
}

/// The mode of the script, and the nodes, of a cluster.
const CLUSTER: (&[&str], usize) = (&["cluster"], 3);

/// A cluster of three private nodes, which are known by their numbers, 1 to 3.
pub(crate) struct Cluster(Script);

impl Cluster {
    pub(crate) fn start(name: &str) -> Self {
        let (mode, nodes) = CLUSTER;
        Cluster(Script::run(mode, nodes, name, ""))
    }

    /// The URLs of its nodes, the first one first.
    pub(crate) fn urls(&self) -> &[String] {
        &self.0.urls
    }

    /// Has the script do something to a node, and returns what that prints.
    #[track_caller]
    pub(crate) fn node(&self, number: usize, command: &str, args: &[&str]) -> String {
        self::command(&self.0.folder, CLUSTER.0, command, &[&[&*number.to_string()], args].concat())
    }
}

struct Undo<F: FnMut()>(F);

impl<F: FnMut()> Drop for Undo<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
