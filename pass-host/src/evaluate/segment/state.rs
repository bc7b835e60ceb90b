//! Checkpoints of a segmentation run: head, fine-tuned backbone, optimizer and what they were trained with.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use super::error::SegmentError;
use super::model::SegmentModel;
use super::optimizer::Optimizer;
use crate::checkpoint::{self, CHECKPOINTS, Checkpoint};
use crate::config::segment::SegmentConfig;
use crate::model::parameters::Parameters;

/// `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SegmentState {
    /// Steps done.
    pub iteration: u64,
    /// The configuration.
    pub config: SegmentConfig,
    /// The frozen backbone, as a checksum; nothing if it learned.
    pub backbone: Option<String>,
    /// The data set, as a checksum.
    pub data: String,
}

const MODEL: &str = "model";
const OPTIMIZER: &str = "optimizer";
/// Checkpoints kept.
const KEEP: usize = 2;
/// Fields that may change from one part of a run to the next.
const FREE: [&str; 2] = ["checkpoint_every", "cache_gib"];

/// Checksum of all values of a network.
///
/// # Errors
/// If a tensor cannot be read.
pub fn checksum(parameters: &Parameters) -> candle_core::Result<String> {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for (name, parameter) in parameters.iter() {
        hash.update(name.as_bytes());
        let values = parameter.tensor.detach().flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        values.iter().for_each(|value| hash.update(&value.to_le_bytes()));
    }
    Ok(format!("{:032x}", hash.digest128()))
}

/// Writes the checkpoint of `state.iteration` into a run folder.
///
/// # Errors
/// [`SegmentError`] of the file system; older checkpoints stay valid.
pub fn save(
    out: &Path,
    state: &SegmentState,
    model: &SegmentModel,
    optimizer: &Optimizer,
) -> Result<(), SegmentError> {
    let mut tensors = model.buffers()?;
    tensors.extend(model.learned().into_iter().flat_map(Parameters::to_tensors));
    let moments = optimizer.to_tensors()?;
    let parts = [(MODEL, tensors.as_slice()), (OPTIMIZER, moments.as_slice())];
    checkpoint::save(&out.join(CHECKPOINTS), state.iteration, &parts, state, KEEP, 0)?;
    Ok(())
}

/// Takes over a checkpoint; the number of steps done.
///
/// # Errors
/// [`SegmentError::Changed`] if it was trained with something else, [`SegmentError::Tensors`] if it holds other tensors.
pub fn restore(
    out: &Path,
    found: &Checkpoint,
    now: &SegmentState,
    model: &mut SegmentModel,
    optimizer: &mut Optimizer,
) -> Result<u64, SegmentError> {
    let was: SegmentState = found.state()?;
    if let Some((what, was, now)) = difference(&was, now) {
        return Err(SegmentError::Changed { out: out.into(), what, was, now });
    }
    let mut tensors = found.tensors(MODEL, &Device::Cpu)?;
    let mut take = |name: &str, shape: &[usize]| match tensors.remove(name) {
        Some(tensor) if tensor.dims() == shape => Ok(tensor),
        other => Err(SegmentError::Tensors {
            out: out.into(),
            name: name.to_owned(),
            expected: format!("{shape:?}"),
            found: other.map_or("nothing".into(), |tensor| format!("{:?}", tensor.dims())),
        }),
    };
    for (name, parameter) in model.learned().into_iter().flat_map(Parameters::iter) {
        let stored = take(name, parameter.tensor.dims())?.to_device(parameter.tensor.device())?;
        // in place: encoder and head hold the same storage
        parameter.tensor.detach().flatten_all()?.slice_set(&stored.flatten_all()?, 0, 0)?;
    }
    let mut buffers = BTreeMap::new();
    for (name, buffer) in model.buffers()? {
        buffers.insert(name.clone(), take(&name, buffer.dims())?);
    }
    model.restore_buffers(|name| match buffers.remove(name) {
        Some(tensor) => Ok(tensor),
        None => candle_core::bail!("buffer `{name}` is missing"),
    })?;
    if let Some(name) = tensors.into_keys().next() {
        let (expected, found) = ("nothing".into(), "a tensor".into());
        return Err(SegmentError::Tensors { out: out.into(), name, expected, found });
    }
    optimizer.restore(&model.learned(), found.tensors(OPTIMIZER, &Device::Cpu)?)?;
    Ok(was.iteration)
}

/// The first thing that differs: what, before, now.
fn difference(was: &SegmentState, now: &SegmentState) -> Option<(String, String, String)> {
    let fields = |config: &SegmentConfig| match serde_json::to_value(config) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let now_fields = fields(&now.config);
    for (name, was) in fields(&was.config) {
        let now = now_fields.get(&name).cloned().unwrap_or_default();
        if was != now && !FREE.contains(&name.as_str()) {
            return Some((format!("`{name}`"), was.to_string(), now.to_string()));
        }
    }
    let backbone = |state: &SegmentState| state.backbone.clone().unwrap_or_else(|| "fine-tuned".into());
    let others = [
        ("the checksum of the frozen backbone", backbone(was), backbone(now)),
        ("the checksum of the data set", was.data.clone(), now.data.clone()),
    ];
    others.into_iter().find(|(_, was, now)| was != now).map(|(what, was, now)| (what.into(), was, now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::segment::{HeadKind, SegmentPreset};

    #[test]
    fn what_changes_the_result_may_not_change() {
        let config = SegmentConfig::preset(HeadKind::Linear, SegmentPreset::Small);
        let state = SegmentState { iteration: 3, config, backbone: None, data: "d".into() };
        let mut other = SegmentState { iteration: 0, ..state.clone() };
        other.config.checkpoint_every = 7;
        assert_eq!(difference(&state, &other), None);
        other.config.batch = 5;
        let (what, was, now) = difference(&state, &other).unwrap();
        assert_eq!((what.as_str(), was.as_str(), now.as_str()), ("`batch`", "16", "5"));
        let other = SegmentState { data: "e".into(), ..state.clone() };
        assert!(difference(&state, &other).unwrap().0.contains("data set"));
        let other = SegmentState { backbone: Some("x".into()), ..state.clone() };
        assert!(difference(&state, &other).unwrap().0.contains("backbone"));
    }
}
