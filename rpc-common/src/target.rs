//! Where the broker is, and who we are to it: the URL, and the options that hold it.

use crate::broker::Error;
use crate::exit::in_words;
use crate::message::escape;
use crate::tls::{self, TlsFiles};
use amiquip::{Auth, ConnectionOptions};
use percent_encoding::percent_decode_str;
use std::convert::Infallible;
use std::fmt::{self, Debug, Display};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::{env, fs};
use url::{Host, ParseError, Url};

const BAD_PASSWORD: &str = "bad port: is # / ? or @ in the password percent-encoded?";
const FORM: &str = "not of the form amqp://user:password@host:port/vhost";
const NO_TLS: &str = "--ca-file, --cert-file and --key-file go with amqps:// only";
const DEFAULT_URL: &str = "amqp://localhost";
const DEFAULT_PORT: u16 = 5672;
const DEFAULT_TLS_PORT: u16 = 5671;
const DEFAULT_HEARTBEAT: u16 = 10;

/// The options of both programs that say where the broker is.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Broker")]
pub struct BrokerOptions {
    /// amqp(s)://user:password@host:port/vhost; given more than once, they are tried in turn
    /// [env: AMQP_URL, else amqp://localhost]
    // Not clap's `env`, and parsed after clap: it would print the value, password and all.
    #[arg(long = "url", value_name = "URL", value_parser = secret, action = clap::ArgAction::Append)]
    urls: Vec<Secret<String>>,

    /// The password, so that it stands in no argument list
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,

    #[command(flatten)]
    tls: TlsFiles,

    /// AMQP heartbeat, 1 to 65535
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_HEARTBEAT, value_parser = clap::value_parser!(u16).range(1..))]
    heartbeat: u16,
}

impl BrokerOptions {
    /// The brokers that the options, or else the environment, name. A password in an argument draws a
    /// warning, because `ps` shows it to everybody.
    ///
    /// # Errors
    /// [`Error::Url`], [`Error::File`]
    pub fn brokers(&self) -> Result<Brokers, Error> {
        let in_option = |error: Error| error.in_url("--url");
        let urls = self.urls.iter().map(|url| Target::parse(&url.0).map_err(in_option));
        let mut brokers = urls.collect::<Result<Vec<_>, _>>()?;
        if brokers.iter().any(|target| target.names_password) {
            log::warn!("ps shows everybody the password in --url: put the URL into AMQP_URL");
        }
        if brokers.is_empty() {
            brokers.push(Target::from_env()?);
        }
        for target in &mut brokers {
            self.complete(target)?;
        }
        Ok(Brokers(brokers))
    }

    /// Adds to a target what stands in options of its own.
    fn complete(&self, target: &mut Target) -> Result<(), Error> {
        if let Some(file) = &self.password_file {
            target.take_password_of(file)?;
        }
        if !self.tls.is_default() {
            let Some(tls) = &mut target.tls else { return Err(bad_url(NO_TLS)) };
            self.tls.config()?; // a wrong file is to be known before anything is tried
            tls.clone_from(&self.tls);
        }
        target.heartbeat = self.heartbeat;
        Ok(())
    }
}

/// The **brokers** that may be had, in the order in which they are tried: the nodes of a cluster. There is
/// at least one.
#[derive(Clone, Debug)]
pub struct Brokers(Vec<Target>);

impl Brokers {
    /// The one broker of [`Target::from_env`].
    ///
    /// # Errors
    /// [`Error::Url`]
    pub fn from_env() -> Result<Self, Error> {
        Target::from_env().map(Brokers::from)
    }

    /// The same in the same order, but beginning with any of them, so that many programs spread.
    #[must_use]
    pub fn beginning_anywhere(mut self) -> Self {
        // The standard library seeds its hashers at random.
        let random = RandomState::new().build_hasher().finish();
        let first = random % self.0.len() as u64;
        self.0.rotate_left(usize::try_from(first).unwrap_or_default());
        self
    }

