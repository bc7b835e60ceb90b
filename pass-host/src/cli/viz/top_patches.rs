//! `pass-host viz top-patches`

use clap::Args;

use super::{CommonArgs, QueryArgs, draw};
use crate::error::Error;
use crate::picture::top_patches::{Request, SHARE, figure};

/// Where a patch looks: the strongest patches of its row of the last block's attention (Figure 1 of the paper).
#[derive(Debug, Args)]
pub(in crate::cli) struct TopPatchesArgs {
    #[command(flatten)]
    query: QueryArgs,
    /// Share of the patches that are kept, above 0 and at most 1.
    #[arg(long, value_name = "SHARE", default_value_t = SHARE, value_parser = share)]
    share: f64,
    /// Also every head by itself.
    #[arg(long)]
    per_head: bool,
    #[command(flatten)]
    pub(super) common: CommonArgs,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share: &f64| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "expected a number above 0, at most 1".to_owned())
}

pub(super) fn run(args: &TopPatchesArgs) -> Result<u8, Error> {
    let queries = args.query.queries();
    let request = Request {
        queries: &queries,
        share: args.share,
        per_head: args.per_head,
        layout: args.common.layout(),
    };
    draw(&args.common, "top-patches", |models, photos| figure(models, photos, &request))
}
