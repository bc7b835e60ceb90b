//! `pass-host viz pca`

use clap::Args;

use super::{CommonArgs, draw};
use crate::error::Error;
use crate::picture::field::Enlarge;
use crate::picture::pca::{Foreground, Request, figure};

/// Principal components of the patch features of all images as colors: equal colors, equal features.
#[derive(Debug, Args)]
pub(in crate::cli) struct PcaArgs {
    /// Color all patches, not only the foreground.
    #[arg(long, conflicts_with = "swap_foreground")]
    no_foreground: bool,
    /// Color what is taken for the background.
    #[arg(long)]
    swap_foreground: bool,
    /// Patches on the page: `smooth` or `nearest` (squares).
    #[arg(long, value_enum, value_name = "HOW", default_value = "smooth", hide_possible_values = true)]
    enlarge: Enlarge,
    #[command(flatten)]
    pub(super) common: CommonArgs,
}

pub(super) fn run(args: &PcaArgs) -> Result<u8, Error> {
    let foreground = match (args.no_foreground, args.swap_foreground) {
        (true, _) => Foreground::All,
        (false, true) => Foreground::Outside,
        (false, false) => Foreground::Inside,
    };
    let request = Request { foreground, layout: args.common.layout(), enlarge: args.enlarge };
    draw(&args.common, "pca", |models, photos| figure(models, photos, &request))
}
