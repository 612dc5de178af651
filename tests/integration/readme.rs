//! The README files: their examples are run as they stand, and whatever they name must exist.

use crate::containers::Container;
use crate::support::broker::private_node;
use crate::support::broker_features::{broker_version_at, report_not_applicable};
use crate::support::eventually;
use crate::support::peer::{Peer, Queue};
use crate::support::programs::{assert_output, bash, client, command, program_folder, Program};
use crate::tls::listen_with;
use rpc_common::exit;
use rpc_common::message::ErrorCode;
use rustix::process::Signal;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

const PAGES: [&str; 7] = [
    "README.md",
    "rpc-client/README.md",
    "rpc-server/README.md",
    "rpc-server/containers.md",
    "rpc-server/persistent.md",
    "rpc-common/README.md",
    "tests/README.md",
];

/// Further pages with links.
const PAGES_FOR_CONTRIBUTORS: [&str; 2] = [".github/CONTRIBUTING.md", ".github/SECURITY.md"];

/// Marks the block below it as one for this version of RabbitMQ and later ones.
const SINCE: &str = "<!-- RabbitMQ ";

/// A **block** of a page is what stands between two fences.
struct Block {
    page: &'static str,
    language: String,
    /// Without the indentation of a list.
    text: String,
    /// The line above it.
    marker: String,
}

/// Reads a page: its blocks, and its text without them.
fn read(page: &'static str) -> (Vec<Block>, String) {
    let text = fs::read_to_string(Path::new(ROOT).join(page)).expect("the page can be read");
    let mut blocks = Vec::new();
    let mut prose = String::new();
    let mut lines = text.lines();
    let mut marker = "";
    while let Some(line) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        if let Some(language) = line.trim_start().strip_prefix("```") {
            let inside = lines.by_ref().take_while(|line| line.trim_start() != "```");
            let text = inside.map(|line| format!("{}\n", line.get(indent..).unwrap_or_default()));
            let text = text.collect();
            let language = language.to_owned();
            blocks.push(Block {
                page,
                language,
                text,
                marker: marker.trim().to_owned(),
            });
        } else {
            prose.extend([line, "\n"]);
        }
        marker = line;
    }
    (blocks, prose)
}

/// The first block that contains this text.
fn block(text: &str) -> Block {
    let mut blocks = blocks().into_iter();
    let block = blocks.find(|block| block.text.contains(text));
    block.expect("a page has it")
}

fn blocks() -> Vec<Block> {
    PAGES.into_iter().flat_map(|page| read(page).0).collect()
}

/// In a block of language `console`, a line that starts with `$ ` is a command, which lines that
/// start with `> ` continue. What follows is all that it prints. A server of fib is running; one
/// that an example starts runs to the end.
#[test]
fn the_examples_of_the_readme_files_print_what_they_say() {
    let node = private_node();
    let queue = Queue::named("readme");
    let _server = Program::start_server_at(node.url(), &queue, &[]);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("readme");
    install_wrappers(&folder, &queue);
    let environment = format!(
        "cd {0}; unset PYTHONUNBUFFERED; export PATH={0}:$PATH AMQP_URL={1}",
        folder.display(),
        node.url()
    );
    let mut run = [0; PAGES.len()];
    let mut servers = Vec::new();
    for block in blocks().iter().filter(|block| block.language == "console") {
        if !applies(block, node.url()) {
            continue;
        }
        let page = PAGES
            .iter()
            .position(|page| *page == block.page)
            .expect("it is one of them");
        for example in format!("\n{}", block.text).split("\n$ ").skip(1) {
            let (command, output) = split_example(&example.replace("rpc_queue", &queue));
            let command = command.replace("@localhost", &format!("@{}", node.authority()));
            if command.starts_with("rpc-server") {
                let mut server = Command::new("bash");
                server.args(["-c", &format!("{environment}\nexec {command}")]);
                let server = Program::spawn_command(&server);
                assert_eq!(format!("{}\n", server.next_line()), output, "{command}");
                servers.push(server);
            } else {
                let run = || bash(&format!("{environment}; exec 2>&1\n{command}"));
                if command.starts_with("rabbitmqctl -q list_queues") {
                    // The numbers of a quorum queue are up to 5 s old.
                    eventually("the numbers of the queue are current", || {
                        (run().get_output().stdout == output.as_bytes()).then_some(())
                    });
                } else {
                    run().stdout(output);
                }
            }
            run[page] += 1;
        }
    }
    assert!(
        run[0] >= 4 && run[1] >= 15 && run[2] >= 8 && run[4] >= 7,
        "examples that were run, by page: {run:?} of {PAGES:?}"
    );
    Peer::connect_to(node.url()).delete_queue(&queue);
}

