//! The command line: usage, `--help`, and arguments that are refused. `messages.txt` has the errors.

use crate::support::peer::{Peer, Queue};
use crate::support::programs::{client, command};
use rpc_common::exit;

#[test]
fn without_arguments_the_client_prints_its_usage() {
    let output = command("rpc-client").assert().code(2).stdout("").get_output().clone();
    let usage = String::from_utf8(output.stderr).expect("help is text");
    assert!(usage.contains("Usage: rpc-client [OPTIONS] <N>..."), "{usage}");
}

#[test]
fn help_lists_the_exit_codes_and_hides_the_environment() {
    for (program, codes) in [("rpc-client", exit::CLIENT_EXIT_CODES), ("rpc-server", exit::SERVER_EXIT_CODES)] {
        let mut help = command(program);
        let output = help
            .arg("--help")
            .env("AMQP_URL", "amqp://me:sesame@host")
            .assert()
            .code(0)
            .stderr("")
            .get_output()
            .clone();
        let text = String::from_utf8(output.stdout).expect("help is text");
        assert!(text.contains(&exit::exit_codes_help(codes)), "{text}");
        assert!(!text.contains("sesame"), "{text}");
    }
}

#[test]
fn an_argument_that_is_not_a_number_is_never_sent() {
    let queue = Queue::declare("no_number");
    for wrong in ["", "+5", "1.5", " 1", "1e3", "0x10", "123456789012345678901"] {
        client(&queue, &["1", "--", wrong]).assert().code(2).stdout("");
    }
    assert!(Peer::connect().try_take(&queue).is_none());
}
