//! TLS: the private node listens with certificates that the tests make. `messages.txt` has the
//! errors.

use crate::support::broker::{private_node, Node};
use crate::support::certificates::Authority;
use crate::support::peer::Queue;
use crate::support::programs::{assert_output, client, program_folder, Program};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// The TLS listeners of the private node: their ports, and the certificate files of clients.
pub(crate) struct Listeners {
    pub(crate) ca: String,
    pub(crate) other_ca: String,
    pub(crate) client: (String, String),
    /// Signed by our CA, but not a user of the broker.
    pub(crate) unknown_user: (String, String),
    /// Signed by another CA.
    pub(crate) other_ca_client: (String, String),
    pub(crate) good: u16,
    pub(crate) expired: u16,
    pub(crate) wrong_host: u16,
    /// Requires a client certificate.
    pub(crate) mutual: u16,
    /// Like `mutual`, with TLS 1.2 only.
    pub(crate) mutual_12: u16,
}

/// The TLS listeners of the private node. The first call starts them.
pub(crate) fn listeners() -> &'static Listeners {
    static LISTENERS: OnceLock<Listeners> = OnceLock::new();
    LISTENERS.get_or_init(|| {
        let node = private_node();
        // Below the folder of the node, because the node reads the files, too.
        let [authority, other] = ["ca", "other-ca"].map(|name| Authority::new(node.folder(), name));
        let ca = authority.certificate();
        let here = ["localhost", "127.0.0.1", "::1"];
        let good = authority.sign("good", &here);
        let user = "rpc-test-client";
        node.add_user(user, "never used");
        node.rabbitmqctl(&[
            "eval",
            "application:set_env(rabbit, ssl_cert_login_from, common_name).",
        ]);
        let external =
            "application:set_env(rabbit, auth_mechanisms, ['PLAIN', 'AMQPLAIN', 'EXTERNAL']).";
        node.rabbitmqctl(&["eval", external]);
        // The EXTERNAL mechanism checks these options, too, not only those of the listener.
        let options = "[{verify, verify_peer}, {fail_if_no_peer_cert, true}]";
        node.rabbitmqctl(&[
            "eval",
            &format!("application:set_env(rabbit, ssl_options, {options})."),
        ]);
        let mutual = ", {verify, verify_peer}, {fail_if_no_peer_cert, true}";
        Listeners {
            good: listen(node, &ca, &good, 3, ""),
            expired: listen(node, &ca, &authority.sign_expired("expired", &here), 4, ""),
            wrong_host: listen(
                node,
                &ca,
                &authority.sign("host", &["rabbit.example"]),
                5,
                "",
            ),
            mutual: listen(node, &ca, &good, 6, mutual),
            mutual_12: listen(
                node,
                &ca,
                &good,
                7,
                &format!("{mutual}, {{versions, ['tlsv1.2']}}"),
            ),
            client: authority.sign(user, &[]),
            unknown_user: authority.sign("unknown-user", &[]),
            other_ca_client: other.sign("stranger", &[]),
            other_ca: other.certificate(),
            ca,
        }
    })
}

/// Starts a TLS listener of the node, on the `nth` port of its range.
fn listen(node: &Node, ca: &str, (cert, key): &(String, String), nth: u16, options: &str) -> u16 {
    let files = format!("{{cacertfile, {ca:?}}}, {{certfile, {cert:?}}}, {{keyfile, {key:?}}}");
    listen_with(node, nth, &format!("{files}{options}"))
}

/// Like `listen`, with all options in Erlang's form.
pub(crate) fn listen_with(node: &Node, nth: u16, options: &str) -> u16 {
    let port = node.port() + nth;
    node.rabbitmqctl(&[
        "eval",
        &format!(
            "[rabbit_networking:start_ssl_listener({{Address, {port}}}, [{options}], 1) || \
             Address <- [\"127.0.0.1\", \"::1\"]]."
        ),
    ]);
    port
}

#[test]
fn a_call_over_tls_is_answered_over_tls() {
    let Listeners { ca, good, .. } = listeners();
    let queue = Queue::named("tls");
    for host in ["localhost", "127.0.0.1", "[::1]"] {
        let url = format!("amqps://{host}:{good}");
        let server = Program::start_server_at(&url, &queue, &["--ca-file", ca]);
        // More than one TLS record, and more than one frame, in both directions.
        let mut call = client(
            &queue,
            &["--ca-file", ca, "--repeat", "20", "30", "1000000"],
        );
        let output = call
            .env("AMQP_URL", &url)
            .assert()
            .code(0)
            .stderr("")
            .get_output()
            .clone();
        assert_eq!(output.stdout.len(), 20 * (7 + 208_989));
        server.stop();
    }
}

