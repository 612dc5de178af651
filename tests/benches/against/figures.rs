//! What is measured of every peer, and what came out.

use crate::peers::{Peer, Programs};
use crate::process::{behind, run, Output, Server};
use crate::statistics::Spread;
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

/// How many calls are outstanding at once, where it is not one after the other.
const IN_FLIGHT: u16 = 64;

/// Each call is fib(30), which costs every peer nothing: it is the calls that are measured.
const N: &str = "30";
const FIB_OF_N: &str = "832040";

/// A **figure** is what is measured of every peer, a row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Figure {
    ServerByOne,
    ServerByMany,
    Client,
    Latency,
    Cold,
    Memory,
}

impl Figure {
    pub(crate) const ALL: [Figure; 6] = [
        Figure::ServerByOne,
        Figure::ServerByMany,
        Figure::Client,
        Figure::Latency,
        Figure::Cold,
        Figure::Memory,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Figure::ServerByOne => "server, prefetch 1, 64 in flight",
            Figure::ServerByMany => "server, prefetch 64, 64 in flight",
            Figure::Client => "client, 64 in flight",
            Figure::Latency => "client, one after the other, p50",
            Figure::Cold => "client, one cold call, whole process",
            Figure::Memory => "client, one call, peak memory",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Figure::ServerByOne | Figure::ServerByMany | Figure::Client => "calls/s",
            Figure::Latency => "µs",
            Figure::Cold => "ms",
            Figure::Memory => "MiB",
        }
    }

    pub(crate) fn more_is_better(self) -> bool {
        !matches!(self, Figure::Latency | Figure::Cold | Figure::Memory)
    }
}

/// What the measurements are made with.
pub(crate) struct Bench<'a> {
    pub(crate) programs: &'a Programs,
    url: &'a str,
    /// How long one measurement takes.
    pub(crate) seconds: f64,
    /// The server that all clients call.
    _server: Server,
}

/// The queue of the server that all clients call.
pub(crate) const QUEUE: &str = "bench.clients";

/// A **load** is many calls of one client, and how long they took.
pub(crate) struct Load {
    pub(crate) calls: f64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
}

impl Load {
    pub(crate) fn rate(&self) -> f64 {
        self.calls / self.seconds
    }

    /// Reads the line that a peer's client prints.
    fn of_peer(output: &Output) -> Option<Self> {
        let fields = output.stdout.split_whitespace().map(|field| field.parse().ok());
        let [calls, seconds, p50_us] = fields.collect::<Option<Vec<f64>>>()?.try_into().ok()?;
        Some(Load { calls, seconds, p50_us })
    }

    /// Reads the summary of `rpc-client`; none that tells of errors.
    pub(crate) fn of_ours(output: &Output) -> Option<Self> {
        let summary: serde_json::Value =
            serde_json::from_str(output.stderr.lines().next()?).ok()?;
        let number = |pointer| summary.pointer(pointer)?.as_f64();
        summary.get("errors")?.as_object()?.is_empty().then_some(())?;
        let p50_us = number("/latency_ms/p50")? * 1e3;
        Some(Load { calls: number("/calls")?, seconds: number("/seconds")?, p50_us })
    }
}

impl<'a> Bench<'a> {
    pub(crate) fn new(programs: &'a Programs, url: &'a str, seconds: f64) -> Result<Self> {
        let server = Server::start(&server(programs, url, Peer::C, QUEUE, IN_FLIGHT))?;
        Ok(Bench { programs, url, seconds, _server: server })
    }

    pub(crate) fn measure(&self, figure: Figure, peer: Peer) -> Result<f64> {
        Ok(match figure {
            Figure::ServerByOne => self.serve(peer, 1)?.rate(),
            Figure::ServerByMany => self.serve(peer, IN_FLIGHT)?.rate(),
            Figure::Client => self.steady(|calls| self.load(peer, QUEUE, IN_FLIGHT, calls))?.rate(),
            Figure::Latency => self.steady(|calls| self.load(peer, QUEUE, 1, calls))?.p50_us,
            Figure::Cold => self.cold(peer)?,
            Figure::Memory => peak_memory(&self.call_once(peer), b"")?.1,
        })
    }

    /// The load that a server bears; the client is the same for all.
    fn serve(&self, peer: Peer, prefetch: u16) -> Result<Load> {
        let queue = format!("bench.{peer}.{prefetch}");
        let _server = Server::start(&self.server(peer, &queue, prefetch))?;
        self.steady(|calls| self.load(Peer::C, &queue, IN_FLIGHT, calls))
    }

    /// Two short loads tell how many calls fill the time of a measurement. They are the warm-up, too.
    fn steady(&self, load: impl Fn(u64) -> Result<Load>) -> Result<Load> {
        let mut calls = 200;
        for share in [0.15, 1.0] {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // millions at most
            let scaled = (load(calls)?.rate() * self.seconds * share) as u64;
            calls = scaled.max(calls);
        }
        load(calls)
    }

