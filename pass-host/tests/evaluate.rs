//! k-NN and dense retrieval against brute force in NumPy (`fixtures/evaluate/make.py`).

use std::fs;
use std::path::Path;

use ndarray::{Array2, ArrayView2, Axis};
use pass_host::evaluate::image_features::normalize_rows;
use pass_host::evaluate::knn;
use pass_host::evaluate::neighbors::nearest;
use pass_host::evaluate::retrieval::bank::{Bank, choose, patch_shares};
use pass_host::evaluate::retrieval::confusion::Confusion;
use pass_host::evaluate::retrieval::read_out::{enlarge, read_out};
use safetensors::{Dtype, SafeTensors};

/// A fixture file, read whole.
struct Fixture(Vec<u8>);

impl Fixture {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/evaluate").join(name);
        Self(
            fs::read(&path)
                .unwrap_or_else(|e| panic!("{}: {e}; run fixtures/evaluate/make.py", path.display())),
        )
    }

    fn number(&self, key: &str) -> f64 {
        let (_, header) = SafeTensors::read_metadata(&self.0).expect("a header");
        header.metadata().as_ref().expect("metadata")[key].parse().expect("a number")
    }

    fn size(&self, key: &str) -> usize {
        self.number(key) as usize
    }

    fn read<const N: usize, T>(
        &self,
        name: &str,
        dtype: Dtype,
        value: fn([u8; N]) -> T,
    ) -> (Vec<T>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        let tensor = file.tensor(name).expect("a tensor");
        assert_eq!(tensor.dtype(), dtype, "{name}");
        let values = tensor.data().chunks_exact(N).map(|bytes| value(bytes.try_into().expect("N bytes")));
        (values.collect(), tensor.shape().to_vec())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.read(name, Dtype::F32, f32::from_le_bytes).0
    }

    fn doubles(&self, name: &str) -> Vec<f64> {
        self.read(name, Dtype::F64, f64::from_le_bytes).0
    }

    fn bytes(&self, name: &str) -> (Vec<u8>, Vec<usize>) {
        self.read(name, Dtype::U8, u8::from_le_bytes)
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        self.read(name, Dtype::I64, i64::from_le_bytes).0.into_iter().map(|value| value as usize).collect()
    }

    /// L2-normalized rows.
    fn unit_rows(&self, name: &str) -> Array2<f32> {
        let (values, shape) = self.read(name, Dtype::F32, f32::from_le_bytes);
        let dim = shape[shape.len() - 1];
        let mut rows = Array2::from_shape_vec((values.len() / dim, dim), values).expect("rows");
        normalize_rows(&mut rows);
        rows
    }
}

#[test]
fn knn_equals_brute_force() {
    let fixture = Fixture::open("knn.safetensors");
    let (train, val) = (fixture.unit_rows("in.train"), fixture.unit_rows("in.val"));
    let (train_labels, val_labels) = (fixture.indices("in.train_labels"), fixture.indices("in.val_labels"));
    let (ks, classes, temperature) =
        (fixture.indices("in.k"), fixture.size("classes"), fixture.number("temperature"));
    let most = *ks.iter().max().expect("numbers of neighbors");

    let neighbors = nearest(train.view(), val.view(), most);
    let (expected, _) = fixture.bytes("out.neighbors");
    for (image, (found, expected)) in neighbors.iter().zip(expected.chunks(most)).enumerate() {
        let found: Vec<u8> = found.iter().map(|neighbor| neighbor.row as u8).collect();
        assert_eq!(found, expected, "neighbors of image {image}");
    }
    let ranks = fixture.indices("out.rank");
    for (&k, expected) in ks.iter().zip(ranks.chunks(val_labels.len())) {
        let found = knn::label_ranks(&neighbors, k, &train_labels, &val_labels, classes, temperature);
        assert_eq!(found, expected, "ranks at k = {k}");
    }
    let found = knn::scores(&train, &train_labels, &val, &val_labels, classes, &ks, temperature);
    let (top1, top5) = (fixture.doubles("out.top1"), fixture.doubles("out.top5"));
    for ((score, top1), top5) in found.iter().zip(top1).zip(top5) {
        assert!(
            (score.top1 - top1).abs() < 1e-12 && (score.top5 - top5).abs() < 1e-12,
            "{score:?} {top1} {top5}"
        );
    }
    assert!(found.iter().any(|score| score.top1 > 0.0 && score.top1 < 1.0), "the fixture can fail");
}