/// Whether the block is for the broker's version of RabbitMQ.
fn applies(block: &Block, url: &str) -> bool {
    let Some(since) = block.marker.strip_prefix(SINCE) else {
        return true;
    };
    let since = since.trim_end_matches(" -->");
    let (major, minor) = since.split_once('.').expect("a version is MAJOR.MINOR");
    let number = |text: &str| text.parse::<u32>().expect("a version has two numbers");
    let applies = broker_version_at(url) >= (number(major), number(minor));
    if !applies {
        let part = format!("an example of {}", block.page);
        report_not_applicable(&part, &format!("it is for RabbitMQ {since} and later"));
    }
    applies
}

/// The command of an example, and what it prints.
fn split_example(example: &str) -> (String, String) {
    let mut command = String::new();
    let mut output = String::new();
    for (index, line) in example.lines().enumerate() {
        match line.strip_prefix("> ") {
            _ if index == 0 => command.push_str(line),
            Some(more) if output.is_empty() => command.extend(["\n", more]),
            _ => output.extend([line, "\n"]),
        }
    }
    (command, output)
}

/// Our programs use the queue of this test, because other tests may serve `rpc_queue`.
/// `rabbitmqctl` is that of the private node.
fn install_wrappers(folder: &Path, queue: &str) {
    let programs = program_folder().display();
    let node = private_node().folder().display();
    let _ = fs::remove_dir_all(folder); // of an earlier run
    fs::create_dir_all(folder).expect("the folder can be created");
    for (name, program) in [
        (
            "rpc-client",
            format!("{programs}/rpc-client --queue {queue}"),
        ),
        (
            "rpc-server",
            format!("{programs}/rpc-server --queue {queue}"),
        ),
        ("rabbitmqctl", format!("{ROOT}/tests/broker.sh ctl {node}")),
    ] {
        let file = folder.join(name);
        fs::write(&file, format!("#!/bin/sh\nexec {program} \"$@\"\n")).expect("there is room");
        fs::set_permissions(&file, Permissions::from_mode(0o755)).expect("the file is ours");
    }
}

/// `console` blocks are run above. Of `sh` blocks, which install or start things, the test below
/// checks that what they name exists. `text` blocks are figures. `peers` runs the programs in other
/// languages. Further tests below are for the other blocks.
#[test]
fn every_block_of_the_readme_files_is_checked_by_a_test() {
    let mut programs = Vec::new();
    for Block {
        page,
        language,
        text,
        ..
    } in blocks()
    {
        match &*language {
            "console" => assert!(text.starts_with("$ "), "{page}: no command: {text}"),
            "sh" => assert!(!text.contains("$ "), "{page}: this is a console: {text}"),
            "text" => {}
            "dockerfile" | "yaml" if page == "rpc-server/containers.md" => {}
            "python" | "php" | "go" | "js" if page == "tests/README.md" => programs.push(language),
            _ => panic!("{page}: no test runs a block of language '{language}'"),
        }
    }
    assert_eq!(
        programs,
        ["python", "python", "php", "php", "go", "go", "js", "js"]
    );
}

