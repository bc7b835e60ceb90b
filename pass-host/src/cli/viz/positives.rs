//! `pass-host viz positives`

use clap::Args;

use super::{CommonArgs, QueryArgs, draw};
use crate::config::Border;
use crate::error::Error;
use crate::picture::positives::{Request, figure};

/// The positives of a patch, the most similar of its neighbors, with what each adds to the patch's target.
#[derive(Debug, Args)]
pub(in crate::cli) struct PositivesArgs {
    #[command(flatten)]
    query: QueryArgs,
    /// Side of the neighborhood in patches: 3, 5 or 7.
    #[arg(long, value_name = "N", default_value = "3", value_parser = ["3", "5", "7"], hide_possible_values = true)]
    window: String,
    /// Positives, at most the neighbors.
    #[arg(long, value_name = "K", default_value_t = 4)]
    k: usize,
    /// Beyond the edge of the image: `wrap` (the opposite edge) or `clip` (nothing).
    #[arg(long, value_name = "BORDER", default_value = "wrap", value_parser = ["wrap", "clip"], hide_possible_values = true)]
    border: String,
    #[command(flatten)]
    pub(super) common: CommonArgs,
}

pub(super) fn run(args: &PositivesArgs) -> Result<u8, Error> {
    // clap has checked both words
    let window = args.window.parse().unwrap_or(3);
    let border = if args.border == "clip" { Border::Clip } else { Border::Wrap };
    let most = window * window - 1;
    if !(1..=most).contains(&args.k) {
        return Err(Error::usage(
            format!("`--k {}`: expected 1 to {most} (window {window} x {window}, less the patch)", args.k),
            "give a smaller `--k` or a larger `--window`",
        ));
    }
    let queries = args.query.queries();
    let request = Request { queries: &queries, window, border, k: args.k, layout: args.common.layout() };
    draw(&args.common, "positives", |models, photos| figure(models, photos, &request))
}
