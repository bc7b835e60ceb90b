//! The golden set: a manifest, safetensors files and JSON files, with a record of what has been read and checked.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;

use crate::compare::{Comparison, SteppedWeights, Tolerance, compare, compare_sets};
use crate::json::GoldenJson;

/// The environment variable that names another set of the same format.
pub const DIR_VARIABLE: &str = "PASS_GOLDEN_DIR";

/// What the manifest says about one tensor.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct TensorSpec {
    /// Axes, outermost first.
    pub shape: Vec<usize>,
    /// Largest absolute value, the scale of `atol`.
    pub absmax: f64,
    /// One line for the reader.
    pub meaning: String,
    /// Given data, not a result.
    pub input: bool,
    /// Whole numbers: compared exactly.
    pub integer: bool,
    /// Absolute tolerance of a result.
    pub atol: Option<f64>,
    /// Relative tolerance of a result.
    pub rtol: Option<f64>,
    /// `false`: pure rounding noise, never compared.
    pub compare: bool,
    /// Flat elements `[from, to)` that are rounding noise.
    pub compare_excluding: Option<[usize; 2]>,
    /// Measured difference between a single- and a double-precision run.
    pub f32_vs_f64_max_abs: Option<f64>,
}

impl Default for TensorSpec {
    fn default() -> Self {
        Self {
            shape: Vec::new(),
            absmax: 0.0,
            meaning: String::new(),
            input: false,
            integer: false,
            atol: None,
            rtol: None,
            compare: true,
            compare_excluding: None,
            f32_vs_f64_max_abs: None,
        }
    }
}

impl TensorSpec {
    /// The tolerance the manifest asks for: exact for integers, `atol + rtol * abs(expected)` otherwise.
    ///
    /// # Panics
    /// When a floating-point result carries no `atol`.
    pub fn tolerance(&self) -> Tolerance {
        if self.integer {
            return Tolerance::EXACT;
        }
        let atol = self.atol.expect("the manifest gives every floating-point result an `atol`");
        Tolerance { atol, rtol: self.rtol.unwrap_or(0.0) }
    }
}

/// The golden set and the record of what was read and checked in it.
#[derive(Debug)]
pub struct Golden {
    dir: PathBuf,
    entries: BTreeMap<String, Value>,
    json_names: BTreeSet<String>,
    touched: RefCell<BTreeMap<String, BTreeSet<String>>>,
}

impl Golden {
    /// Opens the folder named by `PASS_GOLDEN_DIR`, else `fixtures/golden` of the workspace.
    ///
    /// # Panics
    /// When the manifest is missing or malformed, naming the path.
    pub fn open() -> Self {
        match std::env::var_os(DIR_VARIABLE) {
            Some(dir) => Self::open_dir(Path::new(&dir)),
            None => Self::open_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/golden")),
        }
    }

    /// Opens the set in `dir`.
    ///
    /// # Panics
    /// As [`Golden::open`].
    pub fn open_dir(dir: &Path) -> Self {
        let path = dir.join("manifest.json");
        let manifest = read_json(&path);
        assert_eq!(manifest["format"], 1, "{}: unknown format", path.display());
        let files = manifest["files"].as_array().unwrap_or_else(|| panic!("{}: no `files`", path.display()));
        let entries: BTreeMap<_, _> = files
            .iter()
            .map(|entry| {
                let name = entry["file"]
                    .as_str()
                    .unwrap_or_else(|| panic!("{}: entry without `file`", path.display()));
                (name.to_owned(), entry.clone())
            })
            .collect();
        assert_eq!(entries.len(), files.len(), "{}: a file is listed twice", path.display());
        let json_names =
            manifest["json_files"].as_object().map(|o| o.keys().cloned().collect()).unwrap_or_default();
        Self { dir: dir.to_owned(), entries, json_names, touched: RefCell::default() }
    }

