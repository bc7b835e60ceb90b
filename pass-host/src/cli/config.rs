//! `pass-host config`: presets and configuration files.

use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;

use super::output;
use crate::config::{Layers, presets};
use crate::error::Error;

/// List presets, show one as a commented file, or check a file.
#[derive(Debug, Subcommand)]
#[command(after_help = "Example: make a file of your own, change it, check it, use it
  pass-host config show demo > mine.toml
  pass-host config check mine.toml
  pass-host train PHOTOS --config mine.toml

A file needs only the keys that differ; `preset = \"NAME\"` on top names what it differs from.")]
pub(super) enum ConfigCommand {
    /// List the presets.
    List {
        /// Write one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print a preset as TOML: every key with its meaning and value.
    Show {
        /// Name of the preset; `pass-host config list` lists them.
        #[arg(value_name = "NAME")]
        preset: String,
        /// Change a key, for example `--set optim.batch=64`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
    },
    /// Check a file: unknown keys, types, ranges and how the values fit together.
    Check {
        /// The TOML file.
        #[arg(value_name = "F.toml")]
        file: PathBuf,
        /// Change a key, for example `--set optim.batch=64`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Write one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Serialize)]
struct PresetList {
    presets: Vec<PresetLine>,
}

#[derive(Serialize)]
struct PresetLine {
    name: &'static str,
    about: &'static str,
}

#[derive(Serialize)]
struct CheckReport {
    file: PathBuf,
    valid: bool,
    preset: String,
    overridden: usize,
    config_hash: String,
}

pub(super) fn run(command: ConfigCommand) -> Result<u8, Error> {
    match command {
        ConfigCommand::List { json } => list(json)?,
        ConfigCommand::Show { preset, sets } => {
            let resolved = Layers { preset: Some(preset), sets, ..Layers::default() }.resolve()?;
            output::print(&resolved.config.to_toml(&resolved.preset))?;
        }
        ConfigCommand::Check { file, sets, json } => {
            let resolved = Layers { file: Some(file.clone()), sets, ..Layers::default() }.resolve()?;
            let overridden = resolved.origins.len();
            if json {
                let config_hash = resolved.config.config_hash();
                output::print_json(&CheckReport {
                    file,
                    valid: true,
                    preset: resolved.preset,
                    overridden,
                    config_hash,
                })?;
            } else {
                let keys = if overridden == 1 { "key" } else { "keys" };
                output::print(&format!(
                    "valid: preset {} with {overridden} {keys} given\n",
                    resolved.preset
                ))?;
            }
        }
    }
    Ok(0)
}

fn list(json: bool) -> Result<(), Error> {
    if json {
        let presets = presets::PRESETS.iter().map(|p| PresetLine { name: p.name, about: p.about }).collect();
        return output::print_json(&PresetList { presets });
    }
    let width = presets::PRESETS.iter().map(|p| p.name.len()).max().unwrap_or(0);
    let lines: Vec<String> =
        presets::PRESETS.iter().map(|p| format!("{:width$}  {}\n", p.name, p.about)).collect();
    output::print(&lines.concat())
}
