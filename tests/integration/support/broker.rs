//! The broker of the tests: that of `AMQP_URL`, or a private node; and nodes to be tampered with.

use rpc_common::broker::open;
use rpc_common::deadline::Deadline;
use rpc_common::target::Target;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;
use std::{env, process};

/// The URL of the broker, which is started with the first call.
pub(crate) fn url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| {
        let Some(url) = env::var("AMQP_URL").ok().filter(|url| !url.is_empty()) else {
            return node().url.clone();
        };
        let target = Target::parse(&url).expect("AMQP_URL is well formed");
        let opened = open(&target, "test", &Deadline::after(Duration::from_secs(10)));
        assert!(opened.is_ok(), "the tests were pointed at the broker of AMQP_URL: {opened:?}");
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

/// A private node.
pub(crate) struct Node {
    url: String,
    folder: PathBuf,
    /// The node runs until its standard input ends, and that ends with this process, however this
    /// process ends.
    _script: Child,
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/broker.sh");

/// A node of ours, to which tests may add users and listeners; the plain tests' broker, too, unless
/// `AMQP_URL` names another.
pub(crate) fn node() -> &'static Node {
    static NODE: OnceLock<Node> = OnceLock::new();
    NODE.get_or_init(|| Node::start("shared"))
}

impl Node {
    fn start(name: &str) -> Self {
        let folder = env::temp_dir().join(format!("rpc-tests-{name}-{}", process::id()));
        let mut script = Command::new(SCRIPT)
            .arg("run")
            .arg(&folder)
            .env("NODE_PLUGINS", "rabbitmq_auth_mechanism_ssl")
            .process_group(0) // so that Ctrl-C ends us first, and the node then
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash runs broker.sh");
        let mut url = String::new();
        BufReader::new(script.stdout.take().expect("piped"))
            .read_line(&mut url)
            .expect("its output is text");
        assert!(url.ends_with('\n'), "no private RabbitMQ: what broker.sh says above is missing");
        Node { url: url.trim().into(), folder, _script: script }
    }

    pub(crate) fn port(&self) -> u16 {
        self.url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("the URL has a port")
    }

    /// Runs `rabbitmqctl` on this node, and returns what it prints.
    #[track_caller]
    pub(crate) fn ctl(&self, args: &[&str]) -> String {
        let output = Command::new(SCRIPT).arg("ctl").arg(&self.folder).args(args).output();
        let output = output.expect("bash runs broker.sh");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "rabbitmqctl {args:?}: {text}");
        text
    }
}
