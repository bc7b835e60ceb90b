//! `pass-edge completions`

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::error::Error;
use super::{Cli, output};

/// Print a completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  pass-edge completions bash > ~/.local/share/bash-completion/completions/pass-edge")]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<u8, Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pass-edge", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
