//! What is promised beyond the peers: slow functions, large answers, long batches; and how many
//! instructions a call costs, a figure that other programs on the machine do not touch.

use crate::figures::{peak_memory, Bench, Figure, Load, Results, IN_FLIGHT, QUEUE};
use crate::peers::Peer;
use crate::process::{behind, run, Server};
use crate::report::{number, range};
use crate::statistics::{whole, Spread};
use anyhow::{ensure, Context, Result};
use std::process::{self, Command};
use std::{env, fs};

/// How long the slow function takes, and how many calls of it a worker has done in a second at best.
const DELAY: &str = "10ms";
const IDEAL: f64 = 100.0;

/// The largest n that is served, and how often it is asked for.
const LARGEST_N: &str = "1000000";
const REPEAT: u64 = 20;

/// How many calls are counted under valgrind, beyond as many others.
const COUNTED: u32 = 1_000;

/// What was measured, in rows: a figure, and what to compare it with.
#[derive(Default)]
pub(crate) struct Beyond(Vec<Row>);

struct Row {
    what: String,
    unit: &'static str,
    samples: Vec<f64>,
    beside: Vec<f64>,
    of: &'static str,
}

impl Beyond {
    /// Adds a sample, and beside it what it is of something else.
    fn record(&mut self, what: &str, figure: (f64, &'static str), beside: (f64, &'static str)) {
        let row = self.0.iter().position(|row| row.what == what).unwrap_or_else(|| {
            let (what, unit, of) = (what.into(), figure.1, beside.1);
            self.0.push(Row { what, unit, samples: Vec::new(), beside: Vec::new(), of });
            self.0.len() - 1
        });
        self.0[row].samples.push(figure.0);
        self.0[row].beside.push(beside.0);
    }

    pub(crate) fn rows(&self) -> Vec<Vec<String>> {
        let range = |samples: &[f64]| Spread::of(samples).map(range).unwrap_or_default();
        let cells = |row: &Row| {
            let figure = format!("{} {}", range(&row.samples), row.unit);
            vec![row.what.clone(), figure, format!("{} {}", range(&row.beside), row.of)]
        };
        self.0.iter().map(cells).collect()
    }

    pub(crate) fn measure_round(&mut self, bench: &Bench) -> Result<()> {
        let one = bench.slow_calls(1, 1)?;
        for workers in [1, 4, 16, 64] {
            let rate = if workers == 1 { one } else { bench.slow_calls(1, workers)? };
            let share = rate / (f64::from(workers) * IDEAL);
            let what = format!("each call takes {DELAY}, --workers {workers}");
            self.record(&what, (rate, "calls/s"), (share, "of the ideal"));
        }
        let four = bench.slow_calls(4, 1)?;
        let what = format!("each call takes {DELAY}, four servers");
        self.record(&what, (four, "calls/s"), (four / one, "times one server's"));
        let client = bench.steady(Peer::Ours, QUEUE, IN_FLIGHT)?;
        let (batch, _) = bench.batch_from_stdin(client.calls)?;
        let what = "numbers from standard input, answers into a pipe, 64 in flight";
        let share = batch.rate() / client.rate();
        self.record(what, (batch.rate(), "calls/s"), (share, "of --repeat right before"));
        let c = bench.promising(IN_FLIGHT, client.calls)?;
        let what = "C's client, if its requests promised what ours do, 64 in flight";
        let ratio = client.rate() / c.rate();
        self.record(what, (c.rate(), "calls/s"), (ratio, "ours to that, right before"));
        let client = bench.steady(Peer::Ours, QUEUE, 1)?;
        let c = bench.promising(1, client.calls)?;
        let what = "the same one after the other, p50";
        let ratio = c.p50_us / client.p50_us;
        self.record(what, (c.p50_us, "µs"), (ratio, "ours to that, right before"));
        let (ours, gmp) = bench.largest_n()?;
        let what = format!("fib({LARGEST_N}), a whole call, p50");
        self.record(&what, (ours, "ms"), (ours / gmp, "times GMP alone"));
        Ok(())
    }

    pub(crate) fn measure_once(
        &mut self,
        bench: &Bench,
        calls: f64,
        results: &Results,
    ) -> Result<()> {
        let (load, memory) = bench.batch_from_stdin(calls)?;
        let one = results.spread(Figure::Memory, Peer::Ours).map_or(f64::NAN, |one| one.median);
        let what = format!("peak memory of {} of them, {:.0} s", number(load.calls), load.seconds);
        self.record(&what, (memory, "MiB"), (memory / one, "times that of one call"));

        let cold = |peer| instructions(&bench.call_once(peer));
        let in_client = |peer| bench.instructions_of_client(peer);
        let in_server = |peer| bench.instructions_of_server(peer);
        let mut record = |what, ours, c| self.record(what, (ours, "instructions"), (c, "in C"));
        record("one cold call of the client, whole process", cold(Peer::Ours)?, cold(Peer::C)?);
        record("a further call, in the client", in_client(Peer::Ours)?, in_client(Peer::C)?);
        record("a further call, in the server", in_server(Peer::Ours)?, in_server(Peer::C)?);
        Ok(())
    }
}

