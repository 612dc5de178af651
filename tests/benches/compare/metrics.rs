//! The metrics that are measured of every peer, how they are measured, and their samples.

use crate::peers::{Peer, Programs};
use crate::process::{run, wrap, Output, Server};
use crate::statistics::{whole_calls, Spread};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

/// The number of outstanding calls in all measurements that do not make one call at a time.
pub(crate) const IN_FLIGHT: u16 = 64;

/// Each call is fib(30), which takes no time: the calls themselves are measured.
const N: &str = "30";
const FIB_OF_N: &str = "832040";

/// The queue of the server that all clients call.
pub(crate) const QUEUE: &str = "bench.clients";

/// A **metric** is measured of every peer, and is a row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    ServerPrefetch1,
    ServerPrefetch64,
    Client,
    Latency,
    Cold,
    Memory,
}

use Metric::{Client, Cold, Latency, Memory, ServerPrefetch1, ServerPrefetch64};

impl Metric {
    pub(crate) const ALL: [Metric; 6] = [
        ServerPrefetch1,
        ServerPrefetch64,
        Client,
        Latency,
        Cold,
        Memory,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            ServerPrefetch1 => "server, prefetch 1, 64 in flight",
            ServerPrefetch64 => "server, prefetch 64, 64 in flight",
            Client => "client, 64 in flight",
            Latency => "client, one call at a time, p50",
            Cold => "client, one call from start to exit",
            Memory => "client, one call, peak memory",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            ServerPrefetch1 | ServerPrefetch64 | Client => "calls/s",
            Latency => "µs",
            Cold => "ms",
            Memory => "MiB",
        }
    }

    pub(crate) fn higher_is_better(self) -> bool {
        matches!(self, ServerPrefetch1 | ServerPrefetch64 | Client)
    }
}

/// A **load** is the result of a run of many calls: how many, and how long they took.
pub(crate) struct Load {
    pub(crate) calls: f64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
}

impl Load {
    /// Runs a command of [`Programs::client`].
    pub(crate) fn run(client: Command, peer: Peer) -> Result<Self> {
        Load::parse(&run(client, b"")?, peer)
    }

    /// Parses the output of that client.
    pub(crate) fn parse(output: &Output, peer: Peer) -> Result<Self> {
        let load = if peer == Peer::Ours {
            Load::parse_summary(output)
        } else {
            Load::parse_peer(output)
        };
        load.with_context(|| format!("no numbers, or errors: {}{}", output.stdout, output.stderr))
    }

    fn parse_peer(output: &Output) -> Option<Self> {
        let fields = output
            .stdout
            .split_whitespace()
            .map(|field| field.parse().ok());
        let [calls, seconds, p50_us] = fields.collect::<Option<Vec<f64>>>()?.try_into().ok()?;
        Some(Load {
            calls,
            seconds,
            p50_us,
        })
    }

    /// None if the summary has errors.
    fn parse_summary(output: &Output) -> Option<Self> {
        let summary: serde_json::Value =
            serde_json::from_str(output.stderr.lines().next()?).ok()?;
        let number = |pointer| summary.pointer(pointer)?.as_f64();
        summary
            .get("errors")?
            .as_object()?
            .is_empty()
            .then_some(())?;
        let p50_us = number("/latency_ms/p50")? * 1e3;
        Some(Load {
            calls: number("/calls")?,
            seconds: number("/seconds")?,
            p50_us,
        })
    }

    pub(crate) fn rate(&self) -> f64 {
        self.calls / self.seconds
    }
}