    /// The median time, in ms, from the start of a client to its end, of at least five.
    fn cold(&self, peer: Peer) -> Result<f64> {
        let mut samples = Vec::new();
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < self.seconds || samples.len() < 5 {
            let command = self.call_once(peer);
            let start = Instant::now();
            let output = run(command, b"")?;
            samples.push(start.elapsed().as_secs_f64() * 1e3);
            ensure!(output.stdout.trim() == FIB_OF_N, "a wrong answer: {}", output.stdout);
        }
        Ok(Spread::of(&samples).context("at least five")?.median)
    }

    pub(crate) fn load(&self, peer: Peer, queue: &str, in_flight: u16, calls: u64) -> Result<Load> {
        let output = run(self.client(peer, queue, in_flight, calls), b"")?;
        let load = if peer == Peer::Ours { Load::of_ours(&output) } else { Load::of_peer(&output) };
        load.with_context(|| format!("no figures, or errors: {}{}", output.stdout, output.stderr))
    }

    pub(crate) fn server(&self, peer: Peer, queue: &str, prefetch: u16) -> Command {
        server(self.programs, self.url, peer, queue, prefetch)
    }

    /// The client that calls as often as that, and tells how long it took.
    pub(crate) fn client(&self, peer: Peer, queue: &str, in_flight: u16, calls: u64) -> Command {
        if peer == Peer::Ours {
            let mut client = self.our_batch(queue, in_flight);
            client.args(["--repeat", &calls.to_string(), N]);
            return client;
        }
        let mut client = self.programs.program(peer, "client");
        client.env("AMQP_URL", self.url).env("RPC_QUEUE", queue).arg(N);
        client.env("RPC_IN_FLIGHT", in_flight.to_string()).env("RPC_REPEAT", calls.to_string());
        client
    }

    /// `rpc-client` without its numbers, which tells how long they took.
    pub(crate) fn our_batch(&self, queue: &str, in_flight: u16) -> Command {
        let mut client = self.programs.ours("rpc-client");
        client.env("AMQP_URL", self.url).args(["--queue", queue, "--quiet", "--summary=json"]);
        client.args(["-o", "raw", "-j", &in_flight.to_string()]);
        client
    }

    /// The client as a script calls it.
    pub(crate) fn call_once(&self, peer: Peer) -> Command {
        let mut client = self.programs.program(peer, "client");
        if peer == Peer::Ours {
            client.args(["--queue", QUEUE]);
        }
        client.env("AMQP_URL", self.url).env("RPC_QUEUE", QUEUE).arg(N);
        client
    }
}

/// Runs a client to its end, and tells its peak memory in MiB.
///
/// By `time`, because a process begins with the peak of the one that it was spawned from: `time` is smaller
/// than any of the clients, and we are larger.
pub(crate) fn peak_memory(client: &Command, stdin: &[u8]) -> Result<(Output, f64)> {
    let output = run(behind(&["/usr/bin/time", "-f", "%M"], client), stdin)?;
    let kib: Option<f64> = output.stderr.lines().last().and_then(|line| line.parse().ok());
    let mib = kib.context("time tells KiB")? / 1024.0;
    Ok((output, mib))
}

fn server(programs: &Programs, url: &str, peer: Peer, queue: &str, prefetch: u16) -> Command {
    let mut server = programs.program(peer, "server");
    let prefetch = prefetch.to_string();
    server.env("AMQP_URL", url);
    if peer == Peer::Ours {
        server.env("RUST_LOG", "warn").args(["--quiet", "--queue", queue, "--prefetch", &prefetch]);
    } else {
        server.env("RPC_QUEUE", queue).env("RPC_PREFETCH", prefetch).env("RPC_QUIET", "1");
    }
    server
}

/// The samples of all rounds.
#[derive(Default)]
pub(crate) struct Results(BTreeMap<(Figure, Peer), Vec<f64>>);

impl Results {
    pub(crate) fn record(&mut self, figure: Figure, peer: Peer, sample: f64) {
        self.0.entry((figure, peer)).or_default().push(sample);
    }

    fn samples(&self, figure: Figure, peer: Peer) -> &[f64] {
        self.0.get(&(figure, peer)).map_or(&[], Vec::as_slice)
    }

    /// None of a peer that was not measured.
    pub(crate) fn spread(&self, figure: Figure, peer: Peer) -> Option<Spread> {
        Spread::of(self.samples(figure, peer))
    }

    /// How many times better ours are than C, round by round.
    pub(crate) fn ratio(&self, figure: Figure) -> Option<Spread> {
        let pairs = self.samples(figure, Peer::Ours).iter().zip(self.samples(figure, Peer::C));
        let ratio = |(ours, c): (&f64, &f64)| {
            if figure.more_is_better() {
                ours / c
            } else {
                c / ours
            }
        };
        Spread::of(&pairs.map(ratio).collect::<Vec<f64>>())
    }
}
