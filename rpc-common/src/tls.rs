//! TLS: whom we trust, who we are, and the handshake, which is a phase of its own.

use crate::broker::Error;
use crate::exit::in_words;
use crate::message::escape;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{AlertDescription, CertificateError, ClientConfig, ClientConnection, RootCertStore};
use rustls_native_certs::load_native_certs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, mem};

/// What TLS is to be done with. By default the system's trust, and no certificate of our own.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct TlsFiles {
    /// CA certificates to trust in the place of the system's, for amqps://
    #[arg(long = "ca-file", value_name = "PEM")]
    ca: Option<PathBuf>,

    /// The client certificate, with its chain, for amqps://
    #[arg(long = "cert-file", value_name = "PEM", requires = "key")]
    cert: Option<PathBuf>,

    /// The key of the client certificate
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
    pub(crate) fn config(&self) -> Result<ClientConfig, Error> {
        let mut roots = RootCertStore::empty();
        if let Some(file) = &self.ca {
            for root in certificates("--ca-file", file)? {
                let garbled =
                    |_| wrong("--ca-file", file, "it holds a certificate that is garbled");
                roots.add(root).map_err(garbled)?;
            }
        } else {
            // What cannot be parsed of so many is of no interest, unless nothing is left.
            let (added, _) = roots.add_parsable_certificates(load_native_certs().certs);
            if added == 0 {
                return Err(Error::NoTrust);
            }
        }
        let config = ClientConfig::builder().with_root_certificates(roots);
        let (Some(cert), Some(key_file)) = (&self.cert, &self.key) else {
            return Ok(config.with_no_client_auth());
        };
        let chain = certificates("--cert-file", cert)?;
        let key = PrivateKeyDer::from_pem_slice(&read("--key-file", key_file)?).map_err(|_| {
            wrong("--key-file", key_file, "it holds no key in PEM without passphrase")
        })?;
        config.with_client_auth_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                wrong("--key-file", key_file, "it is not the key of --cert-file")
            }
            rustls::Error::InvalidCertificate(bad) => {
                wrong("--cert-file", cert, &format!("it {}", fault(&bad)))
            }
            error => wrong("--key-file", key_file, &format!("it is of no use: {error}")),
        })
    }
}

fn certificates(option: &'static str, file: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = read(option, file)?;
    match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(wrong(option, file, "it holds no certificate in PEM")),
    }
}

fn read(option: &'static str, file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|error| wrong(option, file, &in_words(&error)))
}

pub(crate) fn wrong(option: &'static str, file: &Path, reason: &str) -> Error {
    let file = escape(file.as_os_str().as_encoded_bytes()).to_string();
    Error::File { option, file, reason: reason.into() }
}

/// A TCP connection with TLS on it.
pub(crate) struct TlsStream {
    connection: ClientConnection,
    pub(crate) socket: TcpStream,
    /// How many bytes were taken from the writer that have not been told so, because the socket would
    /// block: it comes with the same bytes again.
    owed: usize,
}

impl TlsStream {
    /// The TLS handshake, on a socket that blocks. The peer's certificate has to be signed by whom we
    /// trust, to be valid now, and to name `host`, which is a host name or an IP address.
    ///
    /// # Errors
    /// With the reason in words.
    pub(crate) fn handshake(
        config: ClientConfig,
        host: &str,
        mut socket: TcpStream,
    ) -> io::Result<Self> {
        let host = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let mut connection =
            ClientConnection::new(Arc::new(config), host).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket).map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => io::Error::new(ErrorKind::UnexpectedEof, HUNG_UP),
                _ => explain(error),
            })?;
        }
        Ok(TlsStream { connection, socket, owed: 0 })
    }

    fn receive(&mut self) -> io::Result<()> {
        self.connection.read_tls(&mut self.socket)?;
        let taken = self.connection.process_new_packets();
        taken.map(drop).map_err(|error| explain(io::Error::new(ErrorKind::InvalidData, error)))
    }
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.receive()?,
                // An end without TLS's farewell is an end all the same.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.owed == 0 {
            self.owed = self.connection.writer().write(bytes)?;
        }
        self.flush()?;
        Ok(mem::take(&mut self.owed))
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            if let Err(error) = self.connection.write_tls(&mut self.socket) {
                // A broker that refuses our certificate says so and hangs up: what it said is still
                // to be read when writing fails.
                let hung_up =
                    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
                let cause = if hung_up { self.receive().err() } else { None };
                return Err(cause
                    .filter(|cause| cause.kind() == ErrorKind::InvalidData)
                    .unwrap_or(error));
            }
        }
        Ok(())
    }
}

const HUNG_UP: &str = "the peer hung up: is that the broker's port for TLS, 5671?";

/// What rustls found wrong, in words that lead on.
fn explain(error: io::Error) -> io::Error {
    let words = match error.get_ref().and_then(|error| error.downcast_ref()) {
        Some(rustls::Error::InvalidCertificate(bad)) => format!("its certificate {}", fault(bad)),
        Some(rustls::Error::AlertReceived(alert)) => refusal(*alert).into(),
        Some(rustls::Error::InvalidMessage(_)) => {
            "the peer does not speak TLS: is that the broker's port for TLS, 5671?".into()
        }
        _ => return error,
    };
    io::Error::new(ErrorKind::InvalidData, words)
}

/// Why a certificate is not accepted.
fn fault(bad: &CertificateError) -> &'static str {
    use CertificateError as Bad;
    match bad {
        Bad::UnknownIssuer => "is signed by an unknown CA: is that in --ca-file?",
        Bad::Expired | Bad::ExpiredContext { .. } => "has expired: it has to be renewed there",
        Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
            "is not valid yet: is this machine's clock right?"
        }
        Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
            "is for another host: is the host in the URL right?"
        }
        Bad::BadEncoding => "is garbled",
        bad => match bad.to_string() {
            words if words.contains("CaUsedAsEndEntity") => {
                "is a CA's own: it has to have one that a CA has signed"
            }
            words if words.contains("UnsupportedCertVersion") => {
                "is X.509 version 1: it has to be made with extensions, as version 3"
            }
            _ => "is not fit for TLS",
        },
    }
}

/// What the peer meant by an alert (RFC 8446, 6.2), of those that concern us.
fn refusal(alert: AlertDescription) -> &'static str {
    use AlertDescription as Alert;
    match alert {
        Alert::CertificateRequired => "it wants a client certificate: --cert-file and --key-file",
        Alert::HandshakeFailure => "it refused: does it want a client certificate, --cert-file?",
        Alert::UnknownCA => "it does not trust the CA of --cert-file",
        Alert::CertificateExpired => "the certificate in --cert-file has expired",
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateUnknown
        | Alert::AccessDenied => "it does not accept the certificate in --cert-file",
        Alert::ProtocolVersion => "it speaks neither TLS 1.2 nor 1.3",
        _ => "it broke off TLS: its log says why",
    }
}