    /// The same in the same order, but beginning with this one, as messages name it, if it is among them.
    pub fn begin_with(&mut self, broker: &str) {
        let place = self.0.iter().position(|target| target.to_string() == broker);
        self.0.rotate_left(place.unwrap_or_default());
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn split_last(&self) -> (&Target, &[Target]) {
        self.0.split_last().expect("there is at least one")
    }
}

impl From<Target> for Brokers {
    fn from(target: Target) -> Self {
        Brokers(vec![target])
    }
}

/// A **target** is a broker, and who we are to it.
#[derive(Clone, Debug)]
pub struct Target {
    pub(crate) host: String,
    pub(crate) port: u16,
    auth: Secret<Auth>,
    user: String,
    vhost: String,
    names_password: bool,
    heartbeat: u16,
    /// None without TLS.
    pub(crate) tls: Option<TlsFiles>,
}

impl Target {
    /// The broker that the environment variable `AMQP_URL` names, or else the one on this machine.
    ///
    /// # Errors
    /// [`Error::Url`]
    pub fn from_env() -> Result<Self, Error> {
        match env::var("AMQP_URL") {
            Ok(url) if !url.is_empty() => Target::parse(&url),
            Ok(_) | Err(env::VarError::NotPresent) => Target::parse(DEFAULT_URL),
            Err(env::VarError::NotUnicode(_)) => Err(bad_url("not UTF-8")),
        }
        .map_err(|error| error.in_url("AMQP_URL"))
    }

    /// Reads a URL by the rules of the
    /// [RabbitMQ URI specification](https://www.rabbitmq.com/docs/uri-spec), with an empty vhost
    /// standing for `/` as in most clients; what it does not know it refuses by name.
    ///
    /// # Errors
    /// [`Error::Url`], in which no part of the URL is repeated that can hold a password.
    pub fn parse(url: &str) -> Result<Self, Error> {
        let url = Url::parse(url).map_err(|error| match error {
            ParseError::RelativeUrlWithoutBase => bad_url(FORM),
            ParseError::InvalidPort => bad_url(BAD_PASSWORD),
            error => bad_url(&error.to_string()),
        })?;
        let (tls, port) = match url.scheme() {
            "amqp" => (None, DEFAULT_PORT),
            "amqps" => (Some(TlsFiles::default()), DEFAULT_TLS_PORT),
            other => return Err(bad_url(&format!("unknown scheme '{other}', not amqp or amqps"))),
        };
        if url.cannot_be_a_base() || url.fragment().is_some() {
            return Err(bad_url(FORM));
        }
        let host = match url.host() {
            None | Some(Host::Domain("")) => "localhost".into(),
            Some(Host::Domain(name)) => decode(name)?,
            Some(Host::Ipv4(address)) => address.to_string(),
            Some(Host::Ipv6(address)) => address.to_string(),
        };
        let vhost = match url.path().strip_prefix('/').unwrap_or_default() {
            "" => "/".into(),
            path if path.contains('/') => return Err(bad_url("write a '/' in the vhost as %2f")),
            path => short_string(&decode(path)?).map_err(|error| bad_url(&error))?,
        };
        let user = match url.username() {
            "" => "guest".into(),
            name => decode(name)?,
        };
        let password = decode(url.password().unwrap_or("guest"))?;
        if url.query().is_some_and(|query| query.contains('@')) {
            return Err(bad_url(BAD_PASSWORD));
        }
        let mut auth = Auth::Plain { username: user.clone(), password };
        for (name, value) in url.query_pairs() {
            match (&*name, &*value.to_ascii_lowercase()) {
                ("auth_mechanism", "plain") => {}
                ("auth_mechanism", "external") => auth = Auth::External,
                ("auth_mechanism", _) => {
                    return Err(bad_url("auth_mechanism is plain or external"))
                }
                ("heartbeat", _) => return Err(bad_url("heartbeat is the option --heartbeat")),
                ("cacertfile", _) => return Err(bad_url("cacertfile is the option --ca-file")),
                ("certfile", _) => return Err(bad_url("certfile is the option --cert-file")),
                ("keyfile", _) => return Err(bad_url("keyfile is the option --key-file")),
                _ => {
                    return Err(bad_url(&format!(
                        "unknown parameter '{}'",
                        escape(name.as_bytes())
                    )))
                }
            }
        }
        Ok(Target {
            host,
            port: url.port().unwrap_or(port),
            auth: Secret(auth),
            user,
            vhost,
            names_password: url.password().is_some(),
            heartbeat: DEFAULT_HEARTBEAT,
            tls,
        })
    }

    /// Takes the password from a file; one newline at its end is not part of it.
    fn take_password_of(&mut self, file: &Path) -> Result<(), Error> {
        let wrong = |reason: &str| tls::wrong("--password-file", file, reason);
        match &mut self.auth.0 {
            _ if self.names_password => {
                Err(wrong("the URL has a password, too: leave one of them out"))
            }
            Auth::External => Err(wrong("auth_mechanism=external takes no password")),
            Auth::Plain { password, .. } => {
                *password = fs::read_to_string(file).map_err(|error| wrong(&in_words(&error)))?;
                if password.ends_with('\n') {
                    password.pop();
                }
                Ok(())
            }
        }
    }

