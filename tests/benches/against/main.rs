//! Measures `rpc-server` and `rpc-client` against the tutorial on other libraries.
//!
//! All run in turn, in rounds, on a private broker: what slows the machine down for a while slows them
//! all. [`peers`] is who is measured, [`figures`] what of them, [`beyond`] what no peer has a
//! counterpart of; [`report`] and [`plot`] say what came out.

mod beyond;
mod broker;
mod figures;
mod machine;
mod peers;
mod plot;
mod process;
mod report;
mod statistics;

use anyhow::{Context, Result};
use beyond::Beyond;
use broker::Broker;
use clap::Parser;
use figures::{Bench, Figure, Results};
use peers::{Peer, Programs};
use report::Report;
use std::fs;
use std::num::NonZeroU8;
use std::path::Path;
use std::process::ExitCode;

/// Measure rpc-server and rpc-client against the tutorial on other libraries.
#[derive(Debug, Parser)]
struct Cli {
    /// A first impression in under two minutes: fewer, shorter rounds; the table is printed, no file written
    #[arg(long)]
    quick: bool,

    /// Rounds, in each of which everything is measured once [7; quick: 2]
    #[arg(long, value_name = "N")]
    rounds: Option<NonZeroU8>,

    /// Whom to measure, with commas between them; no file is written unless it is all
    #[arg(long, value_name = "PEER", value_enum, value_delimiter = ',', default_values_t = Peer::ALL)]
    peers: Vec<Peer>,

    /// How long one measurement takes; for trying this program out
    #[arg(long, hide = true)]
    seconds: Option<f64>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("against: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let (rounds, seconds, many) =
        if cli.quick { (2, 0.5, 100_000.0) } else { (7, 1.5, 1_000_000.0) };
    let rounds = cli.rounds.map_or(rounds, NonZeroU8::get);
    let many = if cli.seconds.is_some() { 10_000.0 } else { many };
    let seconds = cli.seconds.unwrap_or(seconds);

    let broker = Broker::start()?;
    let programs = Programs::at(broker.url())?;
    let bench = Bench::new(&programs, seconds)?;

    let (mut results, mut beyond) = (Results::default(), Beyond::default());
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds} ...");
        measure_round(&bench, &cli.peers, round, &mut results)?;
        beyond.measure_round(&bench)?;
    }
    eprintln!("what is measured once ...");
    beyond.measure_once(&bench, many, &results)?;

    let machine = &machine::describe(&programs);
    let report = Report { machine, rounds, seconds, results: &results, beyond: &beyond };
    println!("{}", report.tables());
    if !cli.quick && Peer::ALL.iter().all(|peer| cli.peers.contains(peer)) {
        write_down(&report)?;
    }
    Ok(())
}

fn measure_round(bench: &Bench, peers: &[Peer], round: u8, results: &mut Results) -> Result<()> {
    // Another order in each round, the same in each run: nobody always follows the same.
    let mut peers = peers.to_vec();
    fastrand::Rng::with_seed(round.into()).shuffle(&mut peers);
    for figure in Figure::ALL {
        eprintln!("    {} ...", figure.title());
        for peer in &peers {
            let sample = bench.measure(figure, *peer).with_context(|| peer.name())?;
            results.record(figure, *peer, sample);
        }
    }
    Ok(())
}

fn write_down(report: &Report) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::write(folder.join("results.md"), report.page())?;
    plot::draw(report.results, &folder.join("results.svg"))?;
    let readme = folder.join("../../README.md");
    let text = fs::read_to_string(&readme).context("README.md")?;
    fs::write(&readme, report.fill_in(&text)?)?;
    eprintln!("written: tests/benches/results.md, results.svg, and their part of README.md");
    Ok(())
}
