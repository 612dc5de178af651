//! TLS: a listener of a private node, with certificates made for the test.

use crate::support::broker::{node, Node};
use crate::support::certificates::Authority;
use crate::support::peer::Queue;
use crate::support::programs::{client, expect, Program};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::OnceLock;

/// What the listeners of the private node are, and who may talk to them.
struct Listeners {
    ca: String,
    unknown_ca: String,
    client: (String, String),
    stranger: (String, String),
    good: u16,
    expired: u16,
    wrong_host: u16,
    mutual: u16,
}

/// The node's listeners for TLS, started with the first call. It has no such listener by itself.
fn listeners() -> &'static Listeners {
    static LISTENERS: OnceLock<Listeners> = OnceLock::new();
    LISTENERS.get_or_init(|| {
        let (authority, other) = (Authority::new("ca"), Authority::new("other-ca"));
        let ca = authority.certificate();
        let here = ["localhost", "127.0.0.1", "::1"];
        let good = authority.sign("good", &here);
        let node = node();
        let user = "rpc-test-client";
        node.ctl(&["add_user", user, "never used"]);
        node.ctl(&["set_permissions", user, ".*", ".*", ".*"]);
        node.ctl(&["eval", "application:set_env(rabbit, ssl_cert_login_from, common_name)."]);
        let external = "application:set_env(rabbit, auth_mechanisms, ['PLAIN', 'EXTERNAL']).";
        node.ctl(&["eval", external]);
        // EXTERNAL looks here, too, before it trusts a listener.
        let options = "[{verify, verify_peer}, {fail_if_no_peer_cert, true}]";
        node.ctl(&["eval", &format!("application:set_env(rabbit, ssl_options, {options}).")]);
        Listeners {
            good: listen(node, &ca, &good, 3, ""),
            expired: listen(node, &ca, &authority.sign_expired("expired", &here), 4, ""),
            wrong_host: listen(node, &ca, &authority.sign("host", &["rabbit.example"]), 5, ""),
            mutual: listen(
                node,
                &ca,
                &good,
                6,
                ", {verify, verify_peer}, {fail_if_no_peer_cert, true}",
            ),
            client: authority.sign(user, &[]),
            stranger: other.sign("stranger", &[]),
            unknown_ca: other.certificate(),
            ca,
        }
    })
}

/// Has the node listen on a port of its range.
fn listen(node: &Node, ca: &str, (cert, key): &(String, String), nth: u16, options: &str) -> u16 {
    let port = node.port() + nth;
    node.ctl(&[
        "eval",
        &format!(
            "[rabbit_networking:start_ssl_listener({{Address, {port}}}, [{{cacertfile, {ca:?}}}, \
             {{certfile, {cert:?}}}, {{keyfile, {key:?}}}{options}], 1) || \
             Address <- [\"127.0.0.1\", \"::1\"]]."
        ),
    ]);
    port
}

/// One call over TLS, and all that its user sees.
#[track_caller]
fn call(host: &str, port: u16, args: &[&str], code: i32, stderr: &str) {
    let mut call = client("tls_any", args);
    let url = format!("amqps://{host}:{port}");
    let stdout = if code == 0 { "832040\n" } else { "\n" };
    expect(call.arg("30").env("AMQP_URL", url), code, stdout, stderr);
}

#[test]
fn a_call_over_tls_is_answered_over_tls() {
    let Listeners { ca, good, .. } = listeners();
    let queue = Queue::named("tls");
    for host in ["localhost", "127.0.0.1", "[::1]"] {
        let url = format!("amqps://{host}:{good}");
        let server = Program::start_at(&url, &queue, &["--ca-file", ca]);
        // More than one TLS record, and more than one frame, in both directions.
        let mut call = client(&queue, &["--ca-file", ca, "--repeat", "20", "30", "1000000"]);
        let output = call.env("AMQP_URL", &url).assert().code(0).stderr("").get_output().clone();
        assert_eq!(output.stdout.len(), 20 * (7 + 208_989));
        server.stop();
    }
}

/// The system's trust, which OpenSSL lets the environment name.
#[test]
fn the_systems_trust_is_enough() {
    let Listeners { ca, good, .. } = listeners();
    let queue = Queue::named("tls_system");
    let url = format!("amqps://localhost:{good}");
    let _server = Program::start_at(&url, &queue, &["--ca-file", ca]);
    let mut call = client(&queue, &["30"]);
    expect(call.env("AMQP_URL", &url).env("SSL_CERT_FILE", ca), 0, "832040\n", "");
}

#[test]
fn a_certificate_that_cannot_be_trusted_is_exit_code_3() {
    let Listeners { ca, unknown_ca, good, expired, wrong_host, .. } = listeners();
    let advice = "is the CA of the broker's certificate in --ca-file?";
    let unknown = format!("self-signed certificate in certificate chain: {advice}");
    let host = "hostname mismatch: the broker's certificate names another host than the URL";
    let address =
        "IP address mismatch: the broker's certificate does not name the URL's IP address";
    for (host, port, ca, reason) in [
        ("localhost", good, None, &*unknown),
        ("localhost", good, Some(unknown_ca), &unknown),
        (
            "localhost",
            expired,
            Some(ca),
            "certificate has expired: the broker's certificate has to be renewed",
        ),
        ("localhost", wrong_host, Some(ca), host),
        ("127.0.0.1", wrong_host, Some(ca), address),
    ] {
        let stderr = format!("rpc-client: no TLS with {host}:{port}: {reason}\n");
        let args = ca.map(|ca| ["--ca-file", ca]);
        call(host, *port, args.as_ref().map_or(&[], |args| args), 3, &stderr);
    }
}

