//! The machine and the versions of a measurement, without host names, paths and dates.

use crate::peers::Programs;
use std::path::Path;
use std::process::Command;
use std::{fs, thread};

/// Describes the machine, the broker, and the peers' libraries in a sentence.
pub(crate) fn describe(programs: &Programs) -> String {
    let Programs { built, sources, .. } = programs;
    format!(
        "commit {commit} on {cores} cores of {cpu}, Linux {kernel}, RabbitMQ {} on the same machine. The peers are \
         librabbitmq {} (C), amqp091-go {} (Go {}), amqplib {} (Node {}), php-amqplib {} (PHP {}), \
         pika {} (Python {}) and lapin {} (Rust).",
        package("rabbitmq-server"),
        package("librabbitmq-dev"),
        package("golang-github-rabbitmq-amqp091-go-dev"),
        package("golang-go"),
        find(&built.join("node/node_modules/amqplib/package.json"), "\"version\": \""),
        package("nodejs"),
        package("php-amqplib"),
        package("php-cli"),
        find(&sources.join("python/requirements.txt"), "pika=="),
        find(&built.join("python/pyvenv.cfg"), "\nversion = "),
        find(&sources.join("lapin/Cargo.lock"), "name = \"lapin\"\nversion = \""),
        commit = commit(),
        cores = thread::available_parallelism().map_or(1, usize::from),
        cpu = find(Path::new("/proc/cpuinfo"), "model name\t: "),
        kernel = find(Path::new("/proc/version"), "Linux version ").split('-').next().unwrap_or_default(),
    )
}

/// The commit that is measured, with a mark if the work tree differs from it.
fn commit() -> String {
    let describe = [
        "describe",
        "--always",
        "--abbrev=7",
        "--exclude=*",
        "--dirty",
    ];
    let output = Command::new("git")
        .args(describe)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    let commit = output.map(|output| output.stdout).unwrap_or_default();
    or_unknown(String::from_utf8_lossy(&commit).lines().next())
}

/// The upstream version of an installed package.
fn package(name: &str) -> String {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Version}", name])
        .output();
    let version = output.map(|output| output.stdout).unwrap_or_default();
    let version = String::from_utf8_lossy(&version);
    let version = version
        .split_once(':')
        .map_or(&*version, |(_epoch, version)| version);
    or_unknown(version.split(['-', '~', '+']).next())
}

/// The text after the first `prefix` in a file, up to a quotation mark or the end of the line.
fn find(path: &Path, prefix: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text
        .split_once(prefix)
        .and_then(|(_, rest)| rest.lines().next());
    or_unknown(line.and_then(|line| line.split('"').next()))
}

fn or_unknown(text: Option<&str>) -> String {
    text.map(str::trim)
        .filter(|text| !text.is_empty())
        .unwrap_or("of an unknown version")
        .into()
}