/// `SSL_CERT_FILE` names the CA certificates of the system, as for OpenSSL.
#[test]
fn the_systems_ca_certificates_are_trusted_by_default() {
    let Listeners { ca, good, .. } = listeners();
    let queue = Queue::named("tls_system");
    let url = format!("amqps://localhost:{good}");
    let _server = Program::start_server_at(&url, &queue, &["--ca-file", ca]);
    let mut call = client(&queue, &["30"]);
    assert_output(
        call.env("AMQP_URL", &url).env("SSL_CERT_FILE", ca),
        0,
        "832040\n",
        "",
    );
}

#[test]
fn a_broker_that_requires_a_client_certificate_gets_it() {
    let Listeners {
        ca,
        client: (cert, key),
        mutual,
        ..
    } = listeners();
    let queue = Queue::named("tls_mutual");
    let files = ["--ca-file", ca, "--cert-file", cert, "--key-file", key];
    for parameter in ["", "?auth_mechanism=external"] {
        let url = format!("amqps://localhost:{mutual}{parameter}");
        let server = Program::start_server_at(&url, &queue, &files);
        let mut call = client(&queue, &files);
        assert_output(call.arg("30").env("AMQP_URL", &url), 0, "832040\n", "");
        server.stop();
    }
}

/// A server that runs for months uses certificates that are renewed meanwhile.
#[test]
fn the_files_are_read_again_for_every_connection() {
    let Listeners {
        ca, other_ca, good, ..
    } = listeners();
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("renewed.pem");
    let name = file.to_str().expect("the target folder is UTF-8");
    fs::copy(other_ca, &file).expect("the folder is writable");
    let queue = Queue::named("tls_renewed");
    let url = format!("amqps://localhost:{good}");
    let server = Program::spawn_at(&url, "rpc-server", &["--queue", &queue, "--ca-file", name]);
    server.wait_for_log("signed by an unknown CA");
    fs::copy(ca, &file).expect("the folder is writable");
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.stop();
}

/// The check of the options must leave a pipe to the connection, and the next connection needs its
/// contents again.
#[test]
fn files_that_are_pipes_are_read_once_and_kept() {
    let Listeners {
        ca,
        client: (cert, key),
        mutual,
        ..
    } = listeners();
    let node = private_node();
    let user = "piped-files";
    node.add_user(user, "sesame");
    let queue = Queue::named("tls_pipes");
    let script = format!(
        "exec {} --queue {} --ca-file <(cat {ca}) --cert-file <(cat {cert}) --key-file <(cat {key})",
        program_folder().join("rpc-server").display(),
        &*queue
    );
    let url = format!("amqps://{user}:sesame@localhost:{mutual}");
    let mut bash = Command::new("bash");
    let server = Program::spawn_command(bash.args(["-c", &script]).env("AMQP_URL", url));
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    node.rabbitmqctl(&["close_all_user_connections", user, "test"]);
    server.wait_for_log("retrying");
    server.wait_for_log("connected to");
    server.stop();
    node.rabbitmqctl(&["delete_user", user]);
}

/// As OpenSSL and Python do: the certificate itself is trusted, though no CA has signed it.
#[test]
fn a_self_signed_certificate_in_the_ca_file_is_accepted_for_its_names() {
    let node = private_node();
    let [cert, key] = ["self.pem", "self.key"].map(|name| node.folder().join(name));
    let [cert, key] = [cert, key].map(|path| path.to_str().unwrap().to_owned());
    let openssl = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args([
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=DNS:localhost",
        ])
        .args(["-keyout", &key, "-out", &cert])
        .output();
    assert!(openssl.expect("openssl is installed").status.success());
    let port = listen(node, &cert, &(cert.clone(), key), 12, "");
    let queue = Queue::named("self_signed");
    let _server = Program::start_server_at(node.url(), &queue, &[]);
    let call = |host: &str, ca: &str| {
        let mut call = client(&queue, &["--ca-file", ca, "30"]);
        call.env("AMQP_URL", format!("amqps://{host}:{port}"));
        call
    };
    assert_output(&mut call("localhost", &cert), 0, "832040\n", "");
    let error = format!(
        "rpc-client: 127.0.0.1:{port} failed the TLS handshake: the certificate does not match \
         host '127.0.0.1', only localhost: is the host in the URL right?\n"
    );
    assert_output(&mut call("127.0.0.1", &cert), 3, "", &error);
    call("localhost", &listeners().ca).assert().code(3);
    let mut call = call("localhost", &cert);
    call.env("SSL_CERT_FILE", "/no/such");
    assert_output(&mut call, 0, "832040\n", "");
    let mut call = client(&queue, &["30"]);
    call.env("AMQP_URL", format!("amqps://localhost:{port}"))
        .env("SSL_CERT_FILE", "/no/such");
    let error = "rpc-client: SSL_CERT_FILE /no/such: no such file or directory\n";
    assert_output(&mut call, 2, "", error);
}