    /// The folder of the set.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Loads one safetensors file and holds it against the manifest.
    ///
    /// # Panics
    /// When manifest and file disagree on names, shapes or types.
    pub fn file(&self, name: &str) -> GoldenFile<'_> {
        let entry = self
            .entries
            .get(name)
            .unwrap_or_else(|| panic!("{}: the manifest does not list `{name}`", self.dir.display()));
        GoldenFile { golden: self, name: name.to_owned(), entry, tensors: load(&self.dir.join(name), entry) }
    }

    /// Loads one JSON file of the set.
    ///
    /// # Panics
    /// When it is not listed, missing or malformed.
    pub fn json(&self, name: &str) -> GoldenJson<'_> {
        assert!(
            self.json_names.contains(name),
            "{}: the manifest does not list `{name}` under `json_files`",
            self.dir.display()
        );
        GoldenJson::new(self, name, read_json(&self.dir.join(name)))
    }

    /// Fails when any result of `file` was not checked, or any input was not used, since the set was opened.
    ///
    /// # Panics
    /// Naming everything that is left.
    pub fn assert_covered(&self, file: &str) {
        let left = if self.json_names.contains(file) {
            self.json(file).unread()
        } else {
            let specs =
                specs(self.entries.get(file).unwrap_or_else(|| panic!("`{file}` is not in the manifest")));
            let touched = self.touched.borrow();
            let touched = touched.get(file);
            specs
                .into_iter()
                .filter(|(_, spec)| spec.input || spec.compare)
                .filter(|(name, _)| !touched.is_some_and(|set| set.contains(name)))
                .map(|(name, spec)| {
                    format!(
                        "{name} ({})",
                        if spec.input { "input never used" } else { "result never checked" }
                    )
                })
                .collect()
        };
        assert!(left.is_empty(), "{file}: {} entries not covered:\n  {}", left.len(), left.join("\n  "));
    }

    /// Fails when the folder or the manifest holds a file that is not in `known`, or lacks one that is.
    ///
    /// # Panics
    /// Naming the unknown and the missing files.
    pub fn assert_files_known(&self, known: &[&str]) {
        let mut found: BTreeSet<String> = self.entries.keys().chain(&self.json_names).cloned().collect();
        let listing =
            std::fs::read_dir(&self.dir).unwrap_or_else(|error| panic!("{}: {error}", self.dir.display()));
        for item in listing {
            let name = item.expect("readable folder entry").file_name().to_string_lossy().into_owned();
            if name != "README.md" && name != "manifest.json" {
                found.insert(name);
            }
        }
        let unknown: Vec<_> = found.iter().filter(|name| !known.contains(&name.as_str())).collect();
        assert!(unknown.is_empty(), "no test knows these files of {}: {unknown:?}", self.dir.display());
        let missing: Vec<_> = known.iter().filter(|name| !found.contains(**name)).collect();
        assert!(missing.is_empty(), "{} lacks {missing:?}", self.dir.display());
    }

    pub(crate) fn touch(&self, file: &str, entry: &str) {
        self.touched.borrow_mut().entry(file.to_owned()).or_default().insert(entry.to_owned());
    }

    pub(crate) fn touched(&self, file: &str) -> BTreeSet<String> {
        self.touched.borrow().get(file).cloned().unwrap_or_default()
    }
}

/// One safetensors file of the set.
#[derive(Debug)]
pub struct GoldenFile<'a> {
    golden: &'a Golden,
    name: String,
    entry: &'a Value,
    tensors: BTreeMap<String, (TensorSpec, Vec<f32>)>,
}

