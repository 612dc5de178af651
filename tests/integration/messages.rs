//! The error messages of both programs on one page: `messages.txt`, for people who check how they
//! read.

use crate::support::broker::{private_node, Node};
use crate::support::peer::Peer;
use crate::support::programs::{bash, Program};
use crate::tls::listeners;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::{fs, thread};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/integration/messages.txt");

/// Each line that begins with `$ ` is a command. The lines below are all that it prints, without
/// empty lines, and its exit code, unless it is 0. Lines that begin with `#` are comments and
/// headings.
#[test]
fn the_programs_print_what_the_page_of_messages_shows() {
    let page = fs::read_to_string(PAGE).expect("the file exists");
    let setup = Setup::new(private_node());
    let mut actual = String::new();
    let mut follows_comment = false;
    for line in page.lines() {
        let is_comment = line.starts_with("# ");
        if !(is_comment || line.starts_with("## ") || line.starts_with("$ ")) {
            continue; // expected output
        }
        if !(actual.is_empty() || follows_comment && is_comment) {
            actual.push('\n');
        }
        let output = line.strip_prefix("$ ").map(|command| setup.run(command));
        actual.extend([line, "\n", output.as_deref().unwrap_or_default()]);
        follows_comment = is_comment;
    }
    if actual != page {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("messages.txt");
        fs::write(&file, &actual).expect("the folder is writable");
        let new = actual.lines().find(|line| !page.contains(line));
        panic!(
            "{PAGE} differs from {}, perhaps in: {new:#?}",
            file.display()
        );
    }
}

/// What the commands of the page use: shell variables, a server, and peers that misbehave.
struct Setup {
    /// Shell code that exports the variables.
    variables: String,
    /// Texts that differ between runs, and what the page has in their place.
    placeholders: Vec<(String, &'static str)>,
    _server: Program,
}

impl Setup {
    fn new(node: &Node) -> Self {
        let tls = listeners();
        let (cert, key) = &tls.client;
        let (unknown_cert, unknown_key) = &tls.unknown_user;
        let (other_cert, other_key) = &tls.other_ca_client;
        for (user, permissions) in [
            ("no-configure", ["^$", ".*", ".*"]),
            ("no-write", [".*", "^$", ".*"]),
            ("no-read", [".*", ".*", "^$"]),
        ] {
            node.rabbitmqctl(&["add_user", user, "page"]);
            node.rabbitmqctl(&[&["set_permissions", user][..], &permissions].concat());
        }
        node.rabbitmqctl(&["add_user", "no-vhost", "page"]);
        let peer = Peer::connect_to(node.url());
        peer.declare_default("page.idle");
        peer.declare_default("page.nonsense");
        peer.declare("page.stream", "stream");
        let nonsense = |request: &[u8]| {
            if request == b"30" {
                "NaN"
            } else {
                "12345678901"
            }
        };
        thread::spawn(move || peer.serve("page.nonsense", nonsense));
        let broker = node.authority().to_owned();
        let unused = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let unused = unused.expect("a port is free").to_string();
        let silent = listen_and_send(b"");
        let web = listen_and_send(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let silent = silent.to_string();
        let web = web.to_string();
        let folder = node
            .folder()
            .to_str()
            .expect("the temporary folder is UTF-8")
            .to_owned();
        let at = |port| format!("localhost:{port}");
        let good = at(tls.good);
        let expired = at(tls.expired);
        let wrong_host = at(tls.wrong_host);
        let mutual = at(tls.mutual);
        let mutual_12 = at(tls.mutual_12);
        let variables = [
            ("BROKER", &*broker),
            ("NOBODY", &unused),
            ("SILENT", &silent),
            ("WEB", &web),
            ("TLS", &good),
            ("TLS_EXPIRED", &expired),
            ("TLS_OTHER_HOST", &wrong_host),
            ("TLS_MUTUAL", &mutual),
            ("TLS_12", &mutual_12),
            ("CA", &tls.ca),
            ("OTHER_CA", &tls.other_ca),
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
        Setup {
            variables: variables.concat(),
            placeholders: vec![
                // The resolver's error on a machine without a name server.
                (
                    "temporary failure in name resolution".into(),
                    "name or service not known",
                ),
                // RabbitMQ names the kind of access from 4.0 on.
                ("configure access to".into(), "access to"),
                ("write access to".into(), "access to"),
                ("read access to".into(), "access to"),
                (broker, "rabbit:5672"),
                (unused, "nobody:5672"),
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

    /// Runs a command, and returns its output as the page shows it.
    fn run(&self, command: &str) -> String {
        let script = format!(
            "{}exec 2>&1; {command}\ncode=$?; [ $code = 0 ] || echo \"[$code]\"",
            self.variables
        );
        let output = bash(&script).get_output().clone();
        let mut text = String::from_utf8(output.stdout).expect("messages are text");
        for (actual, placeholder) in &self.placeholders {
            text = text.replace(actual, placeholder);
        }
        if let Some(at) = text.find("rpc.reply.") {
            text.replace_range(at + 10..at + 46, "<uuid>");
        }
        text.lines()
            .filter(|line| !line.is_empty())
            .map(|line| format!("{line}\n"))
            .collect()
    }
}

/// Listens on a port, and sends `bytes` to each connection, and nothing more.
fn listen_and_send(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("the socket is bound");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(bytes); // fails if the client has closed the connection
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    address
}
