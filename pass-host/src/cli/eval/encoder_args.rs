//! Which weights are judged, where, and where the result goes: the same flags for every protocol.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::super::{ComputeArgs, output};
use crate::config::run::Network;
use crate::device;
use crate::error::Error;
use crate::evaluate::EvaluateError;
use crate::model::encoder::{Encoder, EncoderOptions};

#[derive(Debug, Args)]
pub(super) struct EncoderArgs {
    /// Weights: a run folder, a checkpoint folder, or a file of `export` or `import`; `random:W` = the same architecture
    /// with fresh values.
    #[arg(long, value_name = "W")]
    pub(super) weights: String,
    /// `teacher` or `student`, where the weights hold both.
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "teacher", hide_possible_values = true)]
    pub(super) network: Network,
    /// Attention heads, for files that do not tell.
    #[arg(long, value_name = "N")]
    pub(super) heads: Option<usize>,
    /// Write the result as one JSON object to FILE, or to standard output.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

impl EncoderArgs {
    /// Opens the weights and says what they are.
    pub(super) fn open(&self) -> Result<Encoder, Error> {
        let compute = device::choose(self.compute.device, self.compute.precision)?;
        let options =
            EncoderOptions { network: self.network, heads: self.heads, ..EncoderOptions::default() };
        let encoder = Encoder::open(&self.weights, &options, &compute.device).map_err(EvaluateError::from)?;
        output::note(&format!("{}: {}, {compute}", self.weights, encoder.description()));
        Ok(encoder)
    }

    /// The result: the table for people, unless the JSON object goes to standard output.
    pub(super) fn report(&self, report: &impl Serialize, table: &str) -> Result<(), Error> {
        output::report(self.json.as_deref(), report, table)
    }
}

/// A share of 1 as percent.
pub(super) fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// Refuses 0 where at least one is needed.
pub(super) fn at_least_one(flags: &[(&str, usize)]) -> Result<(), Error> {
    match flags.iter().find(|(_, value)| *value == 0) {
        Some((flag, _)) => Err(Error::usage(
            format!("`{flag}`: expected 1 or more, found 0"),
            "leave it out for the usual value",
        )),
        None => Ok(()),
    }
}

/// Refuses what is no number above 0.
pub(super) fn above_zero(flag: &str, value: f64) -> Result<(), Error> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(Error::usage(
            format!("`{flag}`: expected a number above 0, found {value}"),
            "leave it out for the usual value",
        )),
    }
}
