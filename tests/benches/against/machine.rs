//! What the figures were measured on, and with: no names, paths or dates.

use crate::peers::Programs;
use std::path::Path;
use std::process::Command;
use std::{fs, thread};

/// One sentence each on the machine, the broker, and the peers' libraries.
pub(crate) fn describe(programs: &Programs) -> String {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let cpu = after_first(&read("/proc/cpuinfo"), "model name\t: ");
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel = kernel.split('-').next().unwrap_or_default().trim();
    let libraries = [
        format!("librabbitmq {} (C)", package("librabbitmq-dev")),
        format!(
            "amqp091-go {} (Go {})",
            package("golang-github-rabbitmq-amqp091-go-dev"),
            package("golang-go")
        ),
        format!("amqplib {} (Node {})", amqplib(&programs.built), package("nodejs")),
        format!("php-amqplib {} (PHP {})", package("php-amqplib"), package("php-cli")),
        format!("pika {} (Python {})", pika(&programs.sources), python(&programs.built)),
        format!("lapin {} (Rust)", lapin(&programs.sources)),
    ];
    format!(
        "{cores} cores of {cpu}, Linux {kernel}, RabbitMQ {} on the same machine. The peers are {}.",
        package("rabbitmq-server"),
        libraries.join(", ")
    )
}

/// The upstream's version of a package of the distribution's.
fn package(name: &str) -> String {
    let output = Command::new("dpkg-query").args(["-W", "-f", "${Version}", name]).output();
    let version = output.map(|output| output.stdout).unwrap_or_default();
    let version = String::from_utf8_lossy(&version);
    let version = version.split_once(':').map_or(&*version, |(_epoch, version)| version);
    known(version.split(['-', '~', '+']).next().unwrap_or_default())
}

fn amqplib(built: &Path) -> String {
    let text = read(built.join("node/node_modules/amqplib/package.json"));
    let package: Option<serde_json::Value> = serde_json::from_str(&text).ok();
    known(package.as_ref().and_then(|package| package["version"].as_str()).unwrap_or_default())
}

fn pika(sources: &Path) -> String {
    after_first(&read(sources.join("python/requirements.txt")), "pika==")
}

fn python(built: &Path) -> String {
    after_first(&read(built.join("python/pyvenv.cfg")), "\nversion = ")
}

fn lapin(sources: &Path) -> String {
    let text = read(sources.join("lapin/Cargo.lock"));
    after_first(&text, "name = \"lapin\"\nversion = ").replace('"', "")
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// What stands between the first `start` and the end of that line.
fn after_first(text: &str, start: &str) -> String {
    let rest = text.split_once(start).map_or("", |(_, rest)| rest);
    known(rest.lines().next().unwrap_or_default())
}

fn known(text: &str) -> String {
    let text = text.trim();
    if text.is_empty() { "of an unknown kind" } else { text }.to_owned()
}
