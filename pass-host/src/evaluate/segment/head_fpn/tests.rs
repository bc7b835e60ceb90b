use std::collections::HashMap;
use std::path::Path;

use super::*;
use crate::ops::{PixelLabels, largest_class};
use std::sync::Arc;

/// Largest difference to PyTorch in double precision, as a share of the largest value of a tensor.
const TOLERANCE: f32 = 2e-5;

/// PyTorch's answers, written by `fixtures/segment/make.py`.
fn fixture() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/segment/fpn.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (values(found), values(expected));
    let scale = expected.iter().fold(1e-3f32, |largest, value| largest.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!((found - expected).abs() <= TOLERANCE * scale, "{what} [{i}]: {found}, PyTorch {expected}");
    }
}

/// The head of the fixture.
fn head(fixture: &HashMap<String, Tensor>, ops: Ops) -> FpnHead {
    let sizes = FpnSizes { dims: [6; 4], neck: 5, channels: 4, classes: 3 };
    let mut head = FpnHead::new(sizes, 0, &Device::Cpu, ops).unwrap();
    let stored: Vec<&str> = fixture.keys().filter_map(|name| name.strip_prefix("state.")).collect();
    let own = head.parameters().iter().count() + head.buffers().unwrap().len();
    assert_eq!(stored.len(), own, "every tensor of the fixture has its place");
    for (name, parameter) in head.parameters().iter() {
        let value = &fixture[&format!("state.{name}")];
        assert_eq!(parameter.tensor.dims(), value.dims(), "{name}");
        parameter
            .tensor
            .detach()
            .flatten_all()
            .unwrap()
            .slice_set(&value.flatten_all().unwrap(), 0, 0)
            .unwrap();
    }
    head.restore(|name| Ok(fixture[&format!("state.{name}")].clone())).unwrap();
    head
}

