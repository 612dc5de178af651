//! Metrics that the peers do not have: slow functions, large answers, long batches. And the
//! instructions per call, which other programs on the machine do not influence.

use crate::metrics::{peak_memory, Bench, Load, Metric, Results, IN_FLIGHT, QUEUE};
use crate::peers::Peer;
use crate::process::{run, wrap, Server};
use crate::report::{number, range};
use crate::statistics::{whole_calls, Spread};
use anyhow::{ensure, Context, Result};
use std::process::{self, Command};
use std::{env, fs};

/// How long a call of the slow function takes.
const DELAY: &str = "10ms";
/// The calls/s of one worker with that delay and nothing else.
const IDEAL_RATE: f64 = 100.0;

/// The largest n that rpc-server serves by default, and how many calls for it are measured.
const LARGEST_N: &str = "1000000";
const REPEAT: u64 = 20;

/// Instructions are counted of this many calls, and of twice as many; the difference is what
/// further calls cost.
const COUNTED_CALLS: u32 = 1_000;

/// The table of our own metrics.
#[derive(Default)]
pub(crate) struct OwnMetrics(Vec<Row>);

/// A row of the table: what was measured, and values that compare it with something else.
struct Row {
    what: String,
    unit: &'static str,
    samples: Vec<f64>,
    compared: Vec<f64>,
    comparison: &'static str,
}

impl OwnMetrics {
    /// Adds a sample with its unit, and a value that compares it with something else.
    fn record(&mut self, what: &str, sample: (f64, &'static str), compared: (f64, &'static str)) {
        let row = self
            .0
            .iter()
            .position(|row| row.what == what)
            .unwrap_or_else(|| {
                let what = what.into();
                let unit = sample.1;
                let comparison = compared.1;
                let samples = Vec::new();
                let compared = Vec::new();
                self.0.push(Row {
                    what,
                    unit,
                    samples,
                    compared,
                    comparison,
                });
                self.0.len() - 1
            });
        self.0[row].samples.push(sample.0);
        self.0[row].compared.push(compared.0);
    }

    pub(crate) fn rows(&self) -> Vec<Vec<String>> {
        let range = |samples: &[f64]| Spread::of(samples).map(range).unwrap_or_default();
        let cells = |row: &Row| {
            let sample = format!("{} {}", range(&row.samples), row.unit);
            let compared = format!("{} {}", range(&row.compared), row.comparison);
            vec![row.what.clone(), sample, compared]
        };
        self.0.iter().map(cells).collect()
    }

    pub(crate) fn measure_round(&mut self, bench: &Bench) -> Result<()> {
        let one = bench.slow_calls(1, 1)?;
        for workers in [1, 4, 16, 64] {
            let rate = if workers == 1 {
                one
            } else {
                bench.slow_calls(1, workers)?
            };
            let share = rate / (f64::from(workers) * IDEAL_RATE);
            let what = format!("each call takes {DELAY}, --workers {workers}");
            self.record(&what, (rate, "calls/s"), (share, "of the ideal"));
        }
        let four = bench.slow_calls(4, 1)?;
        let what = format!("each call takes {DELAY}, four servers");
        self.record(&what, (four, "calls/s"), (four / one, "times one server"));
        let client = bench.timed_load(Peer::Ours, QUEUE, IN_FLIGHT)?;
        let (batch, _) = bench.batch_from_stdin(client.calls)?;
        let what = "numbers from standard input to a pipe, 64 in flight";
        let share = batch.rate() / client.rate();
        self.record(
            what,
            (batch.rate(), "calls/s"),
            (share, "times --repeat just before"),
        );
        let c = bench.load_with_our_properties(IN_FLIGHT, client.calls)?;
        let what = "C client with the request properties and confirms of rpc-client, 64 in flight";
        let ratio = client.rate() / c.rate();
        self.record(
            what,
            (c.rate(), "calls/s"),
            (ratio, "ours vs C, measured just before"),
        );
        let client = bench.timed_load(Peer::Ours, QUEUE, 1)?;
        let c = bench.load_with_our_properties(1, client.calls)?;
        let what = "the same, one call at a time, p50";
        let ratio = c.p50_us / client.p50_us;
        self.record(
            what,
            (c.p50_us, "µs"),
            (ratio, "ours vs C, measured just before"),
        );
        for in_flight in [1, IN_FLIGHT] {
            let what = format!("context switches of the client per call, {in_flight} in flight");
            let [ours, c] =
                [Peer::Ours, Peer::C].map(|peer| bench.switches_of_client(peer, in_flight));
            self.record(&what, (ours?, "switches"), (c?, "in C"));
        }
        for prefetch in [1, IN_FLIGHT] {
            let what = format!("context switches of the server per call, prefetch {prefetch}");
            let [ours, c] =
                [Peer::Ours, Peer::C].map(|peer| bench.switches_of_server(peer, prefetch));
            self.record(&what, (ours?, "switches"), (c?, "in C"));
        }
        let (ours, gmp) = bench.largest_n()?;
        let what = format!("a call of fib({LARGEST_N}), p50");
        self.record(
            &what,
            (ours, "ms"),
            (ours / gmp, "times GMP without a call"),
        );
        Ok(())
    }

