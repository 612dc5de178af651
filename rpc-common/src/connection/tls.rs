//! TLS: the CA certificates to trust, the client certificate, the stream, and the errors in plain
//! words.

use super::deadline::Deadline;
use super::error::ErrorKind;
use super::option_file::OptionFile;
use crate::text::{describe_io_error, escape};
use rustix::event::PollFlags;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_name, ResolvesClientCert, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct,
    RootCertStore, SignatureScheme,
};
use rustls_native_certs::load_native_certs;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::{env, mem};

/// Option of the CA certificates, in errors.
const CA: &str = "--ca-file";

/// Option of the client certificate, in errors.
const CERT: &str = "--cert-file";

/// Option of the client certificate's key, in errors.
const KEY: &str = "--key-file";

/// Variable of the file with the CA certificates that OpenSSL and we trust in place of the system's.
const CERTS_VARIABLE: &str = "SSL_CERT_FILE";

/// The files for TLS. By default the system's CA certificates are trusted, and there is no client
/// certificate.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TlsFiles {
    /// Trust these CA certificates, not the system's
    #[arg(long = "ca-file", value_name = "PEM")]
    ca: Option<OptionFile>,

    /// Client certificate, with its chain
    #[arg(long = "cert-file", value_name = "PEM", requires = "key")]
    cert: Option<OptionFile>,

    /// Key of the client certificate
    #[arg(long = "key-file", value_name = "PEM", requires = "cert")]
    key: Option<OptionFile>,
}

impl TlsFiles {
    /// Whether no file is named.
    pub(crate) fn is_empty(&self) -> bool {
        self.named().next().is_none()
    }

    /// The files that are named, and their options.
    fn named(&self) -> impl Iterator<Item = (&'static str, &OptionFile)> {
        let files = [(CA, &self.ca), (CERT, &self.cert), (KEY, &self.key)];
        files
            .into_iter()
            .filter_map(|(option, file)| Some((option, file.as_ref()?)))
    }

    /// Checks the files, so that an error is known before anything is tried. A pipe can be read
    /// only once, and is left to the connection.
    ///
    /// # Errors
    /// As [`client_config`](Self::client_config).
    pub(crate) fn validate(&self, deadline: &Deadline) -> Result<(), ErrorKind> {
        let mut are_rereadable = true;
        for (option, file) in self.named() {
            are_rereadable &= file.is_rereadable(option)?;
        }
        if are_rereadable {
            self.client_config(deadline)?;
        }
        Ok(())
    }

    /// Reads the files. Done for every connection, so that a server uses renewed certificates
    /// without a restart.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] or [`ErrorKind::NoCaCertificates`].
    pub(crate) fn client_config(&self, deadline: &Deadline) -> Result<TlsConfig, ErrorKind> {
        let trusted = match &self.ca {
            Some(file) => read_certificates(CA, file, deadline)?,
            None => Vec::new(),
        };
        let roots = self.roots(&trusted)?;
        let verifier = WebPkiServerVerifier::builder(roots.into())
            .build()
            .map_err(|_| ErrorKind::NoCaCertificates)?;
        let builder = ClientConfig::builder()
            .dangerous() // not so: it verifies what rustls verifies, with one exception
            .with_custom_certificate_verifier(Arc::new(Verifier { verifier, trusted }));
        let (Some(cert_file), Some(key_file)) = (&self.cert, &self.key) else {
            let was_asked = Arc::<AtomicBool>::default();
            let resolver = NoCertificate(was_asked.clone());
            let config = builder.with_client_cert_resolver(Arc::new(resolver));
            return Ok(TlsConfig { config, was_asked });
        };
        let bad_cert = |reason: &str| cert_file.bad(CERT, reason);
        let bad_key = |reason: &str| key_file.bad(KEY, reason);
        let chain = read_certificates(CERT, cert_file, deadline)?;
        let key = PrivateKeyDer::from_pem_slice(&key_file.read(KEY, deadline)?)
            .map_err(|_| bad_key("contains no unencrypted PEM private key"))?;
        let config = builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => bad_key("is not the key of --cert-file"),
                error @ rustls::Error::InvalidCertificate(_) => {
                    bad_cert(&describe_tls_error(&error, "", false))
                }
                error => bad_key(&format!("cannot be used: {error}")),
            })?;
        let was_asked = Arc::default(); // it is not: we have one
        Ok(TlsConfig { config, was_asked })
    }

    fn roots(&self, trusted: &[CertificateDer<'static>]) -> Result<RootCertStore, ErrorKind> {
        let mut roots = RootCertStore::empty();
        if let Some(file) = &self.ca {
            for certificate in trusted {
                roots
                    .add(certificate.clone())
                    .map_err(|_| file.bad(CA, "contains a damaged certificate"))?;
            }
        } else {
            if let Some(path) = env::var_os(CERTS_VARIABLE).map(PathBuf::from) {
                // Else the certificates of the system would not be trusted, without a word.
                File::open(&path).map_err(|error| {
                    ErrorKind::bad_file(CERTS_VARIABLE, &path, &describe_io_error(&error))
                })?;
            }
            // A system's store may contain some that cannot be parsed; the others are enough.
            let (added, _) = roots.add_parsable_certificates(load_native_certs().certs);
            if added == 0 {
                return Err(ErrorKind::NoCaCertificates);
            }
        }
        Ok(roots)
    }
}