impl GoldenFile<'_> {
    /// The whole manifest entry.
    pub fn entry(&self) -> &Value {
        self.entry
    }

    /// The `hyper` object of the manifest entry.
    pub fn hyper(&self) -> &Value {
        &self.entry["hyper"]
    }

    /// The `cases` object of the manifest entry.
    pub fn cases(&self) -> &Value {
        &self.entry["cases"]
    }

    /// One whole-number hyper-parameter.
    ///
    /// # Panics
    /// When it is missing or not a whole number.
    pub fn hyper_usize(&self, key: &str) -> usize {
        let value = &self.hyper()[key];
        value
            .as_u64()
            .unwrap_or_else(|| panic!("{}: hyper `{key}`: whole number expected, found {value}", self.name))
            as usize
    }

    /// One numeric hyper-parameter.
    ///
    /// # Panics
    /// When it is missing or not a number.
    pub fn hyper_f64(&self, key: &str) -> f64 {
        let value = &self.hyper()[key];
        value
            .as_f64()
            .unwrap_or_else(|| panic!("{}: hyper `{key}`: number expected, found {value}", self.name))
    }

    /// One boolean hyper-parameter.
    ///
    /// # Panics
    /// When it is missing or not a boolean.
    pub fn hyper_bool(&self, key: &str) -> bool {
        let value = &self.hyper()[key];
        value
            .as_bool()
            .unwrap_or_else(|| panic!("{}: hyper `{key}`: boolean expected, found {value}", self.name))
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    /// Whether the file holds `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What the manifest says about `name`.
    ///
    /// # Panics
    /// When the file does not hold it.
    pub fn spec(&self, name: &str) -> &TensorSpec {
        &self.lookup(name).0
    }

    /// Values and shape of `name`. Reading an input covers it; reading a result does not.
    ///
    /// # Panics
    /// When the file does not hold it.
    pub fn tensor(&self, name: &str) -> (&[f32], &[usize]) {
        let (spec, data) = self.lookup(name);
        if spec.input {
            self.golden.touch(&self.name, name);
        }
        (data, &spec.shape)
    }

    /// Values and shape of `name`, given data that the manifest does not mark as such. Reading covers it.
    ///
    /// # Panics
    /// When the file does not hold it.
    pub fn given(&self, name: &str) -> (&[f32], &[usize]) {
        self.golden.touch(&self.name, name);
        self.tensor(name)
    }

    /// An integer tensor as indices, and its shape.
    ///
    /// # Panics
    /// When a value is not a whole number `>= 0`.
    pub fn indices(&self, name: &str) -> (Vec<usize>, &[usize]) {
        let (data, shape) = self.tensor(name);
        let whole = |&value: &f32| {
            assert!(value >= 0.0 && value.fract() == 0.0, "{} `{name}`: {value} is not an index", self.name);
            value as usize
        };
        (data.iter().map(whole).collect(), shape)
    }

    /// Asserts that `actual` is what the set holds under `name`, within the manifest's tolerance.
    ///
    /// # Panics
    /// Naming file, tensor, worst index, expected, found and tolerance.
    pub fn check(&self, name: &str, actual: &[f32]) {
        self.check_with(name, actual, self.spec(name).tolerance());
    }

    /// As [`GoldenFile::check`] with a tolerance stated elsewhere in the manifest entry.
    ///
    /// # Panics
    /// As [`GoldenFile::check`].
    pub fn check_with(&self, name: &str, actual: &[f32], tolerance: Tolerance) {
        self.compare(name, actual, tolerance).assert_within();
    }

    /// Asserts that the rows of the last axis hold the same numbers in any order (positives of a patch).
    ///
    /// # Panics
    /// As [`GoldenFile::check`].
    pub fn check_sets(&self, name: &str, actual: &[f32]) {
        let (spec, expected) = self.lookup(name);
        self.golden.touch(&self.name, name);
        let row = spec.shape.last().copied().unwrap_or(1);
        compare_sets(&self.label(name), expected, actual, row).assert_within();
    }

    /// Compares without asserting: for rules over many tensors. The caller must assert on the result.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn compare(&self, name: &str, actual: &[f32], tolerance: Tolerance) -> Comparison {
        let (spec, expected) = self.lookup(name);
        self.golden.touch(&self.name, name);
        let excluded = match spec.compare_excluding {
            _ if !spec.compare => 0..expected.len(),
            Some([from, to]) => from..to,
            None => 0..0,
        };
        compare(&self.label(name), expected, actual, tolerance, excluded)
    }

    /// The `stepped_weights_rule` of the manifest entry for the tensors after `step` (for example `"after1"`).
    ///
    /// # Panics
    /// When the entry holds no such rule.
    pub fn stepped_weights(&self, step: &str) -> SteppedWeights<'_> {
        let rule = &self.entry["stepped_weights_rule"];
        let number = |key: &str| {
            rule[key]
                .as_f64()
                .unwrap_or_else(|| panic!("{}: stepped_weights_rule has no number `{key}`", self.name))
        };
        SteppedWeights::new(self, step, number("fraction_within_atol"), number(&format!("hard_limit_{step}")))
    }

    /// Fails when any result was not checked or any input not used (see [`Golden::assert_covered`]).
    ///
    /// # Panics
    /// Naming everything that is left.
    pub fn finish(self) {
        self.golden.assert_covered(&self.name);
    }

    fn lookup(&self, name: &str) -> &(TensorSpec, Vec<f32>) {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor `{name}`", self.name))
    }

    fn label(&self, name: &str) -> String {
        format!("{} `{name}`", self.name)
    }
}

