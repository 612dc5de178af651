//! Every error message of both programs, on one page: `messages.txt`, to be read as a user.

use crate::support::broker::{private_node, Node};
use crate::support::peer::Peer;
use crate::support::programs::{bash, Program};
use crate::tls::listeners;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::{fs, thread};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/integration/messages.txt");

/// Behind `$ ` stand commands, below them all that they print but empty lines, and the exit code, if it is
/// not 0.
#[test]
fn the_page_of_messages_is_what_both_programs_say() {
    let page = fs::read_to_string(PAGE).expect("the file exists");
    let scene = Scene::set(private_node());
    let (mut seen, mut continues) = (String::new(), false);
    for line in page.lines() {
        let is_comment = line.starts_with("# ");
        if !(is_comment || line.starts_with("## ") || line.starts_with("$ ")) {
            continue; // it was printed when the page was written
        }
        if !(seen.is_empty() || continues && is_comment) {
            seen.push('\n');
        }
        let printed = line.strip_prefix("$ ").map(|command| scene.run(command));
        seen.extend([line, "\n", printed.as_deref().unwrap_or_default()]);
        continues = is_comment;
    }
    if seen != page {
        let actual = Path::new(env!("CARGO_TARGET_TMPDIR")).join("messages.txt");
        fs::write(&actual, &seen).expect("the folder is writable");
        let new = seen.lines().find(|line| !page.contains(line));
        panic!("{PAGE} differs from {}, perhaps in: {new:#?}", actual.display());
    }
}

/// What the commands of the page find.
struct Scene {
    /// Set before each command.
    variables: String,
    /// What is different in every run, and how the page has it.
    names: Vec<(String, &'static str)>,
    _server: Program,
}

impl Scene {
    fn set(node: &Node) -> Self {
        let tls = listeners();
        let (cert, key) = &tls.client;
        let (unknown_cert, unknown_key) = &tls.unknown;
        let (other_cert, other_key) = &tls.stranger;
        for (user, permissions) in [
            ("no-configure", ["^$", ".*", ".*"]),
            ("no-write", [".*", "^$", ".*"]),
            ("no-read", [".*", ".*", "^$"]),
        ] {
            node.rabbitmqctl(&["add_user", user, "page"]);
            node.rabbitmqctl(&[&["set_permissions", user][..], &permissions].concat());
        }
        node.rabbitmqctl(&["add_user", "no-vhost", "page"]);
        let foreign = Peer::connect_to(node.url());
        foreign.declare_default("page.idle");
        foreign.declare_default("page.nonsense");
        let nonsense = |request: &[u8]| if request == b"30" { "NaN" } else { "12345678901" };
        thread::spawn(move || foreign.serve("page.nonsense", nonsense));
        let broker = node.authority().to_owned();
        let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let nobody = nobody.expect("a port is free").to_string();
        let (silent, web) = (peer(b""), peer(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        let (silent, web) = (silent.to_string(), web.to_string());
        let folder = node.folder().to_str().expect("the temporary folder is UTF-8").to_owned();
        let at = |port| format!("localhost:{port}");
        let (good, expired) = (at(tls.good), at(tls.expired));
        let (wrong_host, mutual, mutual_12) =
            (at(tls.wrong_host), at(tls.mutual), at(tls.mutual_12));
        let variables = [
            ("BROKER", &*broker),
            ("NOBODY", &nobody),
            ("SILENT", &silent),
            ("WEB", &web),
            ("TLS", &good),
            ("TLS_EXPIRED", &expired),
            ("TLS_OTHER_HOST", &wrong_host),
            ("TLS_MUTUAL", &mutual),
            ("TLS_12", &mutual_12),
            ("CA", &tls.ca),
            ("OTHER_CA", &tls.unknown_ca),
            ("CERT", cert),
            ("KEY", key),
            ("UNKNOWN_CERT", unknown_cert),
            ("UNKNOWN_KEY", unknown_key),
            ("OTHER_CERT", other_cert),
            ("OTHER_KEY", other_key),
            ("AMQP_URL", node.url()),
            ("RUST_LOG", "error"),
        ];
        let variables = variables.map(|(name, value)| format!("export {name}='{value}'\n"));
        Scene {
            variables: variables.concat(),
            names: vec![
                // What the resolver says of it where there is no name server.
                ("temporary failure in name resolution".into(), "name or service not known"),
                // RabbitMQ says which access from 4.0 on.
                ("configure access to".into(), "access to"),
                ("write access to".into(), "access to"),
                ("read access to".into(), "access to"),
                (broker, "rabbit:5672"),
                (nobody, "nobody:5672"),
                (silent, "silent:5672"),
                (web, "web:80"),
                (good, "rabbit:5671"),
                (expired, "expired:5671"),
                (wrong_host, "rabbit:5671"),
                (format!("127.0.0.1:{}", tls.wrong_host), "10.0.0.1:5671"),
                (mutual, "mutual:5671"),
                (mutual_12, "mutual:5671"),
                (folder, "/tmp"),
            ],
            _server: Program::start_server_at(node.url(), "page", &["--max-n", "100"]),
        }
    }

    /// All that a command prints, and its exit code.
    fn run(&self, command: &str) -> String {
        let script = format!(
            "{}exec 2>&1; {command}\ncode=$?; [ $code = 0 ] || echo \"[$code]\"",
            self.variables
        );
        let output = bash(&script).get_output().clone();
        let mut text = String::from_utf8(output.stdout).expect("messages are text");
        for (actual, name) in &self.names {
            text = text.replace(actual, name);
        }
        if let Some(at) = text.find("rpc.reply.") {
            text.replace_range(at + 10..at + 46, "<uuid>");
        }
        text.lines().filter(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect()
    }
}

/// A peer that accepts, and says no more than this.
fn peer(words: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("the socket is bound");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(words); // the other end may have had enough
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    address
}
