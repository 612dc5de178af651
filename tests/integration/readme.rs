//! The README's examples are run as they stand.

use crate::support::peer::Queue;
use crate::support::programs::{bash, Program};
use std::fs;

/// In every block of language `console` the lines behind `$ ` are commands, and what follows is all
/// that they print. The server that the README tells people to start is running.
#[test]
fn the_readmes_examples_print_what_it_says() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))
        .expect("it is there");
    let queue = Queue::named("readme");
    let _server = Program::start_server(&queue, &[]);
    // On a queue of its own, because others may serve the one that everybody uses.
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