fn specs(entry: &Value) -> BTreeMap<String, TensorSpec> {
    let tensors = entry["tensors"].as_object().expect("a manifest entry lists its tensors");
    tensors
        .iter()
        .map(|(name, spec)| {
            let spec = TensorSpec::deserialize(spec)
                .unwrap_or_else(|error| panic!("manifest: {} `{name}`: {error}", entry["file"]));
            (name.clone(), spec)
        })
        .collect()
}

fn load(path: &Path, entry: &Value) -> BTreeMap<String, (TensorSpec, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let stored =
        SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let specs = specs(entry);
    for name in stored.names() {
        assert!(specs.contains_key(name), "{}: `{name}` is not in the manifest", path.display());
    }
    specs
        .into_iter()
        .map(|(name, spec)| {
            let view =
                stored.tensor(&name).unwrap_or_else(|error| panic!("{}: `{name}`: {error}", path.display()));
            assert_eq!(view.dtype(), Dtype::F32, "{}: `{name}`: type", path.display());
            assert_eq!(view.shape(), spec.shape, "{}: `{name}`: shape (file, manifest)", path.display());
            let data = view
                .data()
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes")))
                .collect();
            (name, (spec, data))
        })
        .collect()
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "result never checked")]
    fn a_result_nobody_checked_fails() {
        Golden::open().file("loss.safetensors").finish();
    }

    #[test]
    #[should_panic(expected = "entries not covered")]
    fn reading_a_result_does_not_cover_it() {
        let golden = Golden::open();
        let file = golden.file("loss.safetensors");
        for name in file.names() {
            let _ = file.tensor(name);
        }
        file.finish();
    }

    #[test]
    fn checking_everything_covers_the_file() {
        let golden = Golden::open();
        let file = golden.file("loss.safetensors");
        for name in file.names() {
            let values = file.tensor(name).0.to_vec();
            file.check_with(name, &values, Tolerance::EXACT);
        }
        file.finish();
    }

    #[test]
    #[should_panic(expected = "values differ")]
    fn a_wrong_value_fails() {
        let golden = Golden::open();
        let file = golden.file("loss.safetensors");
        let name = file.names().into_iter().find(|name| !file.spec(name).input).expect("a result");
        let values: Vec<f32> = file.tensor(name).0.iter().map(|value| value + 1.0).collect();
        file.check(name, &values);
    }

    #[test]
    #[should_panic(expected = "surprise.safetensors")]
    fn an_unknown_file_fails() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let manifest = r#"{"format": 1, "files": [], "json_files": {}}"#;
        std::fs::write(dir.path().join("manifest.json"), manifest).expect("written");
        std::fs::write(dir.path().join("surprise.safetensors"), b"").expect("written");
        Golden::open_dir(dir.path()).assert_files_known(&[]);
    }

    #[test]
    #[should_panic(expected = "/b/c")]
    fn a_json_value_nobody_read_fails() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let manifest = r#"{"format": 1, "files": [], "json_files": {"x.json": ""}}"#;
        std::fs::write(dir.path().join("manifest.json"), manifest).expect("written");
        std::fs::write(dir.path().join("x.json"), r#"{"a": 1, "b": {"c": 2}}"#).expect("written");
        let golden = Golden::open_dir(dir.path());
        let json = golden.json("x.json");
        assert_eq!(json.number("/a"), 1.0);
        json.finish();
    }
}
