//! The address of a broker and the login: a URL, and the options beside it.

use super::deadline::Deadline;
use super::error::ErrorKind;
use super::option_file::OptionFile;
use super::tls::{TlsConfig, TlsFiles};
use crate::options::parse_name;
use crate::text::escape;
use amiquip::{Auth, ConnectionOptions};
use percent_encoding::percent_decode_str;
use std::fmt::{self, Debug};
use std::hash::{BuildHasher, Hasher, RandomState};
use url::{Host, ParseError, Url};

/// Default interval of heartbeats in seconds.
pub const DEFAULT_HEARTBEAT: u16 = 10;

/// Reason to refuse a text that is not a URL of AMQP.
const URL_FORM: &str = "not of the form amqp://user:password@host:port/vhost";

/// Reason to refuse a port with other characters than digits.
const NOT_ENCODED: &str = "bad port: is # / ? or @ in the password percent-encoded?";

/// Reason to refuse a port out of range.
const BAD_PORT: &str = "bad port: it must be a number from 1 to 65535";

/// Reason to refuse several URLs in one.
const SEVERAL: &str = "it must be one URL: repeat --url for several brokers";

/// An **endpoint** is a broker's address, and how to log in there.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Host and port, as messages name the broker.
    pub address: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) vhost: String,
    pub(crate) user: String,
    /// `None`: the URL has no password.
    password: Option<Secret>,
    uses_certificate_login: bool,
    /// The origin of the URL, for messages.
    pub(crate) source_name: &'static str,
    /// Read again for every connection, unless it is a pipe.
    pub(crate) password_file: Option<OptionFile>,
    /// Seconds.
    pub(crate) heartbeat: u16,
    /// `None`: without TLS.
    pub(crate) tls: Option<TlsFiles>,
}

/// What an attempt to connect to an endpoint needs of its files.
pub(super) struct Login {
    /// amiquip's options of the handshake.
    pub(super) options: ConnectionOptions<Auth>,
    /// `None`: without TLS.
    pub(super) tls: Option<TlsConfig>,
}

/// Option of the password file, in errors.
const PASSWORD_FILE: &str = "--password-file";

impl Endpoint {
    /// Reads a URL by the rules of the [RabbitMQ URI
    /// specification](https://www.rabbitmq.com/docs/uri-spec); an empty vhost means `/`, as in most
    /// clients, and unknown parameters are errors. `source_name` says where the URL comes from, for
    /// messages.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`]
    pub fn parse(url: &str, source_name: &'static str) -> Result<Self, ErrorKind> {
        parse(url, source_name).map_err(|reason| ErrorKind::bad_url(source_name, &reason))
    }

    /// Whether this is the same broker, vhost and user.
    pub fn is_same(&self, other: &Endpoint) -> bool {
        (&self.address, &self.vhost, &self.user) == (&other.address, &other.vhost, &other.user)
    }

    /// Whether the URL contains a password.
    pub fn has_password(&self) -> bool {
        self.password.is_some()
    }

    /// Reads the files, by the deadline.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] or [`ErrorKind::NoCaCertificates`].
    pub(super) fn read_login(&self, deadline: &Deadline) -> Result<Login, ErrorKind> {
        let options = ConnectionOptions::default()
            .auth(self.auth(deadline)?)
            .virtual_host(&self.vhost)
            .heartbeat(self.heartbeat);
        let files = self.tls.as_ref();
        let tls = files
            .map(|files| files.client_config(deadline))
            .transpose()?;
        Ok(Login { options, tls })
    }

    /// Checks the password file against the URL, and reads it, so that an error is known before
    /// anything is tried. A pipe can be read only once, and is left to the connection.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`]
    pub(crate) fn validate_password_file(&self, deadline: &Deadline) -> Result<(), ErrorKind> {
        let Some(file) = &self.password_file else {
            return Ok(());
        };
        let bad = |reason| Err(file.bad(PASSWORD_FILE, reason));
        if self.has_password() {
            return bad("the URL has a password, too: remove one of them");
        }
        if self.uses_certificate_login {
            return bad("auth_mechanism=external uses no password");
        }
        if file.is_rereadable(PASSWORD_FILE)? {
            self.auth(deadline)?;
        }
        Ok(())
    }

    fn auth(&self, deadline: &Deadline) -> Result<Auth, ErrorKind> {
        let password = match &self.password_file {
            Some(file) => {
                let text = String::from_utf8(file.read(PASSWORD_FILE, deadline)?)
                    .map_err(|_| file.bad(PASSWORD_FILE, "is not valid UTF-8"))?;
                match password_in(&text) {
                    "" => return Err(file.bad(PASSWORD_FILE, "is empty")),
                    password => password.to_owned(),
                }
            }
            None if self.uses_certificate_login => return Ok(Auth::External),
            None => self
                .password
                .as_ref()
                .map_or("guest", |secret| &secret.0)
                .to_owned(),
        };
        Ok(Auth::Plain {
            username: self.user.clone(),
            password,
        })
    }

