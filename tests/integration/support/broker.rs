//! The broker of the tests: that of `AMQP_URL`, or a private node.

use rpc_common::broker::open;
use rpc_common::deadline::Deadline;
use rpc_common::target::Target;
use std::env;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// The URL of the broker, which is started with the first call.
pub(crate) fn url() -> &'static str {
    static BROKER: OnceLock<Broker> = OnceLock::new();
    &BROKER.get_or_init(Broker::start).url
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

struct Broker {
    url: String,
    /// The node runs until its standard input ends, and that ends with this process, however this
    /// process ends.
    _node: Option<Child>,
}

impl Broker {
    fn start() -> Self {
        if let Some(url) = env::var("AMQP_URL").ok().filter(|url| !url.is_empty()) {
            let target = Target::parse(&url).expect("AMQP_URL is well formed");
            let opened = open(&target, "test", &Deadline::after(Duration::from_secs(10)));
            assert!(opened.is_ok(), "the tests were pointed at the broker of AMQP_URL: {opened:?}");
            return Broker { url, _node: None };
        }
        let folder = env::temp_dir().join(format!("rpc-tests-{}", std::process::id()));
        let mut node = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/broker.sh"))
            .arg("run")
            .arg(folder)
            .process_group(0) // so that Ctrl-C ends us first, and the node then
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash runs broker.sh");
        let mut url = String::new();
        BufReader::new(node.stdout.take().expect("piped"))
            .read_line(&mut url)
            .expect("its output is text");
        assert!(url.ends_with('\n'), "no private RabbitMQ: what broker.sh says above is missing");
        Broker { url: url.trim().into(), _node: Some(node) }
    }
}