    pub(crate) fn measure_once(
        &mut self,
        bench: &Bench,
        calls: f64,
        results: &Results,
    ) -> Result<()> {
        let (load, memory) = bench.batch_from_stdin(calls)?;
        let one = results
            .spread(Metric::Memory, Peer::Ours)
            .map_or(f64::NAN, |one| one.median);
        let what = format!(
            "peak memory of {} calls from standard input, {:.0} s",
            number(load.calls),
            load.seconds
        );
        self.record(
            &what,
            (memory, "MiB"),
            (memory / one, "times the memory of one call"),
        );

        let cold = |peer| instructions(&bench.call_once(peer));
        let in_client = |peer| bench.instructions_of_client(peer);
        let in_server = |peer| bench.instructions_of_server(peer);
        let mut record = |what, ours, c| self.record(what, (ours, "instructions"), (c, "in C"));
        record(
            "client, one call from start to exit",
            cold(Peer::Ours)?,
            cold(Peer::C)?,
        );
        record(
            "client, each further call",
            in_client(Peer::Ours)?,
            in_client(Peer::C)?,
        );
        record(
            "server, each further call",
            in_server(Peer::Ours)?,
            in_server(Peer::C)?,
        );
        Ok(())
    }
}

impl Bench<'_> {
    /// The calls/s of servers together, with the slow function.
    fn slow_calls(&self, servers: u16, workers: u16) -> Result<f64> {
        let queue = format!("bench.slow.{servers}.{workers}");
        let mut command = self.programs.server(Peer::Ours, &queue, 1);
        command.args(["--workers", &workers.to_string(), "--delay", DELAY]);
        let started = (0..servers).map(|_| Server::start(&command));
        let _servers = started.collect::<Result<Vec<Server>>>()?;
        // In each round every worker serves one call. Whole rounds, so that no worker is idle at
        // the end; and two rounds in flight, so that the next request is there when a worker is
        // free.
        let round = u64::from(servers) * u64::from(workers);
        let rounds = whole_calls(self.seconds * IDEAL_RATE);
        let load = |calls| self.load(Peer::C, &queue, 2 * servers * workers, calls);
        load(round)?; // the warm-up
        Ok(load(round * rounds.max(10))?.rate())
    }

    /// The median time in ms of a call for the largest n, and of GMP for the same number as text.
    fn largest_n(&self) -> Result<(f64, f64)> {
        let queue = "bench.largest";
        let _server = Server::start(&self.programs.server(Peer::Ours, queue, 1))?;
        let mut client = self.programs.client(Peer::Ours, queue, 1, REPEAT);
        client.arg(LARGEST_N);
        let ours = Load::run(client, Peer::Ours)?.p50_us / 1e3;
        let mut gmp = Command::new(self.programs.built.join("c-fib"));
        gmp.args([LARGEST_N, &REPEAT.to_string()]);
        Ok((ours, run(gmp, b"")?.stdout.trim().parse()?))
    }

    /// The load of the C client with requests that are mandatory, persistent, expire and are
    /// confirmed, like those of rpc-client. That costs time in the broker.
    fn load_with_our_properties(&self, in_flight: u16, calls: f64) -> Result<Load> {
        let mut client = self.calls(Peer::C, QUEUE, in_flight, whole_calls(calls));
        client.env("RPC_CLIENT_PROPERTIES", "1");
        Load::run(client, Peer::C)
    }

    /// The load of a batch of our client from standard input, and the client's peak memory in MiB.
    fn batch_from_stdin(&self, calls: f64) -> Result<(Load, f64)> {
        let calls = usize::try_from(whole_calls(calls))?;
        let mut client = self.programs.client(Peer::Ours, QUEUE, IN_FLIGHT, 1);
        client.arg("-");
        let (output, memory) = peak_memory(&client, &b"30\n".repeat(calls))?;
        ensure!(
            output.stdout.lines().count() == calls,
            "the number of lines is not the number of calls"
        );
        Ok((Load::parse(&output, Peer::Ours)?, memory))
    }

    /// The voluntary context switches of a client per call, which other programs on the machine do
    /// not influence.
    fn switches_of_client(&self, peer: Peer, in_flight: u16) -> Result<f64> {
        let factor = u64::from(in_flight); // many calls share a switch
        let switches = per_call(|calls| {
            let calls = calls * factor;
            let to_null = ["sh", "-c", "exec \"$@\" >/dev/null", "sh"];
            let counted = wrap(
                &["/usr/bin/time", "-f", "%w"],
                &wrap(&to_null, &self.calls(peer, QUEUE, in_flight, calls)),
            );
            let output = run(counted, b"")?;
            let count = output
                .stderr
                .lines()
                .last()
                .and_then(|line| line.parse().ok());
            count.context("time prints the context switches")
        })?;
        Ok(switches / f64::from(in_flight))
    }

    /// The same of a server, with 64 calls in flight.
    fn switches_of_server(&self, peer: Peer, prefetch: u16) -> Result<f64> {
        let queue = format!("bench.switches.{peer}.{prefetch}");
        let server = Server::start(&self.programs.server(peer, &queue, prefetch))?;
        self.load(Peer::C, &queue, IN_FLIGHT, u64::from(COUNTED_CALLS))?; // the warm-up
        let before = server.context_switches()?;
        let calls = 10 * COUNTED_CALLS;
        self.load(Peer::C, &queue, IN_FLIGHT, calls.into())?;
        Ok((server.context_switches()? - before) / f64::from(calls))
    }

    fn instructions_of_client(&self, peer: Peer) -> Result<f64> {
        per_call(|calls| instructions(&self.calls(peer, QUEUE, 1, calls)))
    }

    fn instructions_of_server(&self, peer: Peer) -> Result<f64> {
        let queue = format!("bench.counted.{peer}");
        per_call(|calls| {
            let log = CallgrindLog::new();
            let server =
                Server::start(&log.count_instructions(&self.programs.server(peer, &queue, 1)))?;
            self.load(Peer::C, &queue, 1, calls)?;
            server.stop()?;
            log.read()
        })
    }
}