fn channels_last(map: &Tensor) -> Tensor {
    map.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

fn maps(fixture: &HashMap<String, Tensor>) -> Vec<Var> {
    let map = |level: usize| Var::from_tensor(&channels_last(&fixture[&format!("in.map.{level}")])).unwrap();
    (0..LEVELS).map(map).collect()
}

fn tensors(maps: &[Var]) -> Vec<Tensor> {
    maps.iter().map(|map| map.as_tensor().clone()).collect()
}

#[test]
fn a_training_step_is_that_of_pytorch() {
    let fixture = fixture();
    for ops in [Ops::fused(), Ops::reference()] {
        let mut head = head(&fixture, ops);
        let maps = maps(&fixture);
        let logits = head.train(&tensors(&maps), &fixture["in.keep"]).unwrap();
        assert_close("logits", &logits, &channels_last(&fixture["out.logits"]));

        let labels = values(&fixture["in.labels"]).iter().map(|&label| label as u8).collect::<Vec<_>>();
        let labelled = labels.iter().filter(|&&label| label != 255).count() as f64;
        let target = PixelLabels {
            labels: labels.into(),
            rows: Arc::new(Taps::bilinear(3, 12)),
            columns: Arc::new(Taps::bilinear(4, 16)),
        };
        let all = target.labels.len() as f64;
        let mean = ops.pixel_cross_entropy(&logits, &target, 1.0 / labelled).unwrap();
        assert_close("loss over labelled pixels", &mean, &fixture["out.loss_labelled"]);
        let loss = ops.pixel_cross_entropy(&logits, &target, 1.0 / all).unwrap();
        assert_close("loss", &loss, &fixture["out.loss"]);

        let gradients = loss.backward().unwrap();
        for (name, parameter) in head.parameters().iter() {
            let gradient =
                gradients.get(&parameter.tensor).unwrap_or_else(|| panic!("{name} has no gradient"));
            assert_close(name, gradient, &fixture[&format!("out.grad.{name}")]);
        }
        for (level, map) in maps.iter().enumerate() {
            let expected = channels_last(&fixture[&format!("out.grad.map.{level}")]);
            assert_close("gradient of a map", gradients.get(map).unwrap(), &expected);
        }
        for (name, buffer) in head.buffers().unwrap() {
            assert_close(&name, &buffer, &fixture[&format!("after.{name}")]);
        }

        let logits = head.judge(&tensors(&maps)).unwrap();
        assert_close("test logits", &logits, &channels_last(&fixture["out.test_logits"]));
        let rows = Taps::bilinear(3, 12).then(&Taps::bilinear(12, 17));
        let columns = Taps::bilinear(4, 16).then(&Taps::bilinear(16, 21));
        let found: Vec<u8> = values(&logits)
            .chunks_exact(3 * 4 * 3)
            .flat_map(|map| largest_class(map, 3, &rows, &columns))
            .collect();
        let expected: Vec<u8> =
            values(&fixture["out.test_classes"]).iter().map(|&class| class as u8).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let fixture = fixture();
    let head = std::cell::RefCell::new(head(&fixture, Ops::fused()));
    let maps = tensors(&maps(&fixture));
    let weights =
        Tensor::from_vec((0..72).map(|i| (i as f32 * 0.7).sin()).collect(), (2, 3, 4, 3), &Device::Cpu);
    let weights = weights.unwrap();
    let loss = || {
        let logits = head.borrow_mut().train(&maps, &fixture["in.keep"]).unwrap();
        logits.mul(&weights).unwrap().sum_all().unwrap()
    };
    let gradients = loss().backward().unwrap();
    let step = 2e-3;
    let parameters = head.borrow().parameters().clone();
    for (name, parameter) in parameters.iter() {
        let flat = parameter.tensor.detach().flatten_all().unwrap();
        let gradient = values(gradients.get(&parameter.tensor).unwrap());
        // f32 slopes of a function with kinks: a few places, the best agreement of each tensor counts
        let place =
            (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap();
        let at = |shift: f32| {
            let before = values(&flat)[place];
            let moved = Tensor::new(&[before + shift], &Device::Cpu).unwrap();
            flat.slice_set(&moved, 0, place).unwrap();
            let value = loss().to_scalar::<f32>().unwrap();
            flat.slice_set(&Tensor::new(&[before], &Device::Cpu).unwrap(), 0, place).unwrap();
            value
        };
        let slope = (at(step) - at(-step)) / (2.0 * step);
        let error = (slope - gradient[place]).abs() / (gradient[place].abs() + 0.05);
        assert!(error < 0.03, "{name} [{place}]: gradient {}, slope {slope}", gradient[place]);
    }
}

#[test]
fn blocks_are_spread_over_any_depth() {
    assert_eq!(blocks(12), [2, 5, 8, 11]);
    assert_eq!(blocks(24), [5, 11, 17, 23]);
    assert_eq!(blocks(6), [1, 2, 4, 5]);
    assert_eq!(blocks(4), [0, 1, 2, 3]);
    assert_eq!(blocks(1), [0, 0, 0, 0]);
}

#[test]
fn dropped_channels_keep_their_mean() {
    let sizes = FpnSizes { dims: [2; 4], neck: 2, channels: 64, classes: 2 };
    let head = FpnHead::new(sizes, 0, &Device::Cpu, Ops::fused()).unwrap();
    let keep = values(&head.dropout(100, 0.1, 3, 7).unwrap());
    let kept = keep.iter().filter(|&&factor| factor > 0.0).count() as f32 / 6400.0;
    assert!((kept - 0.9).abs() < 0.02, "{kept}");
    assert!(keep.iter().all(|&factor| factor == 0.0 || (factor - 1.0 / 0.9).abs() < 1e-6));
    assert_eq!(values(&head.dropout(2, 0.0, 3, 7).unwrap()), vec![1.0; 128]);
    assert_ne!(keep, values(&head.dropout(100, 0.1, 3, 8).unwrap()));
}
