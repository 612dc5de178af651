//! The command line: what both programs do alike.

use crate::connection::{Deadline, Endpoint, Error, ErrorKind, OptionFile, Secret, TlsFiles};
use crate::exit::{print_message, ExitCode};
use crate::stdio;
use crate::text::{describe_io_error, escape, mask_passwords};
use clap::error::{ContextKind, ContextValue, ErrorKind as ClapErrorKind};
use std::env;
use std::error::Error as _;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Parses the command line. Prints an error as one line, and help in clap's format; or
/// `short_help`, if the first argument is `-h`.
///
/// # Errors
/// The exit code to end with at once: [`ExitCode::Success`] after `--help` and `--version`,
/// [`ExitCode::Output`] if these cannot be written, [`ExitCode::Usage`] after an error.
pub fn parse_args<Cli: clap::Parser>(short_help: &str) -> Result<Cli, ExitCode> {
    if env::args_os().nth(1).is_some_and(|arg| arg == "-h") {
        let program = Cli::command().get_name().to_owned();
        return Err(print_help(&program, short_help));
    }
    let command = Cli::command().max_term_width(80);
    let arguments = arguments(&command);
    let matches = command
        .try_get_matches_from(arguments)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    matches.map_err(|error| {
        let program = Cli::command().get_name().to_owned();
        match describe_error(&error) {
            _ if error.kind() == ClapErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                let mut command = Cli::command();
                let _ = write!(
                    stdio::stderr(),
                    "{}\nSee {} --help.\n",
                    command.render_usage(),
                    command.get_name()
                );
            }
            Some(message) => print_message(&program, message),
            None => {
                let help = error.render();
                return if has_colors() {
                    print_help(&program, &help.ansi().to_string())
                } else {
                    print_help(&program, &help.to_string())
                };
            }
        }
        if error.use_stderr() {
            ExitCode::Usage
        } else {
            ExitCode::Success
        }
    })
}

/// Prints the help on standard output. Returns the exit code.
fn print_help(program: &str, help: &str) -> ExitCode {
    let print = || {
        stdio::check_stdout()?;
        let mut stdout = stdio::stdout();
        stdout.write_all(help.as_bytes())?;
        stdout.flush()
    };
    match print() {
        // The reader, such as `head`, has enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::Success,
        Err(error) => {
            let reason = describe_io_error(&error);
            print_message(program, format!("cannot write the help: {reason}"));
            ExitCode::Output
        }
        Ok(()) => ExitCode::Success,
    }
}

/// Whether the help is printed in colors. See <https://no-color.org>.
fn has_colors() -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_none_or(|name| name == "dumb");
    io::stdout().is_terminal() && !is_dumb && !is_set("NO_COLOR")
}

/// Values of a variable that do not set an option without a value, as in clap. Upper and lower case
/// are the same.
const FALSE: [&str; 7] = ["", "0", "f", "false", "n", "no", "off"];

/// The arguments, and before them those that the environment sets: `RPC_CLIENT_TIMEOUT=5s` is
/// `--timeout=5s` of rpc-client. So the command line wins: of an option that is given twice, the
/// last one counts. Warns of a variable that looks like that of an option, and is not: a typing
/// error would be a silent default.
///
/// Not what the program is asked to do, and not `--url`, whose variable [`BrokerOptions`] reads: an
/// error would show its password. (clap's own support costs every call memory.)
fn arguments(command: &clap::Command) -> Vec<OsString> {
    let mut given = env::args_os();
    let mut arguments = given.next().into_iter().collect::<Vec<_>>();
    let prefix = command.get_name().to_uppercase().replace('-', "_") + "_";
    // Most calls have none of these variables, and look at no option.
    for (variable, value) in env::vars_os() {
        let Some(rest) = variable
            .to_str()
            .and_then(|name| name.strip_prefix(&prefix))
        else {
            continue;
        };
        let name = rest.to_lowercase().replace('_', "-");
        let mut options = command.get_arguments();
        let option = options.find(|arg| arg.get_long() == Some(&name));
        let option = option.filter(|_| {
            rest == name.to_uppercase().replace('-', "_") && !WITHOUT_VARIABLE.contains(&&*name)
        });
        match option {
            None if is_of_others(rest) => {}
            None => {
                let variable = escape(variable.as_encoded_bytes());
                let message = format!("warning: {variable} sets no option; see --help");
                print_message(command.get_name(), message);
            }
            Some(_) if name == "url" => {}
            Some(option) if option.get_action().takes_values() => {
                let mut argument = OsString::from(format!("--{name}="));
                argument.push(value);
                arguments.push(argument);
            }
            Some(_) if FALSE.iter().any(|no| value.eq_ignore_ascii_case(no)) => {}
            Some(_) => arguments.push(format!("--{name}").into()),
        }
    }
    arguments.extend(given);
    arguments
}