/// The instructions of a further call, without those of start and exit. The calls run one at a
/// time, because otherwise it varies how many calls share a read or a write.
fn per_call(count: impl Fn(u64) -> Result<f64>) -> Result<f64> {
    Ok(
        (count(u64::from(COUNTED_CALLS) * 2)? - count(COUNTED_CALLS.into())?)
            / f64::from(COUNTED_CALLS),
    )
}

/// The instructions of a program from its start to its exit.
fn instructions(command: &Command) -> Result<f64> {
    let log = CallgrindLog::new();
    run(log.count_instructions(command), b"")?;
    log.read()
}

/// The log file of valgrind, which has the number of instructions.
struct CallgrindLog(String);

impl CallgrindLog {
    fn new() -> Self {
        let name = format!("rpc-benches-{}.callgrind", process::id());
        CallgrindLog(env::temp_dir().join(name).display().to_string())
    }

    /// The command that runs `command` and counts its instructions.
    fn count_instructions(&self, command: &Command) -> Command {
        let log = format!("--log-file={}", self.0);
        wrap(
            &[
                "valgrind",
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                &log,
            ],
            command,
        )
    }

    fn read(&self) -> Result<f64> {
        let text = fs::read_to_string(&self.0)?;
        let count = text
            .lines()
            .find_map(|line| line.split_once("Collected : "));
        let (_, count) =
            count.with_context(|| format!("no count in the log of valgrind: {text}"))?;
        Ok(count.trim().parse()?)
    }
}

impl Drop for CallgrindLog {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // fails if it was never written
    }
}
