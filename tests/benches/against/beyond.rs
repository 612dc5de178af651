//! What is promised beyond the peers: long batches, slow functions, large answers; and how many
//! instructions a call costs, a figure that other programs on the machine do not touch.

use crate::figures::{peak_memory, Bench, Load, QUEUE};
use crate::peers::Peer;
use crate::process::{behind, run, Server};
use crate::report::{number, range};
use crate::statistics::Spread;
use anyhow::{ensure, Context, Result};
use std::process::{self, Command};
use std::{env, fs};

const WORKERS: [u16; 4] = [1, 4, 16, 64];

/// How long the slow function takes, and how many calls of it a worker has done in a second at best.
const DELAY: &str = "10ms";
const IDEAL: f64 = 100.0;

/// The largest n that is served, and how often it is asked for.
const LARGEST_N: &str = "1000000";
const REPEAT: &str = "20";

/// How many calls are counted under valgrind, beyond as many others.
const COUNTED: u32 = 1_000;

/// The samples of all rounds.
#[derive(Default)]
pub(crate) struct Beyond {
    /// In calls/s, in the order of [`WORKERS`].
    by_workers: [Vec<f64>; WORKERS.len()],
    /// How many times the calls/s of one server four of them reach.
    four_servers: Vec<f64>,
    largest_ms: Vec<f64>,
    /// How many times the time of GMP that is.
    largest_to_gmp: Vec<f64>,
    /// Calls, calls/s and peak memory in MiB of the long batch.
    batch: Option<(usize, f64, f64)>,
    /// What was counted; ours, and C's.
    instructions: Vec<(&'static str, f64, f64)>,
}

impl Beyond {
    pub(crate) fn measure_round(&mut self, bench: &Bench) -> Result<()> {
        for (samples, workers) in self.by_workers.iter_mut().zip(WORKERS) {
            samples.push(bench.slow_calls(1, workers)?);
        }
        let one = self.by_workers[0].last().context("just measured")?;
        self.four_servers.push(bench.slow_calls(4, 1)? / one);
        let (ours, gmp) = bench.largest_n()?;
        self.largest_ms.push(ours);
        self.largest_to_gmp.push(ours / gmp);
        Ok(())
    }

    pub(crate) fn measure_once(&mut self, bench: &Bench, calls: usize) -> Result<()> {
        let (load, memory) = bench.batch_from_stdin(calls)?;
        self.batch = Some((calls, load.rate(), memory));
        let cold = |peer| instructions(&bench.call_once(peer));
        let of_client = |peer| bench.instructions_of_client(peer);
        let of_server = |peer| bench.instructions_of_server(peer);
        self.instructions = vec![
            ("one cold call of the client, whole process", cold(Peer::Ours)?, cold(Peer::C)?),
            ("a further call, in the client", of_client(Peer::Ours)?, of_client(Peer::C)?),
            ("a further call, in the server", of_server(Peer::Ours)?, of_server(Peer::C)?),
        ];
        Ok(())
    }