/// Options that have no variable: what the program is asked to do.
const WITHOUT_VARIABLE: [&str; 5] = ["data", "lines", "check", "help", "version"];

/// Whether the rest of a variable's name is one of others: Kubernetes sets some for a service with
/// the name of the program, and the systemd unit reads its arguments from `RPC_SERVER_ARGS`.
fn is_of_others(rest: &str) -> bool {
    ["ARGS", "PORT"].contains(&rest) || rest.starts_with("PORT_") || rest.starts_with("SERVICE_")
}

/// Describes an error in one line, with what the user may have meant; `None` if clap's text is
/// help.
fn describe_error(error: &clap::Error) -> Option<String> {
    let text = error.to_string();
    // Hints and usage follow in paragraphs of their own.
    let message = text
        .strip_prefix("error: ")?
        .split("\n\n")
        .next()?
        .trim_end();
    let message = message.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let message = match error.source().map(ToString::to_string) {
        Some(reason) => message.replace(&reason, &reword(&reason)),
        None => message,
    };
    let suggestion = [ContextKind::SuggestedArg, ContextKind::SuggestedValue]
        .into_iter()
        .find_map(|kind| error.get(kind));
    let suggestion = match suggestion {
        Some(ContextValue::String(meant)) => format!(": did you mean '{meant}'?"),
        Some(ContextValue::Strings(meant)) if !meant.is_empty() => {
            format!(": did you mean '{}'?", meant.join("' or '"))
        }
        _ => String::new(),
    };
    let text = message + &suggestion;
    let separator = if text.ends_with('?') { " " } else { "; " };
    Some(mask_passwords(&format!("{text}{separator}see --help")).into_owned())
}

/// Rewords how the standard library and clap say that a number is invalid.
fn reword(reason: &str) -> String {
    let range = reason
        .split_once(" is not in ")
        .and_then(|(_, range)| range.split_once(".."));
    if let Some((min, max)) = range {
        // clap writes a range without an upper bound as `1..MAX`, but accepts MAX.
        return format!("must be between {min} and {}", max.trim_start_matches('='));
    }
    match reason {
        "invalid digit found in string" | "cannot parse integer from empty string" => {
            "not a whole number"
        }
        "number too large to fit in target type" => "too large",
        other => other,
    }
    .into()
}

/// The options that a command line with these arguments sets: the defaults, for a program that has
/// no command line.
///
/// # Panics
/// If the arguments are wrong.
pub fn from_args<Options: clap::Args>(args: &[&str]) -> Options {
    let command = Options::augment_args(clap::Command::new("").no_binary_name(true));
    Options::from_arg_matches(
        &command
            .try_get_matches_from(args)
            .expect("the arguments are right"),
    )
    .expect("clap has checked them")
}

/// Timeout of checking the files: a file may have become a pipe since its type was looked at.
const VALIDATION_TIMEOUT: Duration = Duration::from_secs(1);

/// The options that say where the broker is, and how to log in.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Broker")]
pub struct BrokerOptions {
    /// amqp(s)://user:password@host:port/vhost, repeatable: tried in turn
    /// [env: RPC_CLIENT_URL or RPC_SERVER_URL, several with blanks between them; else AMQP_URL,
    /// else amqp://localhost]
    // Not clap's `env`, and parsed after clap: clap would print the value, with its password.
    #[arg(long = "url", value_name = "URL", action = clap::ArgAction::Append)]
    urls: Vec<Secret>,

    /// Read the password from FILE, again for every connection; from a pipe only once
    #[arg(long, value_name = "FILE")]
    password_file: Option<OptionFile>,

    #[command(flatten)]
    tls: TlsFiles,

    /// AMQP heartbeat, 1 to 65535 [default: that of the URL (?heartbeat=30), else 10]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u16).range(1..))]
    heartbeat: Option<u16>,

    /// Name of the program's own variable with URLs.
    #[arg(skip)]
    variable: Option<&'static str>,
}

impl BrokerOptions {
    /// The options of a program that is given this URL and nothing else.
    pub fn from_url(url: &str) -> Self {
        from_args(&[&format!("--url={url}")])
    }

    /// Reads this variable, too, if no option names a broker: it has URLs with blanks between them,
    /// and wins over `AMQP_URL`.
    pub fn set_variable(&mut self, name: &'static str) {
        self.variable = Some(name);
    }

