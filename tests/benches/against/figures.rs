//! What is measured of every peer, and what came out.

use crate::peers::{Peer, Programs};
use crate::process::{behind, run, Output, Server};
use crate::statistics::{whole, Spread};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

/// How many calls are outstanding at once, where it is not one after the other.
pub(crate) const IN_FLIGHT: u16 = 64;

/// Each call is fib(30), which costs nobody anything: it is the calls that are measured.
const N: &str = "30";
const FIB_OF_N: &str = "832040";

/// The queue of the server that all clients call.
pub(crate) const QUEUE: &str = "bench.clients";

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

use Figure::{Client, Cold, Latency, Memory, ServerByMany, ServerByOne};

impl Figure {
    pub(crate) const ALL: [Figure; 6] = [ServerByOne, ServerByMany, Client, Latency, Cold, Memory];

    pub(crate) fn title(self) -> &'static str {
        match self {
            ServerByOne => "server, prefetch 1, 64 in flight",
            ServerByMany => "server, prefetch 64, 64 in flight",
            Client => "client, 64 in flight",
            Latency => "client, one after the other, p50",
            Cold => "client, one cold call, whole process",
            Memory => "client, one call, peak memory",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            ServerByOne | ServerByMany | Client => "calls/s",
            Latency => "µs",
            Cold => "ms",
            Memory => "MiB",
        }
    }

    pub(crate) fn more_is_better(self) -> bool {
        matches!(self, ServerByOne | ServerByMany | Client)
    }
}

/// A **load** is many calls of one client, and how long they took.
pub(crate) struct Load {
    pub(crate) calls: f64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
}

impl Load {
    /// Runs a client of [`Programs::client`].
    pub(crate) fn of(client: Command, peer: Peer) -> Result<Self> {
        Load::read(&run(client, b"")?, peer)
    }

    /// Reads what it has told.
    pub(crate) fn read(told: &Output, peer: Peer) -> Result<Self> {
        let load = if peer == Peer::Ours { Load::of_ours(told) } else { Load::of_peer(told) };
        load.with_context(|| format!("no figures, or errors: {}{}", told.stdout, told.stderr))
    }

    fn of_peer(told: &Output) -> Option<Self> {
        let fields = told.stdout.split_whitespace().map(|field| field.parse().ok());
        let [calls, seconds, p50_us] = fields.collect::<Option<Vec<f64>>>()?.try_into().ok()?;
        Some(Load { calls, seconds, p50_us })
    }

    /// None of a summary that tells of errors.
    fn of_ours(told: &Output) -> Option<Self> {
        let summary: serde_json::Value = serde_json::from_str(told.stderr.lines().next()?).ok()?;
        let number = |pointer| summary.pointer(pointer)?.as_f64();
        summary.get("errors")?.as_object()?.is_empty().then_some(())?;
        let p50_us = number("/latency_ms/p50")? * 1e3;
        Some(Load { calls: number("/calls")?, seconds: number("/seconds")?, p50_us })
    }

    pub(crate) fn rate(&self) -> f64 {
        self.calls / self.seconds
    }
}

/// What the measurements are made with.
pub(crate) struct Bench<'a> {
    pub(crate) programs: &'a Programs<'a>,
    /// How long one measurement takes.
    pub(crate) seconds: f64,
    /// The server that all clients call.
    _server: Server,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(programs: &'a Programs, seconds: f64) -> Result<Self> {
        let server = Server::start(&programs.server(Peer::C, QUEUE, IN_FLIGHT))?;
        Ok(Bench { programs, seconds, _server: server })
    }

    pub(crate) fn measure(&self, figure: Figure, peer: Peer) -> Result<f64> {
        Ok(match figure {
            ServerByOne => self.serve(peer, 1)?.rate(),
            ServerByMany => self.serve(peer, IN_FLIGHT)?.rate(),
            Client => self.steady(peer, QUEUE, IN_FLIGHT)?.rate(),
            Latency => self.steady(peer, QUEUE, 1)?.p50_us,
            Cold => self.cold(peer)?,
            Memory => peak_memory(&self.call_once(peer), b"")?.1,
        })
    }

    /// The load that a server bears; the client is the same for all.
    fn serve(&self, peer: Peer, prefetch: u16) -> Result<Load> {
        let queue = format!("bench.{peer}.{prefetch}");
        let _server = Server::start(&self.programs.server(peer, &queue, prefetch))?;
        self.steady(Peer::C, &queue, IN_FLIGHT)
    }

    /// Two short loads tell how many calls fill the time of a measurement. They are the warm-up, too.
    pub(crate) fn steady(&self, peer: Peer, queue: &str, in_flight: u16) -> Result<Load> {
        let mut calls = 200;
        for share in [0.15, 1.0] {
            let rate = self.load(peer, queue, in_flight, calls)?.rate();
            calls = calls.max(whole(rate * self.seconds * share));
        }
        self.load(peer, queue, in_flight, calls)
    }

    pub(crate) fn load(&self, peer: Peer, queue: &str, in_flight: u16, calls: u64) -> Result<Load> {
        let client = self.calls(peer, queue, in_flight, calls);
        // The peers print no answers here; ours go nowhere.
        let nowhere = ["sh", "-c", "exec \"$@\" >/dev/null", "sh"];
        Load::of(if peer == Peer::Ours { behind(&nowhere, &client) } else { client }, peer)
    }

    pub(crate) fn calls(&self, peer: Peer, queue: &str, in_flight: u16, calls: u64) -> Command {
        let mut client = self.programs.client(peer, queue, in_flight, calls);
        client.arg(N);
        client
    }

    /// The client as a script calls it.
    pub(crate) fn call_once(&self, peer: Peer) -> Command {
        let mut client = self.programs.program(peer, "client", QUEUE);
        client.arg(N);
        client
    }

    /// The median time, in ms, from the start of a client to its end, of at least five.
    fn cold(&self, peer: Peer) -> Result<f64> {
        let mut samples = Vec::new();
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < self.seconds / 2.0 || samples.len() < 5 {
            let command = self.call_once(peer);
            let start = Instant::now();
            let output = run(command, b"")?;
            samples.push(start.elapsed().as_secs_f64() * 1e3);
            ensure!(output.stdout.trim() == FIB_OF_N, "a wrong answer: {}", output.stdout);
        }
        Ok(Spread::of(&samples).context("at least five")?.median)
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
        let ours = self.samples(figure, Peer::Ours);
        let ratios = ours.iter().zip(self.samples(figure, Peer::C)).map(|(ours, c)| {
            if figure.more_is_better() {
                ours / c
            } else {
                c / ours
            }
        });
        Spread::of(&ratios.collect::<Vec<f64>>())
    }
}
