//! The command line: usage, `--help`, and arguments that are refused. `messages.txt` has the
//! errors.

use crate::support::broker;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, command, program_folder, Program};
use rpc_common::exit;
use std::path::Path;
use std::process;

#[test]
fn without_arguments_the_client_prints_its_usage() {
    let usage = "Usage: rpc-client [OPTIONS] <N>... | --data <DATA> | --lines <FILE> | --check\n\
                 See rpc-client --help.\n";
    assert_output(&mut command("rpc-client"), 2, "", usage);
}

/// What a program prints with this option.
fn help(program: &str, option: &str) -> String {
    let output = command(program)
        .arg(option)
        .assert()
        .code(0)
        .stderr("")
        .get_output()
        .clone();
    String::from_utf8(output.stdout).expect("help is text")
}

#[test]
fn the_short_help_is_one_screen_and_the_long_one_has_all_options() {
    for program in ["rpc-client", "rpc-server"] {
        let short = help(program, "-h");
        let long = help(program, "--help");
        assert!(short.lines().count() <= 23, "{short}");
        let words = short
            .split([' ', '\n', ','])
            .filter(|word| word.starts_with("--") && word.len() > 2);
        words.for_each(|option| assert!(long.contains(option), "{option}"));
        for line in short.lines().chain(long.lines()) {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}

#[test]
fn options_can_be_set_by_the_environment_and_the_command_line_wins() {
    let queue = Queue::named("from_environment");
    let mut server = process::Command::new(program_folder().join("rpc-server"));
    server
        .env("AMQP_URL", broker::url())
        .env("RPC_SERVER_QUEUE", &*queue)
        .env("RPC_SERVER_QUIET", "1");
    let server = Program::spawn_command(&server);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    let mut call = command("rpc-client");
    call.env("RPC_CLIENT_QUEUE", &*queue)
        .env("RPC_CLIENT_OUTPUT", "json")
        .args(["-o", "raw", "30"]);
    assert_output(&mut call, 0, "832040\n", "");
    for no in ["", "0", "f", "False", "n", "NO", "off"] {
        let mut call = client(&queue, &["-o", "text", "30"]);
        assert_output(
            call.env("RPC_CLIENT_QUIET", no),
            0,
            " [.] Got 832040\n",
            " [x] Requesting fib(30)\n",
        );
    }
    assert!(server.stop().is_empty());
    let error = "rpc-client: invalid value 'x' for '--timeout <DURATION>': not a duration such as 1500ms, 30s or 2m; see --help\n";
    assert_output(
        command("rpc-client")
            .env("RPC_CLIENT_TIMEOUT", "x")
            .arg("30"),
        2,
        "",
        error,
    );
}

#[test]
fn help_lists_the_exit_codes_and_hides_the_environment() {
    for (program, codes) in [
        ("rpc-client", exit::CLIENT_EXIT_CODES),
        ("rpc-server", exit::SERVER_EXIT_CODES),
    ] {
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

/// Calls the completion of `rpc-server --queue-type <TAB>`, and of an option, as bash does.
#[test]
fn bash_completes_options_and_their_values_and_man_pages_have_the_options() {
    let share = Path::new(env!("CARGO_TARGET_TMPDIR")).join("share");
    let generated = process::Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--locked", "-p", "rpc-generate", "--"])
        .arg(&share)
        .status();
    assert!(
        generated.expect("cargo runs").success(),
        "the generator runs"
    );
    let complete = |word: &str, before: &str| {
        let script = format!(
            "source {}/bash-completion/completions/rpc-server; COMP_WORDS=(rpc-server {before} {word:?}); \
             COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE=\"rpc-server {before} {word}\"; \
             function=$(complete -p rpc-server | sed 's/.*-F \\([^ ]*\\).*/\\1/'); \
             $function rpc-server {word:?} {before:?}; echo \"${{COMPREPLY[*]}}\"",
            share.display()
        );
        String::from_utf8(bash(&script).success().get_output().stdout.clone()).expect("it is text")
    };
    assert_eq!(
        complete("", "--queue-type"),
        "auto transient classic quorum\n"
    );
    assert_eq!(complete("--pre", ""), "--prefetch\n");
    let page =
        std::fs::read_to_string(share.join("man/man1/rpc-client.1")).expect("the page is there");
    assert!(
        page.contains("fB\\-\\-no\\-wait\\fR") && page.contains("Exit codes:"),
        "{page}"
    );
}

#[test]
fn an_argument_that_is_not_a_number_is_never_sent() {
    let queue = Queue::declare("no_number");
    for wrong in [
        "",
        "+5",
        "1.5",
        " 1",
        "1e3",
        "0x10",
        "123456789012345678901",
    ] {
        client(&queue, &["1", "--", wrong])
            .assert()
            .code(2)
            .stdout("");
    }
    assert!(Peer::connect().try_take(&queue).is_none());
}

#[test]
fn the_programs_own_variable_has_several_urls_and_wins_over_amqp_url() {
    let queue = Queue::named("own_variable");
    let urls = format!("amqp://127.0.0.1:1\n {}?heartbeat=30", broker::url());
    let mut server = process::Command::new(program_folder().join("rpc-server"));
    server
        .args(["--queue", &queue])
        .env("AMQP_URL", "amqp://127.0.0.1:2")
        .env("RPC_SERVER_URL", &urls);
    let server = Program::spawn_command(&server);
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    let mut call = client(&queue, &["30"]);
    call.env("RPC_CLIENT_URL", &urls)
        .env("AMQP_URL", "amqp://127.0.0.1:2");
    assert_output(&mut call, 0, "832040\n", "");
    let bad =
        "rpc-client: bad RPC_CLIENT_URL: not of the form amqp://user:password@host:port/vhost\n";
    call.env("RPC_CLIENT_URL", "amqp:/host");
    assert_output(&mut call, 2, "", bad);
}

#[test]
fn a_variable_that_sets_no_option_is_a_warning() {
    let queue = Queue::named("unknown_variable");
    let _server = Program::start_server(&queue, &[]);
    let mut call = client(&queue, &["30"]);
    call.env("RPC_CLIENT_TIMOUT", "1ms")
        .env("RPC_CLIENT_SERVICE_HOST", "10.0.0.1")
        .env("RPC_CLIENT_PORT", "tcp://10.0.0.1:80")
        .env("RPC_CLIENT_PORT_80_TCP", "tcp://10.0.0.1:80");
    let warning = "rpc-client: warning: RPC_CLIENT_TIMOUT sets no option; see --help\n";
    assert_output(&mut call, 0, "832040\n", warning);
}