fn read_certificates(
    option: &str,
    file: &OptionFile,
    deadline: &Deadline,
) -> Result<Vec<CertificateDer<'static>>, ErrorKind> {
    let pem = file.read(option, deadline)?;
    match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(file.bad(option, "contains no PEM certificate")),
    }
}

/// Verifies the broker's certificate as rustls does. But one that is trusted itself, byte for byte,
/// need not be signed by another: rustls refuses it if it is a CA certificate, as that of
/// `openssl req -x509` is, and OpenSSL does not.
#[derive(Debug)]
struct Verifier {
    verifier: Arc<WebPkiServerVerifier>,
    /// The certificates of `--ca-file`.
    trusted: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer,
        intermediates: &[CertificateDer],
        host: &ServerName,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified =
            self.verifier
                .verify_server_cert(certificate, intermediates, host, ocsp_response, now);
        match verified {
            // webpki has checked before that the certificate is valid now.
            Err(rustls::Error::InvalidCertificate(error))
                if is_ca_as_end_entity(&error) && self.trusted.contains(certificate) =>
            {
                let parsed = ParsedCertificate::try_from(certificate)?;
                verify_server_name(&parsed, host)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// rustls has no variant for this error of webpki.
fn is_ca_as_end_entity(error: &CertificateError) -> bool {
    error.to_string().contains("CaUsedAsEndEntity")
}

/// What a TLS connection needs.
#[derive(Clone)]
pub(crate) struct TlsConfig {
    config: ClientConfig,
    /// Whether the broker has asked for a client certificate, and there is none.
    was_asked: Arc<AtomicBool>,
}

impl TlsConfig {
    /// Describes why the handshake failed.
    pub(crate) fn describe(&self, error: &rustls::Error, host: &str) -> String {
        describe_tls_error(error, host, self.was_asked.load(Ordering::Relaxed))
    }
}

/// There is no client certificate. Notes whether the broker asks for one.
#[derive(Debug)]
struct NoCertificate(Arc<AtomicBool>);

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A TCP connection with TLS.
pub(crate) struct TlsStream {
    connection: ClientConnection,
    pub(crate) socket: TcpStream,
    /// As in [`TlsConfig`]. With TLS 1.3 the broker refuses us after the handshake.
    was_asked: Arc<AtomicBool>,
    /// Plaintext that is encrypted but not yet reported as written; the caller passes the same
    /// bytes again.
    unreported: usize,
}

impl TlsStream {
    /// Does the TLS handshake on a socket that does not block. The peer's certificate must be
    /// signed by a trusted CA, be valid now, and match `host`, a host name or an IP address.
    ///
    /// # Errors
    /// With a [`rustls::Error`] inside, where TLS itself failed; `TimedOut` when the deadline
    /// passes.
    pub(crate) fn handshake(
        config: &TlsConfig,
        host: &str,
        mut socket: TcpStream,
        deadline: &Deadline,
    ) -> io::Result<Self> {
        let host = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let mut connection = ClientConnection::new(Arc::new(config.config.clone()), host)
            .map_err(io::Error::other)?;
        while connection.is_handshaking() || connection.wants_write() {
            match connection.complete_io(&mut socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let events = if connection.wants_write() {
                        PollFlags::OUT
                    } else {
                        PollFlags::IN
                    };
                    deadline.wait_for(&socket, events)?;
                }
                result => drop(result?),
            }
        }
        Ok(TlsStream {
            connection,
            socket,
            was_asked: config.was_asked.clone(),
            unreported: 0,
        })
    }

    /// The version of TLS that both sides agreed on, for the log.
    pub(crate) fn version(&self) -> String {
        self.connection
            .protocol_version()
            .map_or_else(String::new, |version| format!("{version:?}"))
    }

    fn receive(&mut self) -> io::Result<()> {
        self.connection.read_tls(&mut self.socket)?;
        match self.connection.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                describe_tls_error(&error, "", self.was_asked.load(Ordering::Relaxed)),
            )),
        }
    }

    /// Whether plaintext, or the end of the stream, waits to be read.
    pub(crate) fn has_plaintext(&mut self) -> bool {
        let state = self.connection.process_new_packets();
        state.is_ok_and(|state| state.plaintext_bytes_to_read() > 0 || state.peer_has_closed())
    }

    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.receive()?,
                // The peer closed the socket without close_notify.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                result => return result,
            }
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.unreported == 0 {
            self.unreported = self.connection.writer().write(bytes)?;
        }
        while self.connection.wants_write() {
            let written = self.connection.write_tls(&mut self.socket);
            written.map_err(|error| self.explain_write_error(error))?;
        }
        Ok(mem::take(&mut self.unreported))
    }

    /// A broker that refuses our certificate sends an alert and closes the socket. The alert can
    /// still be read when writing fails.
    fn explain_write_error(&mut self, error: io::Error) -> io::Error {
        let is_closed = matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        );
        match is_closed.then(|| self.receive()) {
            Some(Err(cause)) if cause.kind() == io::ErrorKind::InvalidData => cause,
            _ => error,
        }
    }
}

