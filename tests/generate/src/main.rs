//! Generates the man pages and the completions for bash, zsh and fish, below a folder that is laid
//! out like `/usr/share`. A program of its own, so that it costs the others nothing; it compiles
//! their command lines from their source.

#![allow(dead_code)] // of the programs' sources it uses the command lines only

#[path = "../../../rpc-client/src/bin/rpc-client/cli.rs"]
mod cli;
#[path = "../../../rpc-client/src/bin/rpc-client/error.rs"]
mod error;
#[path = "../../../rpc-client/src/bin/rpc-client/input.rs"]
mod input;
#[path = "../../../rpc-server/src/bin/rpc-server/cli.rs"]
mod server_cli;
#[path = "../../../rpc-client/src/bin/rpc-client/source.rs"]
mod source;

use clap::{Command, CommandFactory};
use clap_complete::{generate_to, Shell};
use clap_mangen::Man;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let folder = PathBuf::from(env::args_os().nth(1).expect("usage: rpc-generate FOLDER"));
    generate("rpc-client", &cli::Cli::command(), &folder)?;
    generate("rpc-server", &server_cli::Cli::command(), &folder)
}

fn generate(program: &'static str, command: &Command, folder: &Path) -> io::Result<()> {
    let create = |name: &str| {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).map(|()| folder)
    };
    let mut page = Vec::new();
    Man::new(command.clone().name(program)).render(&mut page)?;
    fs::write(create("man/man1")?.join(format!("{program}.1")), page)?;
    for (shell, name) in [
        (Shell::Bash, "bash-completion/completions"),
        (Shell::Zsh, "zsh/site-functions"),
        (Shell::Fish, "fish/vendor_completions.d"),
    ] {
        let file = generate_to(shell, &mut command.clone(), program, create(name)?)?;
        if shell == Shell::Bash {
            fs::rename(&file, file.with_file_name(program))?; // bash-completion looks for this name
        }
    }
    Ok(())
}
