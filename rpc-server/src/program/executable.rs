//! Finds the program, and checks that it can be executed, before the server serves.

use rpc_common::text::{describe_io_error, escape};
use rustix::fs::{access, Access};
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Maximum number of bytes of a script's first line that Linux reads (BINPRM_BUF_SIZE).
const MAX_FIRST_LINE: u64 = 256;

/// The folder in which Linux lists the formats of programs that were added (binfmt_misc).
const ADDED_FORMATS: &str = "/proc/sys/fs/binfmt_misc";

/// The files of [`ADDED_FORMATS`] that are not formats.
const NO_FORMATS: [&str; 2] = ["register", "status"];

/// Finds a program as a shell does: a name with a slash is a path, any other is looked up on
/// `PATH`.
pub(crate) fn find_executable(name: &OsStr) -> Result<PathBuf, String> {
    if name.is_empty() {
        return Err("its name is empty".into());
    }
    if name.as_encoded_bytes().contains(&b'/') {
        return check_executable(Path::new(name)).map(|()| name.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let mut reason = "not found on PATH".to_owned();
    for folder in env::split_paths(&path) {
        // An empty one is the current folder.
        let candidate = if folder.as_os_str().is_empty() {
            Path::new(".").join(name)
        } else {
            folder.join(name)
        };
        match check_executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) if candidate.is_file() => reason = error,
            Err(_) => {}
        }
    }
    Err(reason)
}

/// Checks that a file can be executed; of a script, its interpreter, too.
pub(crate) fn check_executable(path: &Path) -> Result<(), String> {
    check_file(path)?;
    let mut start = Vec::new();
    // What may be executed and not read is no script.
    let Ok(file) = File::open(path) else {
        return Ok(());
    };
    file.take(MAX_FIRST_LINE)
        .read_to_end(&mut start)
        .map_err(|error| describe_io_error(&error))?;
    match Format::of(&start) {
        Format::Elf => Ok(()),
        Format::Script { interpreter, name } => {
            check_interpreter(&interpreter)?;
            name.map_or(Ok(()), |name| {
                let found = find_on_path(&name);
                found.map_err(|reason| format!("its interpreter '{}': {reason}", shown(&name)))
            })
        }
        Format::Unknown if has_added_formats() => Ok(()),
        Format::Unknown => {
            Err("it is not a program, and has no first line such as #!/bin/sh".into())
        }
    }
}

fn check_file(path: &Path) -> Result<(), String> {
    let metadata = path.metadata().map_err(|error| describe_io_error(&error))?;
    if metadata.is_dir() {
        return Err("it is a directory".into());
    }
    access(path, Access::EXEC_OK).map_err(|_| "it is not executable".into())
}

fn check_interpreter(interpreter: &OsStr) -> Result<(), String> {
    check_file(Path::new(interpreter)).map_err(|reason| {
        let hint = if interpreter.as_bytes().ends_with(b"\r") {
            " (the script has CRLF line ends)"
        } else {
            ""
        };
        format!("its interpreter '{}': {reason}{hint}", shown(interpreter))
    })
}

/// Looks up the program that env(1) is to run.
fn find_on_path(name: &OsStr) -> Result<(), String> {
    if name.as_bytes().contains(&b'/') {
        return check_file(Path::new(name));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = env::split_paths(&path);
    if folders.any(|folder| check_file(&folder.join(name)).is_ok()) {
        return Ok(());
    }
    let hint = if name.as_bytes().ends_with(b"\r") {
        " (the script has CRLF line ends)"
    } else {
        ""
    };
    Err(format!("not found on PATH{hint}"))
}

fn shown(name: &OsStr) -> String {
    escape(name.as_bytes()).to_string()
}

/// Whether formats were added to those that Linux executes by itself.
fn has_added_formats() -> bool {
    let files = fs::read_dir(ADDED_FORMATS).into_iter().flatten().flatten();
    let mut names = files.map(|file| file.file_name());
    names.any(|name| NO_FORMATS.iter().all(|other| name != *other))
}

/// The format of an executable file, by its first bytes.
#[derive(Debug, PartialEq, Eq)]
enum Format {
    Elf,
    Script {
        /// Path of the interpreter.
        interpreter: OsString,
        /// The program that env(1) as the interpreter is to run.
        name: Option<OsString>,
    },
    Unknown,
}

impl Format {
    /// See execve(2), Interpreter scripts.
    fn of(start: &[u8]) -> Self {
        if start.starts_with(b"\x7fELF") {
            return Format::Elf;
        }
        let Some(line) = start.strip_prefix(b"#!") else {
            return Format::Unknown;
        };
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let mut words = line
            .split(|byte| b" \t".contains(byte))
            .filter(|word| !word.is_empty());
        let Some(interpreter) = words.next() else {
            return Format::Unknown;
        };
        let is_env = interpreter.ends_with(b"/env");
        // An option, or a variable, comes before the name: then only env(1) knows it.
        let is_name = |name: &&[u8]| !name.starts_with(b"-") && !name.contains(&b'=');
        let name = words.next().filter(|_| is_env).filter(is_name);
        let owned = |bytes: &[u8]| OsString::from_vec(bytes.into());
        Format::Script {
            interpreter: owned(interpreter),
            name: name.map(owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(interpreter: &str, name: Option<&str>) -> Format {
        Format::Script {
            interpreter: interpreter.into(),
            name: name.map(OsString::from),
        }
    }

    #[test]
    fn the_interpreter_of_a_script_is_the_first_word_of_its_first_line() {
        for (start, format) in [
            ("\x7fELF\x02", Format::Elf),
            ("#!/bin/sh\necho", script("/bin/sh", None)),
            ("#! /bin/bash -e\n", script("/bin/bash", None)),
            ("#!/bin/sh\r\n", script("/bin/sh\r", None)),
            (
                "#!/usr/bin/env python3\n",
                script("/usr/bin/env", Some("python3")),
            ),
            (
                "#!/usr/bin/env -S python3 -u\n",
                script("/usr/bin/env", None),
            ),
            ("#!/usr/bin/env A=1 sh\n", script("/usr/bin/env", None)),
            ("echo hello\n", Format::Unknown),
            ("#!\n", Format::Unknown),
            ("", Format::Unknown),
        ] {
            assert_eq!(Format::of(start.as_bytes()), format, "{start:?}");
        }
    }
}