    /// Who we say we are, and what proves it, for the question whether that is right.
    pub(crate) fn who(&self) -> String {
        match self.auth.0 {
            Auth::Plain { .. } => {
                format!("user '{}': is the password", escape(self.user.as_bytes()))
            }
            Auth::External => "auth_mechanism=external: is the user of --cert-file".into(),
        }
    }

    /// What amiquip's handshake has to know.
    pub(crate) fn options(&self) -> ConnectionOptions<Auth> {
        ConnectionOptions::default()
            .auth(self.auth.0.clone())
            .virtual_host(&self.vhost)
            .heartbeat(self.heartbeat)
    }
}

/// Reads a name that AMQP carries as a short string: 1 to 255 bytes.
///
/// # Errors
/// A sentence for the prompt when it is empty or too long.
pub fn short_string(name: &str) -> Result<String, String> {
    match name.len() {
        0 => Err("empty".into()),
        1..=255 if name.contains(char::is_control) => Err("it has control characters".into()),
        1..=255 => Ok(name.into()),
        bytes => Err(format!("a name has at most 255 bytes, not {bytes}")),
    }
}

fn bad_url(reason: &str) -> Error {
    Error::Url { origin: "URL", reason: reason.into() }
}

fn decode(part: &str) -> Result<String, Error> {
    match percent_decode_str(part).decode_utf8() {
        Ok(text) if text.contains(char::is_control) => Err(bad_url("it has control characters")),
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(bad_url("what is percent-encoded is not UTF-8")),
    }
}

/// The host and port, as messages name a broker.
impl Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// What no message and no log may show.
#[derive(Clone)]
struct Secret<T>(T);

// clap takes functions that can fail.
#[allow(clippy::unnecessary_wraps)]
fn secret(text: &str) -> Result<Secret<String>, Infallible> {
    Ok(Secret(text.into()))
}

impl<T> Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(url: &str) -> (String, String, String, String) {
        let target = Target::parse(url).unwrap();
        let password = match target.auth.0.clone() {
            Auth::Plain { password, .. } => password,
            Auth::External => "(external)".into(),
        };
        (target.to_string(), target.user, password, target.vhost)
    }

    #[test]
    fn a_url_says_host_port_user_and_vhost() {
        for (url, host, user, password, vhost) in [
            ("amqp://", "localhost:5672", "guest", "guest", "/"),
            ("amqp://localhost", "localhost:5672", "guest", "guest", "/"),
            ("amqp://me@host/", "host:5672", "me", "guest", "/"),
            ("amqp://me:secret@host:1234/calls", "host:1234", "me", "secret", "calls"),
            ("amqp://m%40e:%3a%2f@host/%2f", "host:5672", "m@e", ":/", "/"),
            ("amqp://127.0.0.1", "127.0.0.1:5672", "guest", "guest", "/"),
            ("amqp://[2001:db8::1]:99/a%2fb", "[2001:db8::1]:99", "guest", "guest", "a/b"),
            ("amqp:///v", "localhost:5672", "guest", "guest", "v"),
            ("amqps://h?auth_mechanism=external", "h:5671", "guest", "(external)", "/"),
        ] {
            let expected = (host.into(), user.into(), password.into(), vhost.into());
            assert_eq!(parts(url), expected, "{url}");
        }
    }

    #[test]
    fn brokers_begin_anywhere_or_where_they_are_told() {
        let names = ["a:1", "b:2", "c:3"];
        let targets = names.map(|name| Target::parse(&format!("amqp://{name}")).unwrap());
        let brokers = Brokers(targets.to_vec());
        let order = |brokers: &Brokers| {
            brokers.0.iter().map(ToString::to_string).collect::<Vec<_>>().concat()
        };
        let seen = (0..200).map(|_| order(&brokers.clone().beginning_anywhere()));
        let seen = seen.collect::<std::collections::BTreeSet<_>>();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["a:1b:2c:3", "b:2c:3a:1", "c:3a:1b:2"]);
        let mut brokers = brokers;
        for (broker, expected) in [("c:3", "c:3a:1b:2"), ("d:4", "c:3a:1b:2"), ("a:1", "a:1b:2c:3")]
        {
            brokers.begin_with(broker);
            assert_eq!(order(&brokers), expected);
        }
    }

    #[test]
    fn debug_shows_no_password() {
        let target = Target::parse("amqp://me:sesame@host").unwrap();
        assert!(!format!("{target:?}").contains("sesame"));
    }

    #[test]
    fn a_short_string_has_1_to_255_bytes() {
        assert_eq!(short_string(""), Err("empty".into()));
        assert_eq!(short_string(&"x".repeat(255)), Ok("x".repeat(255)));
        let error = "a name has at most 255 bytes, not 256";
        assert_eq!(short_string(&"ä".repeat(128)), Err(error.into()));
    }
}