/// The guide's certificates, in the folder of the private node, which gets a listener with the
/// options of the guide's `rabbitmq.conf`.
#[test]
fn the_broker_and_the_programs_accept_the_certificates_of_the_guide() {
    let node = private_node();
    let queue = Queue::named("tls_guide");
    let folder = node.folder().join("guide");
    let file = |name: &str| folder.join(name).display().to_string();
    fs::create_dir_all(&folder).expect("the folder of the node is writable");
    for example in format!("\n{}", block("openssl req").text)
        .split("\n$ ")
        .skip(1)
    {
        let (command, _) = split_example(example);
        bash(&format!("cd {}; {command}", folder.display())).success();
    }
    let config = block("ssl_options.").text;
    let options = config
        .lines()
        .filter_map(|line| line.strip_prefix("ssl_options.")?.split_once(" = "));
    let options = options.map(|(name, value)| match value.strip_prefix("/etc/rabbitmq/") {
        Some(name_of_file) => format!("{{{name}, {:?}}}", file(name_of_file)),
        None => format!("{{{name}, {value}}}"),
    });
    let port = listen_with(node, 11, &options.collect::<Vec<_>>().join(", "));
    let url = format!("amqps://localhost:{port}");
    let ca = file("ca.pem");
    let cert = file("server.pem");
    let key = file("server.key");
    let files = ["--ca-file", &ca, "--cert-file", &cert, "--key-file", &key];
    let server = Program::start_server_at(&url, &queue, &files);
    assert_output(
        client(&queue, &files).arg("30").env("AMQP_URL", &url),
        0,
        "832040\n",
        "",
    );
    client(&queue, &["--ca-file", &ca, "30"])
        .env("AMQP_URL", &url)
        .assert()
        .code(3);
    server.stop();
}

/// There is no Docker here: its command is run as process 1.
#[test]
fn the_container_of_the_guide_serves_and_stops() {
    let dockerfile = block("FROM ").text;
    let words = |instruction: &str| {
        let array = dockerfile
            .lines()
            .find_map(|line| line.strip_prefix(instruction))
            .expect("the Dockerfile has it");
        serde_json::from_str::<Vec<String>>(array).expect("it is an array of strings")
    };
    let queue = Queue::named("container_guide");
    let command = [words("ENTRYPOINT "), words("CMD ")].concat();
    let command = command.iter().map(String::as_str);
    let command: Vec<_> = command
        .map(|word| if word == "count" { &*queue } else { word })
        .collect();
    let server = Container::start(command[0], &command[1..]);
    assert_eq!(server.0.next_line(), " [x] Awaiting RPC requests");
    let mut call = client(&queue, &["--data", "to be or not to be"]);
    assert_output(&mut call, 0, "6\n", "");
    server.send_signal(Signal::TERM);
    assert_eq!(server.0.wait_for_exit_code(), Some(0));
}

#[test]
fn the_grace_period_of_the_guide_is_longer_than_a_stop() {
    let pod = block("terminationGracePeriodSeconds").text;
    let seconds = |before: &str| {
        let (_, rest) = pod.split_once(before).expect("the guide has it");
        let digits = rest.split(|char: char| !char.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse::<u32>().ok())
    };
    let stop_after = seconds("RPC_SERVER_STOP_AFTER, value: ").expect("it has seconds");
    let grace_period = seconds("terminationGracePeriodSeconds: ").expect("it has seconds");
    let kill_after = 5; // the default
    assert!(grace_period > stop_after + kill_after);
}

#[test]
fn the_demo_shows_an_answer() {
    let node = private_node();
    let demo = format!(
        "AMQP_URL={} {ROOT}/tests/demo.sh {}",
        node.url(),
        program_folder().display()
    );
    let output = bash(&demo).success().get_output().clone();
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.contains("$ rpc-client 30\n [x] Requesting fib(30)\n [.] Got 832040\n"),
        "{output}"
    );
}