    /// The table: what was done, what was measured, and how that is to be seen.
    pub(crate) fn rows(&self, client: Option<Spread>) -> Vec<[String; 3]> {
        let mut rows = Vec::new();
        if let Some((calls, rate, memory)) = self.batch {
            let share = client.map_or(String::new(), |client| {
                format!("{} times the client's rate above, ", number(rate / client.median))
            });
            rows.push([
                format!("{} calls from standard input, answers into a pipe", number(as_f64(calls))),
                format!("{} calls/s", number(rate)),
                format!("{share}peak memory {} MiB", number(memory)),
            ]);
        }
        for (samples, workers) in self.by_workers.iter().zip(WORKERS) {
            let Some(rate) = Spread::of(samples) else { continue };
            let share = rate.median / (f64::from(workers) * IDEAL);
            rows.push([
                format!("each call takes {DELAY}, --workers {workers}"),
                format!("{} calls/s", range(rate)),
                format!("{} % of the ideal", number(share * 100.0)),
            ]);
        }
        if let Some(times) = Spread::of(&self.four_servers) {
            let figure = format!("{} times one server's rate", range(times));
            rows.push([format!("each call takes {DELAY}, four servers"), figure, String::new()]);
        }
        if let Some((ms, gmp)) = Spread::of(&self.largest_ms).zip(Spread::of(&self.largest_to_gmp))
        {
            rows.push([
                format!("fib({LARGEST_N}), a whole call, p50"),
                format!("{} ms", range(ms)),
                format!("{} times what GMP takes to compute and print it", range(gmp)),
            ]);
        }
        rows.extend(self.instructions.iter().map(|(what, ours, c)| {
            let remark = format!("C: {}", number(*c));
            [(*what).to_owned(), format!("{} instructions", number(*ours)), remark]
        }));
        rows
    }
}

#[allow(clippy::cast_precision_loss)] // a million at most
fn as_f64(count: usize) -> f64 {
    count as f64
}

impl Bench<'_> {
    /// How many calls/s some servers reach together, whose function is slow.
    fn slow_calls(&self, servers: u16, workers: u16) -> Result<f64> {
        let queue = format!("bench.slow.{servers}.{workers}");
        let mut command = self.server(Peer::Ours, &queue, 1);
        command.args(["--workers", &workers.to_string(), "--delay", DELAY]);
        let _servers =
            (0..servers).map(|_| Server::start(&command)).collect::<Result<Vec<Server>>>()?;
        // Whole turns of all workers, so that none idles at the end; and two turns in flight, so that a
        // request is at hand for each that gets free.
        let turn = u64::from(servers) * u64::from(workers);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // hundreds at most
        let turns = (self.seconds * IDEAL) as u64;
        let in_flight = 2 * servers * workers;
        self.load(Peer::C, &queue, in_flight, turn)?; // the warm-up
        Ok(self.load(Peer::C, &queue, in_flight, turn * turns.max(10))?.rate())
    }

    /// The median time in ms of a call for the largest n, and of GMP to compute and print it.
    fn largest_n(&self) -> Result<(f64, f64)> {
        let queue = "bench.largest";
        let _server = Server::start(&self.server(Peer::Ours, queue, 1))?;
        let mut client = self.our_batch(queue, 1);
        client.args(["--repeat", REPEAT, LARGEST_N]);
        let ours = Load::of_ours(&run(client, b"")?).context("a summary")?.p50_us / 1e3;
        let mut gmp = Command::new(self.programs.built.join("c-fib"));
        gmp.args([LARGEST_N, REPEAT]);
        Ok((ours, run(gmp, b"")?.stdout.trim().parse()?))
    }

    /// A long batch, and the peak memory in MiB of the client.
    fn batch_from_stdin(&self, calls: usize) -> Result<(Load, f64)> {
        let mut client = self.our_batch(QUEUE, 64);
        client.arg("-");
        let (output, memory) = peak_memory(&client, &b"30\n".repeat(calls))?;
        ensure!(output.stdout.lines().count() == calls, "not a line for each call");
        Ok((Load::of_ours(&output).context("a summary")?, memory))
    }

    fn instructions_of_client(&self, peer: Peer) -> Result<f64> {
        // One after the other: how many calls share a read or a write is left to chance otherwise.
        let count = |calls| instructions(&self.client(peer, QUEUE, 1, calls));
        Ok((count(u64::from(COUNTED) * 2)? - count(COUNTED.into())?) / f64::from(COUNTED))
    }

    fn instructions_of_server(&self, peer: Peer) -> Result<f64> {
        let queue = format!("bench.counted.{peer}");
        let count = |calls| {
            let log = Log::new();
            let server = Server::start(&log.counted(&self.server(peer, &queue, 1)))?;
            self.load(Peer::C, &queue, 1, calls)?;
            server.stop()?;
            log.read()
        };
        Ok((count(u64::from(COUNTED) * 2)? - count(COUNTED.into())?) / f64::from(COUNTED))
    }
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
        let valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", &log];
        behind(&valgrind, command)
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
