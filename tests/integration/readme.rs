//! The README is right: its commands print what it shows, and its tables are complete.

use crate::support::peer::Queue;
use crate::support::programs::{bash, Program};
use rpc_common::exit;
use std::fs;

/// In every block of language `console` the lines that begin with `$ ` are commands, and the lines below are everything
/// that they print. The server that the README says to start is running.
#[test]
fn the_readmes_commands_print_what_it_shows() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))
        .expect("the file exists");
    let queue = Queue::named("readme");
    let _server = Program::start_server(&queue, &[]);
    // The default queue may have other servers.
    let on_queue = format!("rpc-client() {{ command rpc-client --queue {} \"$@\"; }}", &*queue);
    let mut examples = 0;
    for block in readme.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap_or_default();
        for example in format!("\n{block}").split("\n$ ").skip(1) {
            let (command, output) = example.split_once('\n').unwrap_or((example, ""));
            let output = if output.is_empty() || output.ends_with('\n') {
                output.to_owned()
            } else {
                format!("{output}\n")
            };
            bash(&format!("{on_queue}\nexec 2>&1; {command}")).stdout(output);
            examples += 1;
        }
    }
    assert!(examples >= 5, "only {examples} examples were found");
}

/// The tables of exit codes have the same text as `--help`.
#[test]
fn the_readme_lists_the_exit_codes() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))
        .expect("the file exists");
    for (code, meaning) in exit::CLIENT.iter().chain(exit::SERVER) {
        let row = format!("| {} | {meaning} |", *code as u8);
        assert!(readme.contains(&row), "the README has no row '{row}'");
    }
}