#[test]
fn a_broker_that_wants_a_certificate_gets_it_or_says_so() {
    let Listeners { ca, client: files, stranger, mutual, .. } = listeners();
    let (cert, key) = files;
    let queue = Queue::named("tls_mutual");
    let with = ["--ca-file", ca, "--cert-file", cert, "--key-file", key];
    for parameter in ["", "?auth_mechanism=external"] {
        let url = format!("amqps://localhost:{mutual}{parameter}");
        let server = Program::start_at(&url, &queue, &with);
        let mut call = client(&queue, &with);
        expect(call.arg("30").env("AMQP_URL", &url), 0, "832040\n", "");
        server.stop();
    }
    let stderr = format!(
        "rpc-client: no AMQP with localhost:{mutual}: tlsv13 alert certificate required: \
         the broker wants a client certificate: --cert-file and --key-file\n"
    );
    call("localhost", *mutual, &["--ca-file", ca], 3, &stderr);
    let stderr = format!(
        "rpc-client: no AMQP with localhost:{mutual}: tlsv1 alert unknown ca: \
         the broker does not trust the CA of --cert-file\n"
    );
    let (cert, key) = stranger;
    let args = ["--ca-file", ca, "--cert-file", cert, "--key-file", key];
    call("localhost", *mutual, &args, 3, &stderr);
}

#[test]
fn a_port_without_tls_and_tls_where_it_is_not_asked_for_are_exit_code_3() {
    let Listeners { ca, good, .. } = listeners();
    let port = node().port();
    let stderr = format!(
        "rpc-client: no TLS with localhost:{port}: wrong version number: \
         is that the broker's port for TLS, 5671?\n"
    );
    call("localhost", port, &["--ca-file", ca], 3, &stderr);
    let stderr = format!(
        "rpc-client: no AMQP with localhost:{good}: \
         the peer speaks TLS: is the URL to be amqps://?\n"
    );
    let mut plain = client("any", &["30"]);
    expect(plain.env("AMQP_URL", format!("amqp://localhost:{good}")), 3, "\n", &stderr);
}

#[test]
fn a_silent_port_is_exit_code_3_and_names_the_phase() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("there are ports");
    let port = silent.local_addr().expect("it is bound").port();
    let stderr = format!(
        "rpc-client: 127.0.0.1:{port} was not ready within 300ms: timed out in the TLS handshake\n"
    );
    call("127.0.0.1", port, &["-t", "300ms"], 3, &stderr);
}

#[test]
fn a_file_that_is_of_no_use_is_exit_code_2() {
    let Listeners { ca, client: (cert, key), stranger: (_, other_key), .. } = listeners();
    let url = "amqps://localhost:1";
    let wrong = |args: &[&str], stderr: &str| {
        let mut call = client("any", args);
        let stderr = format!("rpc-client: {stderr}\n");
        expect(call.arg("30").env("AMQP_URL", url), 2, "", &stderr);
    };
    let missing = "/no/such/file";
    wrong(
        &["--ca-file", missing],
        "--ca-file /no/such/file: No such file or directory (os error 2)",
    );
    wrong(&["--ca-file", key], &format!("--ca-file {key}: it holds no certificate in PEM"));
    wrong(
        &["--cert-file", ca, "--key-file", cert],
        &format!(
            "--key-file {cert}: it holds no key in PKCS#8 PEM without a passphrase: \
             convert it by openssl pkcs8 -topk8 -nocrypt"
        ),
    );
    wrong(
        &["--cert-file", cert, "--key-file", other_key],
        &format!("--key-file {other_key}: key values mismatch: it is not the key of --cert-file"),
    );
    wrong(
        &["--cert-file", cert],
        "the following required arguments were not provided: --key-file <PEM>: try --help",
    );
    let mut plain = client("any", &["--ca-file", ca, "30"]);
    let stderr =
        "rpc-client: bad AMQP_URL: --ca-file, --cert-file and --key-file go with amqps:// only\n";
    expect(plain.env("AMQP_URL", "amqp://localhost"), 2, "", stderr);
}

/// A server that runs for months takes up what was renewed meanwhile.
#[test]
fn the_files_are_read_again_for_every_connection() {
    let Listeners { ca, unknown_ca, good, .. } = listeners();
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("renewed.pem");
    let name = file.to_str().expect("the target folder is UTF-8");
    fs::copy(unknown_ca, &file).expect("there is room for it");
    let queue = Queue::named("tls_renewed");
    let url = format!("amqps://localhost:{good}");
    let server = Program::spawn_at(&url, "rpc-server", &["--queue", &queue, "--ca-file", name]);
    server.await_log("self-signed certificate in certificate chain");
    fs::copy(ca, &file).expect("there is room for it");
    assert_eq!(server.next_line(), " [x] Awaiting RPC requests");
    server.stop();
}
