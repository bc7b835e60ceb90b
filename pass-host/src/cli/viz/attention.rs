//! `pass-host viz attention`

use clap::Args;

use super::{CommonArgs, draw};
use crate::error::Error;
use crate::picture::attention::{Request, figure};
use crate::picture::field::Enlarge;

/// Where the class token looks: both blocks of the aggregation head, or the last block of backbones with a class token.
#[derive(Debug, Args)]
pub(in crate::cli) struct AttentionArgs {
    /// Also every head by itself.
    #[arg(long)]
    per_head: bool,
    /// Patches on the page: `smooth` or `nearest` (squares).
    #[arg(long, value_enum, value_name = "HOW", default_value = "smooth", hide_possible_values = true)]
    enlarge: Enlarge,
    #[command(flatten)]
    pub(super) common: CommonArgs,
}

pub(super) fn run(args: &AttentionArgs) -> Result<u8, Error> {
    let request = Request { per_head: args.per_head, layout: args.common.layout(), enlarge: args.enlarge };
    draw(&args.common, "attention", |models, photos| figure(models, photos, &request))
}
