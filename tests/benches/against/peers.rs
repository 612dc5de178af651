//! Who is measured: our programs, and the tutorial's on the libraries of six languages.

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

impl Peer {
    pub(crate) const ALL: [Peer; 7] =
        [Peer::Ours, Peer::C, Peer::Go, Peer::Node, Peer::Php, Peer::Python, Peer::Lapin];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::Ours => "ours",
            Peer::C => "C",
            Peer::Go => "Go",
            Peer::Node => "Node",
            Peer::Php => "PHP",
            Peer::Python => "Python",
            Peer::Lapin => "lapin",
        }
    }
}

impl Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_lowercase())
    }
}

/// Where the programs are.
pub(crate) struct Programs {
    /// The folder of our own, in which this one is, too.
    ours: PathBuf,
    /// The folder of what `tests/setup.sh` builds and installs of the peers.
    pub(crate) built: PathBuf,
    /// The folder of the peers' sources.
    pub(crate) sources: PathBuf,
}

impl Programs {
    pub(crate) fn installed() -> Result<Self> {
        let this = env::current_exe()?;
        let ours = this.parent().context("a program is in a folder")?.to_owned();
        let target = ours.parent().context("profiles are below the target folder")?;
        let built = target.join("peers");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../peers");
        Ok(Programs { ours, built, sources })
    }

    /// Makes sure that everything is there, before minutes go by.
    pub(crate) fn check(&self, peers: &[Peer]) -> Result<()> {
        for program in ["rpc-server", "rpc-client"] {
            ensure!(self.ours.join(program).exists(), "no {program} is built: run 'make bench'");
        }
        let tools = ["c-server", "c-client", "c-fib"].map(|name| self.built.join(name));
        let tools = tools.into_iter().chain(["/usr/bin/time", "/usr/bin/valgrind"].map(Into::into));
        for needed in peers.iter().filter_map(|peer| self.needed(*peer)).chain(tools) {
            ensure!(
                needed.exists(),
                "{} is missing: run 'tests/setup.sh peers bench', or 'make bench' which does",
                needed.display()
            );
        }
        Ok(())
    }

    /// What tells whether a peer is installed.
    fn needed(&self, peer: Peer) -> Option<PathBuf> {
        Some(match peer {
            Peer::Ours | Peer::C => return None,
            Peer::Go => self.built.join("go-server"),
            Peer::Node => self.built.join("node/node_modules/amqplib"),
            Peer::Php => "/usr/share/php/PhpAmqpLib/autoload.php".into(),
            Peer::Python => self.built.join("python/bin/python"),
            Peer::Lapin => self.built.join("lapin-server"),
        })
    }

    /// A program of ours.
    pub(crate) fn ours(&self, program: &str) -> Command {
        let mut command = Command::new(self.ours.join(program));
        command.env_remove("RUST_LOG");
        command
    }

    /// The command that runs a peer's `server` or `client`.
    pub(crate) fn program(&self, peer: Peer, half: &str) -> Command {
        let source = |name: &str| self.sources.join(name).join(half);
        match peer {
            Peer::Ours => self.ours(&format!("rpc-{half}")),
            Peer::C | Peer::Go | Peer::Lapin => {
                Command::new(self.built.join(format!("{peer}-{half}")))
            }
            Peer::Node => {
                let mut command = Command::new("node");
                command.env("NODE_PATH", self.built.join("node/node_modules"));
                command.arg(source("node").with_extension("js"));
                command
            }
            Peer::Php => {
                let mut command = Command::new("php");
                command.arg(source("php").with_extension("php"));
                command
            }
            Peer::Python => {
                let mut command = Command::new(self.built.join("python/bin/python"));
                command.arg(source("python").with_extension("py"));
                command
            }
        }
    }
}
