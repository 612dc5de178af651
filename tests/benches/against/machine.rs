//! What the figures were measured on, and with: no names, paths or dates.

use crate::peers::Programs;
use std::path::Path;
use std::process::Command;
use std::{fs, thread};

/// The machine, the broker, and the peers' libraries.
pub(crate) fn describe(programs: &Programs) -> String {
    let Programs { built, sources, .. } = programs;
    format!(
        "{cores} cores of {cpu}, Linux {kernel}, RabbitMQ {} on the same machine. The peers are \
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
        cores = thread::available_parallelism().map_or(1, usize::from),
        cpu = find(Path::new("/proc/cpuinfo"), "model name\t: "),
        kernel = find(Path::new("/proc/version"), "Linux version ")
            .split('-')
            .next()
            .unwrap_or_default(),
    )
}

/// The upstream's version of a package of the distribution's.
fn package(name: &str) -> String {
    let output = Command::new("dpkg-query").args(["-W", "-f", "${Version}", name]).output();
    let version = output.map(|output| output.stdout).unwrap_or_default();
    let version = String::from_utf8_lossy(&version);
    let version = version.split_once(':').map_or(&*version, |(_epoch, version)| version);
    known(version.split(['-', '~', '+']).next())
}

/// What stands behind the first `start` in a file, to the end of the word; of a name, to that of the line.
fn find(path: &Path, start: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.split_once(start).and_then(|(_, rest)| rest.lines().next());
    known(line.and_then(|line| line.split('"').next()))
}

fn known(text: Option<&str>) -> String {
    text.map(str::trim).filter(|text| !text.is_empty()).unwrap_or("of an unknown version").into()
}