/// Makes the measurements.
pub(crate) struct Bench<'a> {
    pub(crate) programs: &'a Programs<'a>,
    /// The duration of one measurement.
    pub(crate) seconds: f64,
    /// The server that all clients call.
    _server: Server,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(programs: &'a Programs, seconds: f64) -> Result<Self> {
        let server = Server::start(&programs.server(Peer::C, QUEUE, IN_FLIGHT))?;
        Ok(Bench {
            programs,
            seconds,
            _server: server,
        })
    }

    pub(crate) fn measure(&self, metric: Metric, peer: Peer) -> Result<f64> {
        Ok(match metric {
            ServerPrefetch1 => self.server_load(peer, 1)?.rate(),
            ServerPrefetch64 => self.server_load(peer, IN_FLIGHT)?.rate(),
            Client => self.timed_load(peer, QUEUE, IN_FLIGHT)?.rate(),
            Latency => self.timed_load(peer, QUEUE, 1)?.p50_us,
            Cold => self.start_to_exit_ms(peer)?,
            Memory => peak_memory(&self.call_once(peer), b"")?.1,
        })
    }

    /// The load of a server; the client is the same for all servers.
    fn server_load(&self, peer: Peer, prefetch: u16) -> Result<Load> {
        let queue = format!("bench.{peer}.{prefetch}");
        let _server = Server::start(&self.programs.server(peer, &queue, prefetch))?;
        self.timed_load(Peer::C, &queue, IN_FLIGHT)
    }

    /// The load for the duration of a measurement. Two shorter ones before it determine the number
    /// of calls, and are the warm-up.
    pub(crate) fn timed_load(&self, peer: Peer, queue: &str, in_flight: u16) -> Result<Load> {
        let mut calls = 200;
        for share in [0.15, 1.0] {
            let rate = self.load(peer, queue, in_flight, calls)?.rate();
            calls = calls.max(whole_calls(rate * self.seconds * share));
        }
        self.load(peer, queue, in_flight, calls)
    }

    pub(crate) fn load(&self, peer: Peer, queue: &str, in_flight: u16, calls: u64) -> Result<Load> {
        let client = self.calls(peer, queue, in_flight, calls);
        // The peers print no answers here, so ours go to /dev/null.
        let to_null = ["sh", "-c", "exec \"$@\" >/dev/null", "sh"];
        Load::run(
            if peer == Peer::Ours {
                wrap(&to_null, &client)
            } else {
                client
            },
            peer,
        )
    }

    pub(crate) fn calls(&self, peer: Peer, queue: &str, in_flight: u16, calls: u64) -> Command {
        let mut client = self.programs.client(peer, queue, in_flight, calls);
        client.arg(N);
        client
    }

    /// The command that makes one call, as a script does.
    pub(crate) fn call_once(&self, peer: Peer) -> Command {
        let mut client = self.programs.program(peer, "client", QUEUE);
        client.arg(N);
        client
    }

    /// The median time in ms from the start of a client to its exit, of at least five.
    fn start_to_exit_ms(&self, peer: Peer) -> Result<f64> {
        let mut samples = Vec::new();
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < self.seconds / 2.0 || samples.len() < 5 {
            let command = self.call_once(peer);
            let start = Instant::now();
            let output = run(command, b"")?;
            samples.push(start.elapsed().as_secs_f64() * 1e3);
            ensure!(
                output.stdout.trim() == FIB_OF_N,
                "a wrong answer: {}",
                output.stdout
            );
        }
        Ok(Spread::of(&samples).context("at least five")?.median)
    }
}

/// Runs a client to its end, and returns its output and its peak memory in MiB.
///
/// `time` starts the client, because a process inherits the peak memory of the process that spawns
/// it: `time` uses less memory than any client, this process uses more.
pub(crate) fn peak_memory(client: &Command, stdin: &[u8]) -> Result<(Output, f64)> {
    let output = run(wrap(&["/usr/bin/time", "-f", "%M"], client), stdin)?;
    let kib: Option<f64> = output
        .stderr
        .lines()
        .last()
        .and_then(|line| line.parse().ok());
    let mib = kib.context("time prints KiB")? / 1024.0;
    Ok((output, mib))
}

/// The samples of all rounds, by metric and peer.
#[derive(Default)]
pub(crate) struct Results(BTreeMap<(Metric, Peer), Vec<f64>>);

impl Results {
    pub(crate) fn record(&mut self, metric: Metric, peer: Peer, sample: f64) {
        self.0.entry((metric, peer)).or_default().push(sample);
    }

    fn samples(&self, metric: Metric, peer: Peer) -> &[f64] {
        self.0.get(&(metric, peer)).map_or(&[], Vec::as_slice)
    }

    /// None if the peer was not measured.
    pub(crate) fn spread(&self, metric: Metric, peer: Peer) -> Option<Spread> {
        Spread::of(self.samples(metric, peer))
    }

    /// How many times better ours is than C in the same round.
    pub(crate) fn ratio(&self, metric: Metric) -> Option<Spread> {
        let ours = self.samples(metric, Peer::Ours);
        let ratios = ours
            .iter()
            .zip(self.samples(metric, Peer::C))
            .map(|(ours, c)| {
                if metric.higher_is_better() {
                    ours / c
                } else {
                    c / ours
                }
            });
        Spread::of(&ratios.collect::<Vec<f64>>())
    }
}