/// Describes an error of rustls on a connection to `host`, whose broker may have asked for a client
/// certificate that there is not.
fn describe_tls_error(error: &rustls::Error, host: &str, was_asked: bool) -> String {
    match error {
        rustls::Error::InvalidCertificate(error) => {
            format!(
                "the certificate {}",
                describe_certificate_error(error, host)
            )
        }
        rustls::Error::AlertReceived(alert) => describe_alert(*alert, was_asked).into(),
        error => error.to_string(),
    }
}

fn describe_certificate_error(error: &CertificateError, host: &str) -> String {
    use CertificateError as Kind;
    let text = match error {
        Kind::UnknownIssuer => "is signed by an unknown CA: is that CA in --ca-file?",
        Kind::Expired | Kind::ExpiredContext { .. } => "has expired: renew it on the broker",
        Kind::NotValidYet | Kind::NotValidYetContext { .. } => {
            "is not valid yet: is this machine's clock right?"
        }
        Kind::NotValidForName | Kind::NotValidForNameContext { .. } => {
            return format!(
                "does not match host '{host}'{}: is the host in the URL right?",
                names_in(error)
            )
        }
        Kind::BadEncoding => "is damaged",
        // rustls has no variants for these errors of webpki.
        error => match error.to_string() {
            text if text.contains("CaUsedAsEndEntity") => {
                "is a CA certificate: put it into --ca-file, or sign one with it for the broker"
            }
            text if text.contains("UnsupportedCertVersion") => {
                "is X.509 version 1: version 3 is required"
            }
            // A curve, a key size, a hash, or a purpose.
            text => return format!("cannot be used for TLS: {}", escape(text.as_bytes())),
        },
    };
    text.into()
}

/// The names of a certificate that does not match. The common name is not one of them: TLS no longer
/// uses it.
fn names_in(error: &CertificateError) -> String {
    let CertificateError::NotValidForNameContext { presented, .. } = error else {
        return String::new();
    };
    if presented.is_empty() {
        return ", it has no subject alternative name (CN is not used)".into();
    }
    // Such as `DnsName("rabbit")` and `IpAddress(127.0.0.1)`.
    let names = presented.iter().map(|name| {
        let inside = name.split_once('(').map_or(&**name, |(_, inside)| inside);
        let name = inside.trim_end_matches(')').trim_matches('"');
        escape(name.as_bytes()).to_string()
    });
    format!(", only {}", names.collect::<Vec<_>>().join(", "))
}

const REQUIRES_CERTIFICATE: &str =
    "the broker requires a client certificate: use --cert-file and --key-file";

/// The meaning of an alert that the peer sent (RFC 8446, 6.2).
fn describe_alert(alert: AlertDescription, was_asked: bool) -> &'static str {
    use AlertDescription as Alert;
    match alert {
        Alert::CertificateRequired => REQUIRES_CERTIFICATE,
        Alert::HandshakeFailure if was_asked => REQUIRES_CERTIFICATE,
        Alert::HandshakeFailure => "the broker supports none of our ciphers: see its log",
        Alert::UnknownCA => "the broker does not trust the CA of --cert-file",
        Alert::CertificateExpired => "the certificate in --cert-file has expired",
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateUnknown
        | Alert::AccessDenied => "the broker does not accept the certificate in --cert-file",
        Alert::ProtocolVersion => "the broker supports neither TLS 1.2 nor 1.3",
        _ => "the broker aborted TLS: see its log",
    }
}
