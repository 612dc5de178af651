//! The broker of the benchmarks: a private node. `AMQP_URL` is ignored.

use anyhow::{ensure, Context, Result};
use std::env;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{self, Child, Command, Stdio};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../broker.sh");

/// A private node. It is stopped when this is dropped or this process ends.
pub(crate) struct Broker {
    url: String,
    /// It stops the node when its standard input ends, so at the latest when this process ends, for
    /// whatever reason.
    script: Child,
}

impl Broker {
    pub(crate) fn start() -> Result<Self> {
        eprintln!("starting a private RabbitMQ ...");
        let mut script = Command::new(SCRIPT)
            .arg("run")
            .arg(env::temp_dir().join(format!("rpc-benches-{}", process::id())))
            .process_group(0) // Ctrl-C stops only this process; its end stops the node
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("broker.sh")?;
        let mut url = String::new();
        BufReader::new(script.stdout.take().context("piped")?).read_line(&mut url)?;
        ensure!(
            url.ends_with('\n'),
            "no private RabbitMQ: see the error of broker.sh above"
        );
        Ok(Broker {
            url: url.trim().into(),
            script,
        })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let _ = self.script.wait(); // it removes the folder of the node
    }
}