    /// The login, and a question, for the error that the broker refused us.
    pub(crate) fn describe_login(&self) -> String {
        if self.uses_certificate_login {
            "auth_mechanism=external: does the broker know the certificate's user?".into()
        } else {
            format!(
                "user '{}': is the password right?",
                escape(self.user.as_bytes())
            )
        }
    }
}

fn parse(url: &str, source_name: &'static str) -> Result<Endpoint, String> {
    let has_password = url.contains('@');
    if url.contains(',') && !has_password {
        return Err(SEVERAL.into());
    }
    let url = Url::parse(url).map_err(|error| match error {
        ParseError::RelativeUrlWithoutBase => URL_FORM.into(),
        ParseError::InvalidPort if has_password => NOT_ENCODED.into(),
        ParseError::InvalidPort => BAD_PORT.into(),
        error => error.to_string(),
    })?;
    let (tls, default_port) = match url.scheme() {
        "amqp" => (None, 5672),
        "amqps" => (Some(TlsFiles::default()), 5671),
        other => return Err(format!("unknown scheme '{other}': use amqp or amqps")),
    };
    // Without an authority, as in amqp:/host, there is no host, and localhost is not meant.
    if url.cannot_be_a_base() || !url.has_authority() || url.fragment().is_some() {
        return Err(URL_FORM.into());
    }
    // As in amqp://me:12/secret@host, whose host would be `me`.
    let behind = [Some(url.path()), url.query()];
    if behind.into_iter().flatten().any(|part| part.contains('@')) {
        return Err(NOT_ENCODED.into());
    }
    let parameters = parse_parameters(&url)?;
    let host = match url.host() {
        None | Some(Host::Domain("")) => "localhost".into(),
        Some(Host::Domain(name)) => decode(name)?,
        Some(Host::Ipv4(address)) => address.to_string(),
        Some(Host::Ipv6(address)) => address.to_string(),
    };
    let vhost = match url.path().strip_prefix('/').unwrap_or_default() {
        "" => "/".into(),
        path if path.contains('/') => return Err("write a '/' in the vhost as %2f".into()),
        path => parse_name(&decode(path)?)?,
    };
    let user = match url.username() {
        "" => "guest".into(),
        name => decode(name)?,
    };
    let port = url.port().unwrap_or(default_port);
    Ok(Endpoint {
        address: if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        },
        host,
        port,
        vhost,
        user,
        password: url.password().map(decode).transpose()?.map(Secret),
        uses_certificate_login: parameters.uses_certificate_login,
        source_name,
        password_file: None,
        heartbeat: parameters.heartbeat.unwrap_or(DEFAULT_HEARTBEAT),
        tls,
    })
}

/// The parameters of a URL.
#[derive(Default)]
struct Parameters {
    uses_certificate_login: bool,
    /// Seconds.
    heartbeat: Option<u16>,
}

fn parse_parameters(url: &Url) -> Result<Parameters, String> {
    let mut parameters = Parameters::default();
    for (name, value) in url.query_pairs() {
        let option = match &*name {
            "auth_mechanism" => {
                parameters.uses_certificate_login = match &*value.to_ascii_lowercase() {
                    "plain" => false,
                    "external" => true,
                    _ => return Err("auth_mechanism must be plain or external".into()),
                };
                continue;
            }
            "heartbeat" => {
                let seconds = value.parse().ok().filter(|seconds| *seconds > 0);
                let seconds = seconds.ok_or("heartbeat must be a number from 1 to 65535")?;
                parameters.heartbeat = Some(seconds);
                continue;
            }
            "cacertfile" => "--ca-file",
            "certfile" => "--cert-file",
            "keyfile" => "--key-file",
            _ => return Err(format!("unknown parameter '{}'", escape(name.as_bytes()))),
        };
        return Err(format!(
            "use the option {option} in place of the parameter {name}"
        ));
    }
    Ok(parameters)
}

fn decode(part: &str) -> Result<String, String> {
    match percent_decode_str(part).decode_utf8() {
        Ok(text) if text.contains(char::is_control) => {
            Err("must not contain control characters".into())
        }
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err("the percent-encoded text is not valid UTF-8".into()),
    }
}

/// The password in a file: without one line end, and without the byte order mark that editors of
/// Windows write.
fn password_in(text: &str) -> &str {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let line = text.strip_suffix('\n');
    line.map_or(text, |line| line.strip_suffix('\r').unwrap_or(line))
}

/// Rotates the endpoints, the nodes of a cluster, to start at a random one, so that many servers
/// spread over the nodes.
pub fn start_at_random(endpoints: &mut [Endpoint]) {
    // The standard library seeds its hashers at random.
    let random = RandomState::new().build_hasher().finish() % endpoints.len() as u64;
    endpoints.rotate_left(usize::try_from(random).unwrap_or_default());
}