    /// The brokers that the options name, or else the environment, or else localhost. Logs a
    /// warning if an option contains a password: `ps` shows it.
    ///
    /// # Errors
    /// If a URL, or a file beside it, is wrong.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>, Error> {
        self.try_endpoints().map_err(Error::configuration)
    }

    fn try_endpoints(&self) -> Result<Vec<Endpoint>, ErrorKind> {
        let parsed = self.urls.iter().map(|url| Endpoint::parse(&url.0, "--url"));
        let mut endpoints = parsed.collect::<Result<Vec<_>, _>>()?;
        if endpoints.iter().any(Endpoint::has_password) {
            log::warn!("the password in --url is visible to all users (ps): use AMQP_URL or --password-file");
        }
        if endpoints.is_empty() {
            endpoints = self.endpoints_from_env()?;
        }
        for endpoint in &mut endpoints {
            self.complete(endpoint)?;
        }
        Ok(endpoints)
    }

    fn endpoints_from_env(&self) -> Result<Vec<Endpoint>, ErrorKind> {
        if let Some(name) = self.variable {
            if let Some(urls) = url_variable(name)? {
                let urls = urls.split_whitespace();
                return urls.map(|url| Endpoint::parse(url, name)).collect();
            }
        }
        let endpoint = match url_variable("AMQP_URL")? {
            Some(url) => Endpoint::parse(&url, "AMQP_URL"),
            None => Endpoint::parse("amqp://localhost", "the default"),
        };
        Ok(vec![endpoint?])
    }

    /// Adds what is set by other options, and checks the files before anything is tried.
    fn complete(&self, endpoint: &mut Endpoint) -> Result<(), ErrorKind> {
        endpoint.heartbeat = self.heartbeat.unwrap_or(endpoint.heartbeat);
        endpoint.password_file.clone_from(&self.password_file);
        let deadline = Deadline::after(VALIDATION_TIMEOUT);
        endpoint.validate_password_file(&deadline)?;
        if !self.tls.is_empty() {
            if endpoint.tls.is_none() {
                let reason = "--ca-file, --cert-file and --key-file need an amqps:// URL";
                return Err(ErrorKind::bad_url(endpoint.source_name, reason));
            }
            self.tls.validate(&deadline)?;
            endpoint.tls = Some(self.tls.clone());
        }
        Ok(())
    }
}

/// The value of a variable with a URL, or with several.
fn url_variable(name: &'static str) -> Result<Option<String>, ErrorKind> {
    match env::var(name) {
        Ok(url) if url.trim().is_empty() => Err(ErrorKind::bad_url(
            name,
            "it is empty: set it to a URL, or unset it",
        )),
        Ok(url) => Ok(Some(url)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => Err(ErrorKind::bad_url(name, "not valid UTF-8")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{value_parser, Parser};

    #[derive(Debug, Parser)]
    #[command(name = "test")]
    struct Cli {
        #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..))]
        workers: Option<u16>,
        #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
        repeat: Option<u64>,
        #[arg(long, value_name = "FORMAT", value_parser = ["text", "json"])]
        output: Option<String>,
        #[arg(long, value_name = "PEM", requires = "key")]
        cert: Option<String>,
        #[arg(long, value_name = "PEM")]
        key: Option<String>,
    }

    fn error(args: &[&str]) -> Option<String> {
        let args = [&["test"], args].concat();
        describe_error(&Cli::try_parse_from(args).unwrap_err())
    }

    #[test]
    fn an_error_is_one_line_with_inclusive_bounds_and_a_suggestion() {
        for (args, message) in [
            (&["--workers", "0"][..], "invalid value '0' for '--workers <N>': must be between 1 and 65535; see --help"),
            (
                &["--repeat", "0"],
                "invalid value '0' for '--repeat <N>': must be between 1 and 18446744073709551615; see --help",
            ),
            (&["--repeat", "many"], "invalid value 'many' for '--repeat <N>': not a whole number; see --help"),
            (&["--repeat="], "invalid value '' for '--repeat <N>': not a whole number; see --help"),
            (
                &["--repeat", "18446744073709551616"],
                "invalid value '18446744073709551616' for '--repeat <N>': too large; see --help",
            ),
            (
                &["--output", "jsno"],
                "invalid value 'jsno' for '--output <FORMAT>' [possible values: text, json]: did you mean 'json'? see --help",
            ),
            (&["--worker", "1"], "unexpected argument '--worker' found: did you mean '--workers'? see --help"),
            (&["--cert", "a.pem"], "the following required arguments were not provided: --key <PEM>; see --help"),
        ] {
            assert_eq!(error(args).as_deref(), Some(message));
        }
    }

    #[test]
    fn help_is_no_error() {
        assert_eq!(error(&["--help"]), None);
    }
}
