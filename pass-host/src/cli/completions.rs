//! `pass-host completions`

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, output};
use crate::error::Error;

/// Print a completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  pass-host completions bash > ~/.local/share/bash-completion/completions/pass-host")]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<u8, Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pass-host", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