/// Rotates the endpoints to start at this broker (host and port), if it is one of them.
pub fn start_at(endpoints: &mut [Endpoint], address: &str) {
    let index = endpoints
        .iter()
        .position(|endpoint| endpoint.address == address);
    endpoints.rotate_left(index.unwrap_or_default());
}

/// A text that no message and no log shows.
#[derive(Clone)]
pub(crate) struct Secret(pub(crate) String);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text)
    }
}

impl Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn parts(url: &str) -> (String, String, String, String) {
        let endpoint = Endpoint::parse(url, "--url").unwrap();
        let (user, password) = match endpoint.auth(&Deadline::after(Duration::ZERO)).unwrap() {
            Auth::Plain { username, password } => (username, password),
            Auth::External => ("(external)".into(), String::new()),
        };
        (endpoint.address, user, password, endpoint.vhost)
    }

    #[test]
    fn a_url_gives_host_port_user_password_and_vhost() {
        for (url, host, user, password, vhost) in [
            ("amqp://", "localhost:5672", "guest", "guest", "/"),
            ("amqp://localhost", "localhost:5672", "guest", "guest", "/"),
            ("amqp://me@host/", "host:5672", "me", "guest", "/"),
            (
                "amqp://me:secret@host:1234/calls",
                "host:1234",
                "me",
                "secret",
                "calls",
            ),
            (
                "amqp://m%40e:%3a%2f@host/%2f",
                "host:5672",
                "m@e",
                ":/",
                "/",
            ),
            ("amqp://127.0.0.1", "127.0.0.1:5672", "guest", "guest", "/"),
            (
                "amqp://[2001:db8::1]:99/a%2fb",
                "[2001:db8::1]:99",
                "guest",
                "guest",
                "a/b",
            ),
            ("amqp:///v", "localhost:5672", "guest", "guest", "v"),
            (
                "amqps://h?auth_mechanism=external",
                "h:5671",
                "(external)",
                "",
                "/",
            ),
        ] {
            let expected = (host.into(), user.into(), password.into(), vhost.into());
            assert_eq!(parts(url), expected, "{url}");
        }
    }

    #[test]
    fn endpoints_start_at_random_or_at_a_given_one() {
        let endpoints = ["a:1", "b:2", "c:3"]
            .map(|name| Endpoint::parse(&format!("amqp://{name}"), "--url").unwrap());
        let order = |endpoints: &[Endpoint]| {
            endpoints
                .iter()
                .map(|endpoint| &*endpoint.address)
                .collect::<String>()
        };
        let random_order = || {
            let mut endpoints = endpoints.clone();
            start_at_random(&mut endpoints);
            order(&endpoints)
        };
        let seen = (0..200)
            .map(|_| random_order())
            .collect::<std::collections::BTreeSet<_>>();
        assert_eq!(
            seen.into_iter().collect::<Vec<_>>(),
            ["a:1b:2c:3", "b:2c:3a:1", "c:3a:1b:2"]
        );
        let mut endpoints = endpoints;
        for (address, expected) in [
            ("c:3", "c:3a:1b:2"),
            ("d:4", "c:3a:1b:2"),
            ("a:1", "a:1b:2c:3"),
        ] {
            start_at(&mut endpoints, address);
            assert_eq!(order(&endpoints), expected);
        }
    }

    #[test]
    fn a_url_that_means_something_else_is_refused() {
        for (url, reason) in [
            ("amqp:/host", URL_FORM),
            ("amqp:host", URL_FORM),
            ("amqp://me:12/ss@host", NOT_ENCODED),
            ("amqp://me:12?ss@host", NOT_ENCODED),
            (
                "amqp://host?heartbeat=0",
                "heartbeat must be a number from 1 to 65535",
            ),
            ("amqp://host?frame_max=9", "unknown parameter 'frame_max'"),
        ] {
            assert_eq!(parse(url, "--url").unwrap_err(), reason, "{url}");
        }
        let endpoint = Endpoint::parse("amqp://host?heartbeat=30", "--url").unwrap();
        assert_eq!(endpoint.heartbeat, 30);
    }

    #[test]
    fn a_password_file_may_be_of_windows() {
        for (text, password) in [
            ("sesame", "sesame"),
            ("sesame\n", "sesame"),
            ("\u{feff}sesame\r\n", "sesame"),
            ("sesame\n\n", "sesame\n"),
            ("sesame\r", "sesame\r"),
            ("\n", ""),
        ] {
            assert_eq!(password_in(text), password, "{text:?}");
        }
    }

    #[test]
    fn debug_shows_no_password() {
        let endpoint = Endpoint::parse("amqp://me:sesame@host", "--url").unwrap();
        assert!(!format!("{endpoint:?}").contains("sesame"));
    }
}
