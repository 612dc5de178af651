//! Compares `rpc-server` and `rpc-client` with the RPC tutorial on other libraries.
//!
//! In each round all of them are measured in turn, on one private broker: whatever slows the
//! machine down for a while slows all of them. [`peers`] are the programs, [`metrics`] what is
//! measured of each, [`own_metrics`] what is measured of ours only; [`report`] and [`plot`] show
//! the results.

mod broker;
mod machine;
mod metrics;
mod own_metrics;
mod peers;
mod plot;
mod process;
mod report;
mod statistics;

use anyhow::{Context, Result};
use broker::Broker;
use clap::Parser;
use metrics::{Bench, Metric, Results};
use own_metrics::OwnMetrics;
use peers::{Peer, Programs};
use report::Report;
use std::fs;
use std::num::NonZeroU8;
use std::path::Path;
use std::process::ExitCode;

/// Compare rpc-server and rpc-client with the RPC tutorial on other libraries.
#[derive(Debug, Parser)]
struct Cli {
    /// Fewer and shorter rounds (two minutes); print the tables, write no files
    #[arg(long)]
    quick: bool,

    /// Number of rounds; each measures everything once [7; quick: 2]
    #[arg(long, value_name = "N")]
    rounds: Option<NonZeroU8>,

    /// Peers to measure, separated by commas; files are written only for all of them
    #[arg(long, value_name = "PEER", value_enum, value_delimiter = ',', default_values_t = Peer::ALL)]
    peers: Vec<Peer>,

    /// Duration of one measurement, to try this program out
    #[arg(long, hide = true)]
    seconds: Option<f64>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let (rounds, seconds, batch_calls) = if cli.quick {
        (2, 0.5, 100_000.0)
    } else {
        (7, 1.5, 1_000_000.0)
    };
    let rounds = cli.rounds.map_or(rounds, NonZeroU8::get);
    let batch_calls = if cli.seconds.is_some() {
        10_000.0
    } else {
        batch_calls
    };
    let seconds = cli.seconds.unwrap_or(seconds);

    let broker = Broker::start()?;
    let programs = Programs::find(broker.url())?;
    let machine = &machine::describe(&programs);
    let bench = Bench::new(&programs, seconds)?;

    let mut results = Results::default();
    let mut own_metrics = OwnMetrics::default();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds} ...");
        measure_round(&bench, &cli.peers, round, &mut results)?;
        own_metrics.measure_round(&bench)?;
    }
    eprintln!("metrics that are measured once ...");
    own_metrics.measure_once(&bench, batch_calls, &results)?;

    let report = Report {
        machine,
        rounds,
        seconds,
        results: &results,
        own_metrics: &own_metrics,
    };
    println!("{}", report.tables());
    if !cli.quick && Peer::ALL.iter().all(|peer| cli.peers.contains(peer)) {
        write_files(&report)?;
    }
    Ok(())
}

fn measure_round(bench: &Bench, peers: &[Peer], round: u8, results: &mut Results) -> Result<()> {
    // The order differs between rounds, so that no peer always follows the same one; it is the same
    // in every run.
    let mut peers = peers.to_vec();
    fastrand::Rng::with_seed(round.into()).shuffle(&mut peers);
    for metric in Metric::ALL {
        eprintln!("    {} ...", metric.title());
        for peer in &peers {
            let sample = bench.measure(metric, *peer).with_context(|| peer.name())?;
            results.record(metric, *peer, sample);
        }
    }
    Ok(())
}

fn write_files(report: &Report) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::write(folder.join("results.md"), report.page())?;
    plot::draw(report.results, &folder.join("results.svg"))?;
    let readme = folder.join("../../README.md");
    let text = fs::read_to_string(&readme).context("README.md")?;
    fs::write(&readme, report.fill_in(&text)?)?;
    eprintln!("written: tests/benches/results.md, results.svg, and their part of README.md");
    Ok(())
}
