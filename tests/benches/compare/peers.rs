//! The programs that are measured: ours, and the RPC tutorial on six other libraries.

use anyhow::{ensure, Context, Result};
use std::env;
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A **peer** is a server and a client on one library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Peer {
    Ours,
    C,
    Go,
    Node,
    Php,
    Python,
    Lapin,
}

use Peer::{Go, Lapin, Node, Ours, Php, Python, C};

impl Peer {
    pub(crate) const ALL: [Peer; 7] = [Ours, C, Go, Node, Php, Python, Lapin];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Ours => "ours",
            C => "C",
            Go => "Go",
            Node => "Node",
            Php => "PHP",
            Python => "Python",
            Lapin => "lapin",
        }
    }
}

/// The name in file names and on the command line.
impl Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_lowercase())
    }
}

/// The folders of the programs, and the URL of their broker.
pub(crate) struct Programs<'a> {
    /// The folder of our programs and of this one.
    ours: PathBuf,
    /// The folder into which `tests/setup.sh` builds and installs the peers.
    pub(crate) built: PathBuf,
    /// The folder of the peers' sources.
    pub(crate) sources: PathBuf,
    url: &'a str,
}

impl<'a> Programs<'a> {
    /// Fails at once if one of the programs is missing.
    pub(crate) fn find(url: &'a str) -> Result<Self> {
        let this = env::current_exe()?;
        let ours = this
            .parent()
            .context("a program is in a folder")?
            .to_owned();
        let built = ours.with_file_name("peers"); // profiles are below the target folder
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../peers");
        for program in ["rpc-server", "rpc-client"] {
            ensure!(
                ours.join(program).exists(),
                "{program} is not built: run 'make build'"
            );
        }
        let needed = "c-server c-client c-fib go-server go-client lapin-server lapin-client \
                      node/node_modules/amqplib python/bin/python \
                      /usr/share/php/PhpAmqpLib/autoload.php /usr/bin/time /usr/bin/valgrind";
        for needed in needed.split_whitespace() {
            ensure!(
                built.join(needed).exists(), // an absolute path replaces the folder
                "{needed} is missing: run 'tests/setup.sh peers bench', or 'make bench' which does"
            );
        }
        Ok(Programs {
            ours,
            built,
            sources,
            url,
        })
    }

    /// The command of a server that prints no line per request.
    pub(crate) fn server(&self, peer: Peer, queue: &str, prefetch: u16) -> Command {
        let mut server = self.program(peer, "server", queue);
        let prefetch = prefetch.to_string();
        if peer == Ours {
            server
                .env("RUST_LOG", "warn")
                .args(["--quiet", "--prefetch", &prefetch]);
        } else {
            server.env("RPC_PREFETCH", prefetch).env("RPC_QUIET", "1");
        }
        server
    }

    /// The command of a client that makes a call `repeat` times for each number among its
    /// arguments, and prints the time it took.
    pub(crate) fn client(&self, peer: Peer, queue: &str, in_flight: u16, repeat: u64) -> Command {
        let in_flight = in_flight.to_string();
        let repeat = repeat.to_string();
        let mut client = self.program(peer, "client", queue);
        if peer == Ours {
            client.args(["--quiet", "--summary=json", "-o", "raw", "-j", &in_flight]);
            client.args(["--repeat", &repeat]);
        } else {
            client
                .env("RPC_IN_FLIGHT", in_flight)
                .env("RPC_REPEAT", repeat);
        }
        client
    }

    /// The command that runs a peer's `server` or `client` on a queue.
    pub(crate) fn program(&self, peer: Peer, half: &str, queue: &str) -> Command {
        let source = |name: &str| self.sources.join(peer.to_string()).join(name);
        let (program, argument) = match peer {
            Ours => (self.ours.join(format!("rpc-{half}")), None),
            C | Go | Lapin => (self.built.join(format!("{peer}-{half}")), None),
            Node => ("node".into(), Some(source(&format!("{half}.js")))),
            Php => ("php".into(), Some(source(&format!("{half}.php")))),
            Python => (
                self.built.join("python/bin/python"),
                Some(source(&format!("{half}.py"))),
            ),
        };
        let mut command = Command::new(program);
        command
            .args(argument)
            .env("AMQP_URL", self.url)
            .env_remove("RUST_LOG");
        match peer {
            Ours => command.args(["--queue", queue]),
            _ => command.env("RPC_QUEUE", queue),
        };
        command.env("NODE_PATH", self.built.join("node/node_modules"));
        command
    }
}