impl Bench<'_> {
    /// How many calls/s some servers reach together, whose function is slow.
    fn slow_calls(&self, servers: u16, workers: u16) -> Result<f64> {
        let queue = format!("bench.slow.{servers}.{workers}");
        let mut command = self.programs.server(Peer::Ours, &queue, 1);
        command.args(["--workers", &workers.to_string(), "--delay", DELAY]);
        let started = (0..servers).map(|_| Server::start(&command));
        let _servers = started.collect::<Result<Vec<Server>>>()?;
        // Whole turns of all workers, so that none idles at the end; and two turns in flight, so that a
        // request is at hand for each that gets free.
        let turn = u64::from(servers) * u64::from(workers);
        let turns = whole(self.seconds * IDEAL);
        let load = |calls| self.load(Peer::C, &queue, 2 * servers * workers, calls);
        load(turn)?; // the warm-up
        Ok(load(turn * turns.max(10))?.rate())
    }

    /// The median time in ms of a call for the largest n, and of GMP to compute and print it.
    fn largest_n(&self) -> Result<(f64, f64)> {
        let queue = "bench.largest";
        let _server = Server::start(&self.programs.server(Peer::Ours, queue, 1))?;
        let mut client = self.programs.client(Peer::Ours, queue, 1, REPEAT);
        client.arg(LARGEST_N);
        let ours = Load::of(client, Peer::Ours)?.p50_us / 1e3;
        let mut gmp = Command::new(self.programs.built.join("c-fib"));
        gmp.args([LARGEST_N, &REPEAT.to_string()]);
        Ok((ours, run(gmp, b"")?.stdout.trim().parse()?))
    }

    /// The load of the C client with requests that are mandatory and persistent and expire, as ours are: what
    /// that costs, it costs the broker.
    fn promising(&self, in_flight: u16, calls: f64) -> Result<Load> {
        let mut client = self.calls(Peer::C, QUEUE, in_flight, whole(calls));
        client.env("RPC_PROMISES", "1");
        Load::of(client, Peer::C)
    }

    /// A long batch, and the peak memory in MiB of the client.
    fn batch_from_stdin(&self, calls: f64) -> Result<(Load, f64)> {
        let calls = usize::try_from(whole(calls))?;
        let mut client = self.programs.client(Peer::Ours, QUEUE, IN_FLIGHT, 1);
        client.arg("-");
        let (output, memory) = peak_memory(&client, &b"30\n".repeat(calls))?;
        ensure!(output.stdout.lines().count() == calls, "not a line for each call");
        Ok((Load::read(&output, Peer::Ours)?, memory))
    }

    fn instructions_of_client(&self, peer: Peer) -> Result<f64> {
        per_call(|calls| instructions(&self.calls(peer, QUEUE, 1, calls)))
    }

    fn instructions_of_server(&self, peer: Peer) -> Result<f64> {
        let queue = format!("bench.counted.{peer}");
        per_call(|calls| {
            let log = Log::new();
            let server = Server::start(&log.counted(&self.programs.server(peer, &queue, 1)))?;
            self.load(Peer::C, &queue, 1, calls)?;
            server.stop()?;
            log.read()
        })
    }
}

/// What a call costs beyond the start and the end. One after the other: how many calls share a read or a
/// write is left to chance otherwise.
fn per_call(count: impl Fn(u64) -> Result<f64>) -> Result<f64> {
    Ok((count(u64::from(COUNTED) * 2)? - count(COUNTED.into())?) / f64::from(COUNTED))
}

/// How many instructions a program needs from its start to its end.
fn instructions(command: &Command) -> Result<f64> {
    let log = Log::new();
    run(log.counted(command), b"")?;
    log.read()
}

/// The file that valgrind tells its count in, apart from what the program itself says.
struct Log(String);

impl Log {
    fn new() -> Self {
        let name = format!("rpc-benches-{}.callgrind", process::id());
        Log(env::temp_dir().join(name).display().to_string())
    }

    /// The command, with its instructions counted.
    fn counted(&self, command: &Command) -> Command {
        let log = format!("--log-file={}", self.0);
        behind(&["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", &log], command)
    }

    fn read(&self) -> Result<f64> {
        let text = fs::read_to_string(&self.0)?;
        let count = text.lines().find_map(|line| line.split_once("Collected : "));
        let (_, count) = count.with_context(|| format!("valgrind counted nothing: {text}"))?;
        Ok(count.trim().parse()?)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // it may never have been written
    }
}
