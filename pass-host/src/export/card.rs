//! The model card beside an export: what it is, what goes in, what comes out, how to load it.

use std::fmt::Write;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use super::source::Source;
use crate::quantize::pass_file::PassFile;

/// What a card says beside what the weights say.
pub(super) struct Card<'a> {
    /// The name of the file or folder.
    pub(super) name: &'a str,
    /// For whom it is.
    pub(super) format: &'a str,
    /// Lines of Python (or of a shell) that load it.
    pub(super) usage: &'a [String],
    /// What goes in and comes out, one sentence each.
    pub(super) interface: &'a [String],
    /// The int8 file that it has its weights from.
    pub(super) quantized: Option<&'a PassFile>,
    /// Name and content of every file of the export.
    pub(super) files: &'a [(String, Vec<u8>)],
}

/// The card in Markdown.
pub(super) fn text(source: &Source, card: &Card<'_>) -> String {
    let sizes = &source.architecture;
    let side = sizes.grid * sizes.patch_size;
    let (mean, std) = source.normalization;
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line(format!("# {}\n", card.name));
    line(format!(
        "A Vision Transformer: {} wide, {} blocks, {} heads, hidden width {}, patches of {} pixels, positions learned on \
         {side}x{side}{}. Exported for {} by pass-host {}.\n",
        sizes.dim,
        sizes.depth,
        sizes.heads,
        source.hidden,
        sizes.patch_size,
        prefix(source),
        card.format,
        env!("CARGO_PKG_VERSION"),
    ));
    line("## Training\n".into());
    line(training(source));
    line("\n## Input and output\n".into());
    line(format!("- RGB images, values from 0 to 1, minus {mean:?}, over {std:?} (channel by channel)."));
    line(format!("- Trained on crops of {side}x{side}; other sizes need positions resized to their grid."));
    card.interface.iter().for_each(|sentence| line(format!("- {sentence}")));
    if let Some(file) = card.quantized {
        let contract = file.contract;
        line("\n## Accuracy of the int8 weights\n".into());
        line(format!(
            "Measured when the `.pass` file ({} weights) was written, on photos that took no part in it, device arithmetic \
             against float: mean cosine of patch tokens {:.5}, first percentile {:.5}; calibrated on {} photos.",
            file.mode.name(),
            contract.mean_cosine,
            contract.first_percentile,
            contract.images,
        ));
    }
    line("\n## Use\n".into());
    line("```".into());
    card.usage.iter().for_each(|usage| line(usage.clone()));
    line("```".into());
    line("\n## Files\n".into());
    line("| file | bytes | XXH3-64 (`xxhsum -H3`) |".into());
    line("|---|---|---|".into());
    for (name, bytes) in card.files {
        line(format!("| {name} | {} | {:016x} |", bytes.len(), xxh3_64(bytes)));
    }
    line("\n## Licence and limits\n".into());
    line(
        "Licence: to be filled in by whoever publishes it; it depends on the images and weights it was trained from. \
         Learned without labels: what was common or missing in the images is so in the features. Not evaluated here for any \
         particular use."
            .into(),
    );
    text
}

fn prefix(source: &Source) -> String {
    match (source.parts.class_token, source.parts.registers) {
        (false, 0) => String::from(", no class token in the blocks"),
        (class, registers) => {
            let class = if class { ", a class token" } else { "" };
            let registers = if registers > 0 { format!(", {registers} registers") } else { String::new() };
            format!("{class}{registers}")
        }
    }
}

/// What the checkpoint says about how it was trained.
fn training(source: &Source) -> String {
    let Some(run) = &source.run else {
        return "The weights came as a file, which does not tell how they were trained.".into();
    };
    let config = &run.config;
    let mut text = format!(
        "Self-supervised, {} at step {} (epoch {:.2}), batch {}, seed {}.\n\n",
        match config.patch.enabled {
            true => format!("{} with the patch objective PASS", method(config)),
            false => format!("{} alone", method(config)),
        },
        run.step,
        run.epoch,
        run.batch,
        config.seed,
    );
    // names without folders: a card is published, where images lie is not
    let name = |path: &String| {
        Path::new(path).file_name().map_or(path.clone(), |name| name.to_string_lossy().into())
    };
    let images = config.data.images.iter().map(name).collect::<Vec<String>>().join("`, `");
    write!(
        text,
        "Images: `{images}`; hash of the sorted list {}, hash of the configuration {}. The whole configuration is the run's \
         `config.toml`.",
        run.data_hash, run.config_hash
    )
    .ok();
    text
}

fn method(config: &crate::config::TrainConfig) -> String {
    serde_json::to_value(config.image.method)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}
