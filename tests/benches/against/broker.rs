//! The broker that carries the calls: a private node, whatever `AMQP_URL` says.

use anyhow::{ensure, Context, Result};
use std::env;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{self, Child, Command, Stdio};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../broker.sh");

/// A private node, which ends when this is dropped, or with this process.
pub(crate) struct Broker {
    url: String,
    /// It runs until its standard input ends, and that ends with this process, however this process
    /// ends.
    script: Child,
}

impl Broker {
    pub(crate) fn start() -> Result<Self> {
        eprintln!("starting a private RabbitMQ ...");
        let mut script = Command::new(SCRIPT)
            .arg("run")
            .arg(env::temp_dir().join(format!("rpc-benches-{}", process::id())))
            .process_group(0) // so that Ctrl-C ends us first, and the node then
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("broker.sh")?;
        let mut url = String::new();
        BufReader::new(script.stdout.take().context("piped")?).read_line(&mut url)?;
        ensure!(url.ends_with('\n'), "no private RabbitMQ: what broker.sh says above is missing");
        Ok(Broker { url: url.trim().into(), script })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let _ = self.script.wait(); // until its folder is removed
    }
}