/// Targets of `make`, options of our programs, and examples of the libraries.
#[test]
fn the_commands_and_options_in_the_readme_files_exist() {
    let makefile = fs::read_to_string(Path::new(ROOT).join("Makefile")).expect("it can be read");
    let help = ["rpc-client", "rpc-server"].map(|program| {
        let output = command(program)
            .arg("--help")
            .assert()
            .success()
            .get_output()
            .clone();
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    let mut missing = Vec::new();
    for page in PAGES {
        let (blocks, prose) = read(page);
        let commands = blocks.iter().filter(|block| block.language == "sh");
        for line in commands.flat_map(|block| block.text.lines()) {
            missing.extend(missing_commands(line, &makefile).map(|it| format!("{page}: {it}")));
        }
        for code in prose.split('`').skip(1).step_by(2) {
            missing.extend(missing_commands(code, &makefile).map(|it| format!("{page}: {it}")));
            let option = code
                .split(['=', ' ', '['])
                .next()
                .filter(|option| option.starts_with("--"));
            let exists = |option: &str| help.iter().any(|help| help.contains(option));
            missing.extend(
                option
                    .filter(|option| !exists(option))
                    .map(|it| format!("{page}: {it}")),
            );
        }
    }
    assert!(missing.is_empty(), "these do not exist: {missing:#?}");
}

/// The targets of `make`, the scripts, and the examples of our libraries that a command names and
/// that do not exist.
fn missing_commands<'a>(command: &'a str, makefile: &'a str) -> impl Iterator<Item = &'a str> {
    let words = |text: &'a str| {
        text.split([' ', '(', ')', '"'])
            .filter(|word| !word.is_empty())
    };
    let commands = command
        .split('#')
        .next()
        .unwrap_or_default()
        .split(['&', ';']);
    commands.filter_map(move |command| {
        let mut words =
            words(command).skip_while(|word| !["make", "cargo", "tests/broker.sh"].contains(word));
        let exists = match words.next()? {
            "make" => {
                let is_target = |word: &&str| !word.starts_with('-') && !word.contains('=');
                let target = words.find(is_target)?;
                makefile.contains(&format!("\n{target}: "))
            }
            "cargo" => {
                let name = words.skip_while(|word| *word != "--example").nth(1)?;
                let example = |package| {
                    Path::new(ROOT)
                        .join(package)
                        .join(format!("examples/{name}.rs"))
                };
                ["rpc-client", "rpc-server"]
                    .into_iter()
                    .any(|package| example(package).exists())
            }
            script => Path::new(ROOT).join(script).exists(),
        };
        (!exists).then_some(command)
    })
}

#[test]
fn the_links_in_the_readme_files_lead_somewhere() {
    let mut broken = Vec::new();
    for page in PAGES.into_iter().chain(PAGES_FOR_CONTRIBUTORS) {
        for (_, target) in links(&read(page).1) {
            let (path, heading) = target.split_once('#').unwrap_or((&target, ""));
            let file = linked_file(page, path);
            let text = fs::read_to_string(&file).unwrap_or_default();
            let has_heading = text
                .lines()
                .any(|line| line.starts_with('#') && anchor(line) == heading);
            if !(file.exists() && (heading.is_empty() || has_heading)) {
                broken.push(format!("{page}: {target}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// A promise is followed by a link to a test, `file::name`.
#[test]
fn every_promise_names_a_test_that_exists() {
    let (_, page) = read("README.md");
    let (_, promises) = page
        .split_once("## What is promised")
        .expect("the front page has them");
    let (promises, _) = promises
        .split_once("**Not promised:**")
        .expect("the list ends");
    let mut unknown = Vec::new();
    for promise in promises.split("\n- **").skip(1) {
        let tests: Vec<_> = links(promise)
            .filter(|(label, _)| label.contains("::"))
            .collect();
        let exists = |(label, target): &(String, String)| {
            let (file, name) = label.trim_matches('`').split_once("::").unwrap_or_default();
            let source = fs::read_to_string(linked_file("README.md", target)).unwrap_or_default();
            target.ends_with(&format!("/{file}.rs"))
                && source.contains(&format!("#[test]\nfn {name}() {{"))
        };
        if tests.len() != 1 || !tests.iter().all(exists) {
            unknown.push(format!(
                "{tests:?}: {}",
                promise.lines().next().unwrap_or_default()
            ));
        }
    }
    assert!(
        promises.matches("\n- **").count() >= 10,
        "the promises are there"
    );
    assert!(
        unknown.is_empty(),
        "promises without their test: {unknown:#?}"
    );
}

/// The tables of exit codes have the same text as `--help`.
#[test]
fn the_readme_files_list_the_exit_codes() {
    for (page, codes) in [
        ("rpc-client/README.md", exit::CLIENT_EXIT_CODES),
        ("rpc-server/README.md", exit::SERVER_EXIT_CODES),
    ] {
        let (_, text) = read(page);
        for (code, meaning) in codes {
            let row = format!("| {} | {meaning} |", *code as u8);
            assert!(text.contains(&row), "{page} has no row '{row}'");
        }
    }
}

/// The tables of error codes are complete, and name codes that exist.
#[test]
fn the_readme_files_list_the_error_codes() {
    // The first code in a cell of each row, counted from 0.
    let codes_of_table = |page, heading: &str, cell: usize| {
        let (_, text) = read(page);
        let (_, table) = text.split_once(heading).expect("the page has the table");
        let rows = table.lines().map(str::trim_start);
        let rows = rows.skip_while(|line| !line.starts_with("| ---")).skip(1);
        let rows = rows.take_while(|row| row.starts_with('|'));
        let codes = rows.filter_map(|row| {
            let cell = row.split('|').nth(cell + 1)?.trim();
            cell.strip_prefix('`')?.split('`').next().map(str::to_owned)
        });
        codes.collect::<Vec<_>>()
    };
    let known = ErrorCode::KNOWN.map(|code| code.as_str().to_owned());
    let servers = codes_of_table("rpc-common/README.md", "### Error codes", 0);
    assert_eq!(servers, known);
    let source = fs::read_to_string(format!("{ROOT}/rpc-client/src/bin/rpc-client/error.rs"));
    let source = source.expect("the source is there");
    let (_, codes) = source
        .split_once("const CLIENT_CODES")
        .expect("it has the codes");
    let (codes, _) = codes.split_once("];").expect("the list ends");
    let clients = codes.split('"').skip(1).step_by(2);
    let mut listed = codes_of_table("rpc-client/README.md", "| `code` of `error` |", 0);
    for code in clients {
        let index = listed.iter().position(|listed| listed == code);
        listed.remove(index.unwrap_or_else(|| panic!("rpc-client/README.md has no '{code}'")));
    }
    for code in listed {
        assert!(
            known.contains(&code),
            "rpc-client/README.md has an unknown '{code}'"
        );
    }
    // `served_programs` shows that these exit codes have these error codes.
    let heading = "| exit code of the program | error code |";
    let programs = codes_of_table("rpc-server/README.md", heading, 1);
    let codes = [
        ErrorCode::InvalidArgument,
        ErrorCode::Unavailable,
        ErrorCode::PermissionDenied,
        ErrorCode::Failed,
    ];
    assert_eq!(programs, codes.map(|code| code.as_str().to_owned()));
}

/// The label and the target of each link into the repository.
fn links(text: &str) -> impl Iterator<Item = (String, String)> + '_ {
    text.match_indices("](").filter_map(|(at, opening)| {
        let label = text[..at].rsplit('[').next().unwrap_or_default();
        let target = text[at + opening.len()..]
            .split(')')
            .next()
            .unwrap_or_default();
        let is_ours = !target.starts_with("http");
        is_ours.then(|| (label.to_owned(), target.to_owned()))
    })
}

fn linked_file(page: &str, path: &str) -> PathBuf {
    let page = Path::new(ROOT).join(page);
    match path {
        "" => page,
        path => page.parent().expect("a page is in a folder").join(path),
    }
}

/// A heading as GitHub and others make an anchor of it.
fn anchor(heading: &str) -> String {
    let kept = |char: &char| char.is_alphanumeric() || [' ', '-', '_'].contains(char);
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(kept)
        .collect::<String>()
        .replace(' ', "-")
}