#[test]
fn retrieval_equals_brute_force() {
    let fixture = Fixture::open("retrieval.safetensors");
    let [classes, rows, columns, k, quota] =
        ["classes", "rows", "columns", "k", "quota"].map(|key| fixture.size(key));
    let (grid, patches, temperature) = ((rows, columns), rows * columns, fixture.number("temperature"));
    let (labels, shape) = fixture.bytes("in.labels");
    let size = (shape[1], shape[2]);
    let features = fixture.unit_rows("in.features");
    let uniform = fixture.doubles("in.uniform");
    let expected_shares = fixture.floats("out.shares");
    let (chosen, _) = fixture.bytes("out.chosen");
    let pictures: Vec<&[u8]> = labels.chunks(size.0 * size.1).collect();
    let (train, val) = pictures.split_at(4);

    let [mut all, mut sampled] = [(); 2].map(|()| Bank::new(features.ncols(), classes));
    for (image, labels) in train.iter().enumerate() {
        let shares = patch_shares(labels, size, grid, classes);
        let expected = &expected_shares[image * patches * classes..][..patches * classes];
        for (found, expected) in shares.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "shares of image {image}: {found} {expected}");
        }
        let kept = choose(shares.view(), quota, &uniform[image * patches..][..patches]);
        let expected: Vec<usize> =
            (0..patches).filter(|patch| chosen[image * patches + patch] == 1).collect();
        assert_eq!(kept, expected, "patches of image {image}");
        let mut add = |bank: &mut Bank, patches_kept: &[usize]| {
            for &patch in patches_kept {
                let feature = features.row(image * patches + patch);
                bank.push(
                    feature.as_slice().expect("one row"),
                    shares.row(patch).as_slice().expect("one row"),
                );
            }
        };
        add(&mut all, &choose(shares.view(), patches, &uniform));
        add(&mut sampled, &kept);
    }
    let queries = features.slice_axis(Axis(0), (4 * patches..).into());
    for (name, bank) in [("all", &all), ("sampled", &sampled)] {
        check_parsing(&fixture, name, bank, queries, val, (k, temperature), grid, size);
    }
    assert!(sampled.len() == 4 * quota && all.len() > sampled.len());
}

fn check_parsing(
    fixture: &Fixture,
    name: &str,
    bank: &Bank,
    queries: ArrayView2<'_, f32>,
    pictures: &[&[u8]],
    (k, temperature): (usize, f64),
    grid: (usize, usize),
    size: (usize, usize),
) {
    let soft = read_out(bank, queries, k, temperature);
    for (found, expected) in soft.iter().zip(fixture.floats(&format!("out.{name}.soft"))) {
        assert!((found - expected).abs() < 2e-5, "{name}: soft label {found}, expected {expected}");
    }
    let classes = soft.ncols();
    let (expected, _) = fixture.bytes(&format!("out.{name}.labels"));
    let mut confusion = Confusion::new(classes);
    let parts =
        soft.axis_chunks_iter(Axis(0), grid.0 * grid.1).zip(pictures).zip(expected.chunks(size.0 * size.1));
    for ((soft, labels), expected) in parts {
        let found = enlarge(soft, grid, size);
        let differing = found.iter().zip(expected).filter(|(found, expected)| found != expected).count();
        assert_eq!(differing, 0, "{name}: pixels of another class");
        confusion.add(labels, &found);
    }
    let names: Vec<String> = (0..classes).map(|class| class.to_string()).collect();
    let (found, expected) = (confusion.scores(&names), fixture.doubles(&format!("out.{name}.miou"))[0]);
    assert!((found.mean_iou.expect("labelled pixels") - expected).abs() < 1e-12);
    assert!(
        expected > 0.2 && expected < 0.99 && found.iou.iter().any(|(_, iou)| iou.is_none()),
        "the fixture can fail"
    );
}
