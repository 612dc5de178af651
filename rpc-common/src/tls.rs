//! TLS: whom we trust, who we are, and the handshake, which is a phase of its own.

use crate::broker::Error;
use crate::exit::in_words;
use crate::message::escape;
use native_tls::{Certificate, HandshakeError, Identity, TlsConnector, TlsStream};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What TLS is to be done with. By default the system's trust, and no certificate of our own.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct TlsFiles {
    /// CA certificates to trust in the place of the system's, for amqps://
    #[arg(long = "ca-file", value_name = "PEM")]
    ca: Option<PathBuf>,

    /// The client certificate, with its chain, for amqps://
    #[arg(long = "cert-file", value_name = "PEM", requires = "key")]
    cert: Option<PathBuf>,

    /// The key of the client certificate, in PKCS#8
    #[arg(long = "key-file", value_name = "PEM", requires = "cert")]
    key: Option<PathBuf>,
}

impl TlsFiles {
    /// Whether no file is named.
    pub(crate) fn is_default(&self) -> bool {
        *self == TlsFiles::default()
    }

    /// Reads the files. This is done for every connection, so that a server that runs for months
    /// takes up certificates that were renewed meanwhile.
    ///
    /// # Errors
    /// [`Error::File`]
    pub(crate) fn connector(&self) -> Result<TlsConnector, Error> {
        let mut builder = TlsConnector::builder();
        if let Some(file) = &self.ca {
            let wrong = |reason| wrong("--ca-file", file, reason);
            let roots = Certificate::stack_from_pem(&read("--ca-file", file)?)
                .map_err(|error| wrong(reason(&error)))?;
            if roots.is_empty() {
                return Err(wrong("it holds no certificate in PEM".into()));
            }
            builder.disable_built_in_roots(true);
            for root in roots {
                builder.add_root_certificate(root);
            }
        }
        let mut pair = None;
        if let (Some(cert_file), Some(key_file)) = (&self.cert, &self.key) {
            let (cert, key) = (read("--cert-file", cert_file)?, read("--key-file", key_file)?);
            if Certificate::stack_from_pem(&cert).map_or(true, |chain| chain.is_empty()) {
                let reason = "it holds no certificate in PEM";
                return Err(wrong("--cert-file", cert_file, reason.into()));
            }
            let identity = Identity::from_pkcs8(&cert, &key).map_err(|_| {
                let reason = "it holds no key in PKCS#8 PEM without a passphrase: \
                              convert it by openssl pkcs8 -topk8 -nocrypt";
                wrong("--key-file", key_file, reason.into())
            })?;
            builder.identity(identity);
            pair = Some(key_file);
        }
        builder.build().map_err(|error| match pair {
            Some(key_file) => wrong("--key-file", key_file, reason(&error)),
            None => Error::Tls { target: "this machine".into(), reason: reason(&error) },
        })
    }
}

fn read(option: &'static str, file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|error| wrong(option, file, in_words(&error)))
}

pub(crate) fn wrong(option: &'static str, file: &Path, reason: String) -> Error {
    Error::File { option, file: escape(file.as_os_str().as_encoded_bytes()).to_string(), reason }
}

/// The TLS handshake, on a socket that blocks. The peer's certificate has to be signed by whom we
/// trust, to be valid now, and to name `host`, which is a host name or an IP address.
///
/// # Errors
/// The reason, in words.
pub(crate) fn handshake(
    connector: &TlsConnector,
    host: &str,
    socket: TcpStream,
) -> Result<TlsStream<TcpStream>, String> {
    connector.connect(host, socket).map_err(|error| match error {
        HandshakeError::Failure(error) => reason(&error),
        HandshakeError::WouldBlock(_) => "the handshake would block".into(),
    })
}

/// The error of an established stream in words that its reader understands. An end without TLS's
/// farewell is an end all the same.
pub(crate) fn explain(error: io::Error) -> io::Result<usize> {
    match error.kind() {
        io::ErrorKind::Other if error.to_string().contains(UNEXPECTED_EOF) => Ok(0),
        io::ErrorKind::Other => Err(io::Error::other(reason(&error))),
        _ => Err(error),
    }
}

const UNEXPECTED_EOF: &str = "unexpected eof";

/// What a user can do about what OpenSSL says: a part of its words, and the next move.
const ADVICE: &[(&str, &str)] = &[
    ("certificate required", "the broker wants a client certificate: --cert-file and --key-file"),
    ("handshake failure", "does the broker want a client certificate, --cert-file?"),
    ("unknown ca", "the broker does not trust the CA of --cert-file"),
    ("hostname mismatch", "the broker's certificate names another host than the URL"),
    ("IP address mismatch", "the broker's certificate does not name the URL's IP address"),
    ("has expired", "the broker's certificate has to be renewed"),
    ("issuer certificate", "is the CA of the broker's certificate in --ca-file?"),
    ("self-signed certificate", "is the CA of the broker's certificate in --ca-file?"),
    ("key values mismatch", "it is not the key of --cert-file"),
    ("wrong version number", "is that the broker's port for TLS, 5671?"),
    (UNEXPECTED_EOF, "is that the broker's port for TLS, 5671?"),
];

/// Of OpenSSL's "error:CODE:library:function:reason:file:line: (what is wrong with the certificate)"
/// the part that is meant for people, and what they can do about it. Other libraries' words are left
/// as they are.
fn reason(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    let words = match text.rsplit_once(": (").and_then(|(_, verdict)| verdict.strip_suffix(')')) {
        Some(verdict) => verdict,
        None if text.starts_with("error:") => text.split(':').nth(4).unwrap_or(&text),
        None => &text,
    };
    let words = escape(words.as_bytes()).to_string();
    match ADVICE.iter().find(|(part, _)| words.contains(part)) {
        Some((_, advice)) => format!("{words}: {advice}"),
        None => words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_openssl_only_the_words_for_people_are_left() {
        for (text, words) in [
            (
                "error:0A000086:SSL routines:tls_post_process_server_certificate:certificate verify \
                 failed:../ssl/statem/statem_clnt.c:1889: (certificate has expired)",
                "certificate has expired: the broker's certificate has to be renewed",
            ),
            (
                "error:0A00010B:SSL routines:ssl3_get_record:wrong version number:../ssl/record/ssl3_record.c:354:",
                "wrong version number: is that the broker's port for TLS, 5671?",
            ),
            ("broken pipe", "broken pipe"),
        ] {
            assert_eq!(reason(&io::Error::other(text)), words);
        }
    }
}
