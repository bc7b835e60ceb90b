//! ResNet-50 with torchvision's names.

use std::collections::HashMap;

use super::error::Problem;
use super::origin::Selected;
use super::tensor_file::TensorFile;
use super::{ImportSettings, Sizes, Weight, Weights};
use crate::model::resnet::ResNetSizes;

/// The ResNet-50 among the selected tensors.
pub(super) fn read(
    file: &mut TensorFile,
    selected: Selected,
    settings: &ImportSettings,
) -> Result<Weights, Problem> {
    for (flag, given) in [("--heads", settings.heads), ("--grid", settings.grid)] {
        if given.is_some() {
            return Err(Problem::Flag { flag, reason: "a ResNet has neither heads nor position embeddings" });
        }
    }
    let Selected { mut entries, prefix, left_out } = selected;
    let found = entries.len();
    let sizes = ResNetSizes::find(|name| entries.get(name).map(|entry| entry.shape.clone()))
        .map_err(|name| Problem::Missing { name: format!("{prefix}{name}") })?;
    let mut tensors = Vec::with_capacity(found);
    for (name, shape) in sizes.specification() {
        let whole = format!("{prefix}{name}");
        let Some(entry) = entries.remove(&name) else { return Err(Problem::Missing { name: whole }) };
        if entry.shape != shape {
            let (expected, found) = (format!("{shape:?}"), format!("{:?}", entry.shape));
            return Err(Problem::unexpected(&whole, "shape", expected, found));
        }
        let values = file.read(&whole, &entry)?;
        tensors.push(Weight { name, shape, values });
    }
    if let Some(name) = entries.keys().next() {
        return Err(Problem::NotUnderstood { name: format!("{prefix}{name}") });
    }
    let usage = "torchvision.models.resnet50(), load_state_dict(..., strict=False): all but fc.*".to_owned();
    Ok(Weights {
        backbone: Sizes::ResNet(sizes),
        used: tensors.len(),
        found,
        tensors,
        left_out,
        notes: Vec::new(),
        metadata: HashMap::from([("format".into(), "pt".into()), ("architecture".into(), "resnet50".into())]),
        usage,
    })
}
