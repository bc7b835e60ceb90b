//! From the file of a sweep to runs and the command lines that make them. Nothing starts before all of it is checked.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::SweepError;
use crate::config::Layers;

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SweepFile {
    /// The folder of all runs, unless `--out` names one.
    out: Option<PathBuf>,
    /// What is trained on: folders, files, tars, shards, @lists.
    images: Vec<String>,
    /// Starting point of every row.
    preset: Option<String>,
    /// Configuration of every row; relative to this file.
    config: Option<PathBuf>,
    /// Settings of every row, as for `--set`.
    #[serde(default)]
    set: Vec<String>,
    /// Seeds of every row.
    #[serde(default = "first_seed")]
    seeds: Vec<u64>,
    evaluation: Vec<EvaluationEntry>,
    row: Vec<RowEntry>,
}

fn first_seed() -> Vec<u64> {
    vec![0]
}

/// `[[evaluation]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EvaluationEntry {
    /// Its name.
    name: String,
    /// The verb of `pass-host eval`.
    protocol: Protocol,
    /// Its `--data`.
    data: PathBuf,
    /// Further arguments.
    #[serde(default)]
    arguments: Vec<String>,
    /// Numbers shown, each a path in the JSON result (`knn.20.top1`) or a list of `{ heading, path }`.
    columns: Option<Vec<Column>>,
}

/// `[[row]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RowEntry {
    /// The name in the table.
    name: String,
    /// Another starting point.
    preset: Option<String>,
    /// Settings on top of those of all rows.
    #[serde(default)]
    set: Vec<String>,
    /// Other seeds.
    seeds: Option<Vec<u64>>,
    /// Not trained: fresh values in the network of the first trained row.
    #[serde(default)]
    untrained: bool,
}

/// A verb of `pass-host eval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Protocol {
    Vos,
    Segment,
    Retrieval,
    Knn,
    Linear,
}

impl Protocol {
    fn verb(self) -> &'static str {
        match self {
            Self::Vos => "vos",
            Self::Segment => "segment",
            Self::Retrieval => "retrieval",
            Self::Knn => "knn",
            Self::Linear => "linear",
        }
    }

    /// What the table shows unless `columns` says otherwise.
    fn columns(self, name: &str) -> Vec<Column> {
        let path = match self {
            Self::Vos => "J&F_mean",
            Self::Segment | Self::Retrieval => "mIoU",
            Self::Knn => "knn.20.top1",
            Self::Linear => "linear.top1",
        };
        vec![Column { heading: name.to_owned(), path: path.to_owned() }]
    }
}

/// A column of the table: a share, shown in percent.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    /// Its heading.
    pub heading: String,
    /// Where the number is in the JSON result: keys joined by dots.
    pub path: String,
}

/// An evaluation of every run.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Its name: the file `evaluation/NAME.json` of a run.
    pub name: String,
    /// What the table shows of it.
    pub columns: Vec<Column>,
}

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Trains the weights of a run.
    Training,
    /// Judges them.
    Evaluation,
}

/// One call of the program.
#[derive(Clone, Debug)]
pub struct Job {
    /// Training or evaluation.
    pub kind: Kind,
    /// Unique in the sweep: `ROW/seed-N/train` or `ROW/seed-N/NAME`.
    pub name: String,
    /// For people.
    pub title: String,
    /// Arguments of the program; it writes its result as one JSON object to standard output.
    pub arguments: Vec<String>,
    /// Where the result goes.
    pub result: PathBuf,
    /// A run folder that the job makes and can continue.
    pub continues: Option<PathBuf>,
}

/// One row with one seed.
#[derive(Clone, Debug)]
pub struct Run {
    /// The row, from 0.
    pub row: usize,
    /// The seed.
    pub seed: u64,
    /// The run folder.
    pub folder: PathBuf,
    /// Training, if it is trained, then the evaluations.
    pub jobs: Vec<Job>,
}

/// A checked sweep.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The file.
    pub file: PathBuf,
    /// The folder of all runs and of the tables.
    pub out: PathBuf,
    /// Names of the rows.
    pub rows: Vec<String>,
    /// Evaluations of every run.
    pub evaluations: Vec<Evaluation>,
    /// In the order in which they are done: those without training last.
    pub runs: Vec<Run>,
}

impl Plan {
    /// Reads and checks `file`; `out` wins over the file's, `only` names rows to be done.
    ///
    /// # Errors
    /// [`SweepError`], naming file, key or row, what was expected and what was found.
    pub fn read(file: &Path, out: Option<&Path>, only: &[String]) -> Result<Self, SweepError> {
        let text =
            fs::read_to_string(file).map_err(|source| SweepError::Read { path: file.to_owned(), source })?;
        let read: SweepFile = toml::from_str(&text).map_err(|error| SweepError::Syntax {
            path: file.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        Checked { file, read }.plan(out, only)
    }

    /// All columns with the evaluation they belong to.
    pub fn columns(&self) -> impl Iterator<Item = (&Evaluation, &Column)> {
        self.evaluations
            .iter()
            .flat_map(|evaluation| evaluation.columns.iter().map(move |column| (evaluation, column)))
    }
}

struct Checked<'a> {
    file: &'a Path,
    read: SweepFile,
}

impl Checked<'_> {
    fn bad(
        &self,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> SweepError {
        SweepError::Value {
            path: self.file.to_owned(),
            field: field.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    fn plan(self, out: Option<&Path>, only: &[String]) -> Result<Plan, SweepError> {
        let read = &self.read;
        let out = out
            .map(Path::to_owned)
            .or_else(|| read.out.clone())
            .ok_or_else(|| self.bad("out", "a folder, here or as --out", "none"))?;
        let rows: Vec<String> = read.row.iter().map(|row| row.name.clone()).collect();
        for name in only {
            if !rows.contains(name) {
                return Err(self.bad("row", format!("one of: {}", rows.join(", ")), format!("--row {name}")));
            }
        }
        self.check_images()?;
        let folders = self.folders("row", &rows)?;
        let evaluations = self.evaluations()?;
        let seeds = |row: &RowEntry| row.seeds.clone().unwrap_or_else(|| read.seeds.clone());
        for row in &read.row {
            self.check_row(row, &seeds(row))?;
        }
        let Some(first) = read.row.iter().position(|row| !row.untrained) else {
            return Err(self.bad("row", "one that is trained", "none"));
        };
        let folder = |row: usize, seed: u64| out.join(&folders[row]).join(format!("seed-{seed}"));
        let architecture = format!("random:{}", folder(first, seeds(&read.row[first])[0]).display());

        let mut runs = Vec::new();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| read.row[row].untrained);
        for row in order {
            let entry = &read.row[row];
            // an untrained row needs the network of the first trained one
            let wanted = only.is_empty() || only.contains(&entry.name);
            if !wanted {
                continue;
            }
            for seed in seeds(entry) {
                let folder = folder(row, seed);
                let name = |job: &str| format!("{}/seed-{seed}/{job}", folders[row]);
                let title = |job: &str| format!("{}, seed {seed}: {job}", entry.name);
                let mut jobs = Vec::new();
                if !entry.untrained {
                    jobs.push(Job {
                        kind: Kind::Training,
                        name: name("train"),
                        title: title("training"),
                        arguments: self.training(entry, seed, &folder),
                        result: folder.join("outcome.json"),
                        continues: None,
                    });
                }
                let weights =
                    if entry.untrained { architecture.clone() } else { folder.display().to_string() };
                for evaluation in &read.evaluation {
                    jobs.push(evaluation.job(&name, &title, &weights, &folder));
                }
                runs.push(Run { row, seed, folder, jobs });
            }
        }
        Ok(Plan { file: self.file.to_owned(), out, rows, evaluations, runs })
    }

    fn check_images(&self) -> Result<(), SweepError> {
        if self.read.images.is_empty() {
            return Err(self.bad("images", "at least one folder, file, tar, shard or @list", "none"));
        }
        for image in &self.read.images {
            if !Path::new(image.strip_prefix('@').unwrap_or(image)).exists() {
                return Err(self.bad(
                    "images",
                    "what exists, seen from the current folder",
                    format!("`{image}`"),
                ));
            }
        }
        Ok(())
    }

    /// Folder names of `names`; no two may be the same.
    fn folders(&self, what: &str, names: &[String]) -> Result<Vec<String>, SweepError> {
        if names.is_empty() {
            return Err(self.bad(what, "at least one", "none"));
        }
        let mut seen: HashMap<String, &String> = HashMap::new();
        let mut folders = Vec::with_capacity(names.len());
        for name in names {
            let folder = folder_name(name);
            if folder.is_empty() {
                return Err(self.bad(format!("{what}.name"), "letters or digits", format!("`{name}`")));
            }
            if let Some(other) = seen.insert(folder.clone(), name) {
                let found = format!("`{other}` and `{name}`, both of folder `{folder}`");
                return Err(self.bad(
                    format!("{what}.name"),
                    "names that differ in letters or digits",
                    found,
                ));
            }
            folders.push(folder);
        }
        Ok(folders)
    }

    fn evaluations(&self) -> Result<Vec<Evaluation>, SweepError> {
        let names: Vec<String> = self.read.evaluation.iter().map(|entry| entry.name.clone()).collect();
        let folders = self.folders("evaluation", &names)?;
        let mut evaluations = Vec::with_capacity(names.len());
        for (entry, folder) in self.read.evaluation.iter().zip(folders) {
            let field = |key: &str| format!("evaluation `{}`, {key}", entry.name);
            if !entry.data.is_dir() {
                let found = format!("`{}`", entry.data.display());
                return Err(self.bad(field("data"), "a folder, seen from the current one", found));
            }
            let own = ["--weights", "--data", "--json", "--out", "--resume"];
            if let Some(argument) =
                entry.arguments.iter().find(|given| own.iter().any(|flag| is_flag(given, flag)))
            {
                return Err(self.bad(
                    field("arguments"),
                    format!("none of {}, which the sweep sets itself", own.join(", ")),
                    format!("`{argument}`"),
                ));
            }
            let columns = entry.columns.clone().unwrap_or_else(|| entry.protocol.columns(&entry.name));
            evaluations.push(Evaluation { name: folder, columns });
        }
        Ok(evaluations)
    }

    fn check_row(&self, row: &RowEntry, seeds: &[u64]) -> Result<(), SweepError> {
        let field = |key: &str| format!("row `{}`, {key}", row.name);
        let mut sorted = seeds.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != seeds.len() || seeds.is_empty() {
            return Err(self.bad(field("seeds"), "one or more different numbers", format!("{seeds:?}")));
        }
        if row.untrained {
            if !row.set.is_empty() || row.preset.is_some() || seeds.len() > 1 {
                let expected =
                    "no settings, preset or further seeds: it has the network of the first trained row";
                return Err(self.bad(field("untrained"), expected, "some"));
            }
            return Ok(());
        }
        let layers = Layers {
            preset: row.preset.clone().or_else(|| self.read.preset.clone()),
            file: self.config(),
            sets: self.read.set.iter().chain(&row.set).cloned().collect(),
            ..Layers::default()
        };
        layers.resolve().map(drop).map_err(|source| SweepError::Row {
            path: self.file.to_owned(),
            row: row.name.clone(),
            source,
        })
    }

    /// The configuration of all rows, seen from the current folder.
    fn config(&self) -> Option<PathBuf> {
        let config = self.read.config.as_ref()?;
        Some(self.file.parent().unwrap_or(Path::new("")).join(config))
    }

    fn training(&self, row: &RowEntry, seed: u64, folder: &Path) -> Vec<String> {
        let mut words: Vec<String> = vec!["train".into()];
        words.extend(self.read.images.iter().cloned());
        if let Some(preset) = row.preset.as_ref().or(self.read.preset.as_ref()) {
            words.extend(["--preset".into(), preset.clone()]);
        }
        if let Some(config) = self.config() {
            words.extend(["--config".into(), config.display().to_string()]);
        }
        for set in self.read.set.iter().chain(&row.set) {
            words.extend(["--set".into(), set.clone()]);
        }
        words.extend(["--seed".into(), seed.to_string()]);
        words.extend(["--out".into(), folder.display().to_string()]);
        words.extend(["--resume".into(), "auto".into(), "--json".into()]);
        words
    }
}

impl EvaluationEntry {
    fn job(
        &self,
        name: &dyn Fn(&str) -> String,
        title: &dyn Fn(&str) -> String,
        weights: &str,
        folder: &Path,
    ) -> Job {
        let file = folder_name(&self.name);
        let result = folder.join(crate::report::EVALUATION).join(format!("{file}.json"));
        let mut words: Vec<String> = vec!["eval".into(), self.protocol.verb().into()];
        words.extend(["--weights".into(), weights.to_owned()]);
        words.extend(["--data".into(), self.data.display().to_string()]);
        words.extend(self.arguments.iter().cloned());
        let continues = (self.protocol == Protocol::Segment).then(|| result.with_extension(""));
        if let Some(run) = &continues {
            words.extend(["--out".into(), run.display().to_string()]);
        }
        words.push("--json".into());
        Job {
            kind: Kind::Evaluation,
            name: name(&file),
            title: title(&self.name),
            arguments: words,
            result,
            continues,
        }
    }
}

/// Whether an argument is `flag` or `flag=value`.
fn is_flag(argument: &str, flag: &str) -> bool {
    argument.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

/// A name as a folder: lower case, every run of other characters than letters and digits a dash.
fn folder_name(name: &str) -> String {
    let mut folder = String::with_capacity(name.len());
    for character in name.chars() {
        match character.is_alphanumeric() {
            true => folder.extend(character.to_lowercase()),
            false if folder.ends_with('-') => {}
            false => folder.push('-'),
        }
    }
    folder.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a sweep file of this text, and photos and data to name in it.
    fn sweep(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("photos")).unwrap();
        fs::create_dir(dir.path().join("labelled")).unwrap();
        let file = dir.path().join("sweep.toml");
        let text = text.replace("PHOTOS", &dir.path().join("photos").display().to_string());
        fs::write(&file, text.replace("DATA", &dir.path().join("labelled").display().to_string())).unwrap();
        (dir, file)
    }

    const GOOD: &str = r#"
        out = "runs"
        images = ["PHOTOS"]
        preset = "demo"
        set = ["optim.steps=4"]
        [[evaluation]]
        name = "flowers"
        protocol = "knn"
        data = "DATA"
        arguments = ["--images", "8"]
        [[evaluation]]
        name = "CamVid, FPN"
        protocol = "segment"
        data = "DATA"
        columns = [{ heading = "mIoU", path = "mIoU" }, { heading = "pixels", path = "aAcc" }]
        [[row]]
        name = "random"
        untrained = true
        [[row]]
        name = "DINO + PASS"
        seeds = [0, 3]
        [[row]]
        name = "k = 8"
        set = ["patch.k=8"]
    "#;

    fn error(text: &str) -> String {
        let (_dir, file) = sweep(text);
        let error = Plan::read(&file, None, &[]).expect_err(text);
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source}")
    }

    #[test]
    fn rows_seeds_and_evaluations_become_commands() {
        let (dir, file) = sweep(GOOD);
        let plan = Plan::read(&file, None, &[]).unwrap();
        assert_eq!(plan.rows, ["random", "DINO + PASS", "k = 8"]);
        let runs: Vec<_> = plan.runs.iter().map(|run| (run.row, run.seed, run.jobs.len())).collect();
        assert_eq!(runs, [(1, 0, 3), (1, 3, 3), (2, 0, 3), (0, 0, 2)], "untrained last");
        let photos = dir.path().join("photos").display().to_string();
        let train = ["train", &photos, "--preset", "demo", "--set", "optim.steps=4", "--set", "patch.k=8"];
        let folder = "runs/k-8/seed-0";
        let rest = ["--seed", "0", "--out", folder, "--resume", "auto", "--json"];
        assert_eq!(plan.runs[2].jobs[0].arguments, [&train[..], &rest].concat());
        let data = dir.path().join("labelled").display().to_string();
        let fpn = &plan.runs[3].jobs[1];
        let weights = "random:runs/dino-pass/seed-0";
        let out = "runs/random/seed-0/evaluation/camvid-fpn";
        let expected = ["eval", "segment", "--weights", weights, "--data", &data, "--out", out, "--json"];
        assert_eq!(fpn.arguments, expected);
        assert_eq!(fpn.result, Path::new("runs/random/seed-0/evaluation/camvid-fpn.json"));
        let headings: Vec<_> = plan.columns().map(|(_, column)| column.heading.as_str()).collect();
        assert_eq!(headings, ["flowers", "mIoU", "pixels"]);
    }

    #[test]
    fn some_rows_can_be_chosen_and_the_folder_too() {
        let (dir, file) = sweep(GOOD);
        let plan = Plan::read(&file, Some(dir.path()), &["k = 8".to_owned()]).unwrap();
        assert_eq!(plan.runs.len(), 1);
        assert_eq!(plan.runs[0].folder, dir.path().join("k-8/seed-0"));
        let error = Plan::read(&file, None, &["k = 9".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("DINO + PASS") && error.contains("k = 9"), "{error}");
    }

    #[test]
    fn everything_is_checked_before_the_first_step() {
        for (from, to, parts) in [
            ("out = \"runs\"", "", &["`out`", "--out"][..]),
            ("images = [\"PHOTOS\"]", "images = []", &["`images`", "none"]),
            ("images = [\"PHOTOS\"]", "images = [\"nowhere\"]", &["`images`", "`nowhere`"]),
            ("seeds = [0, 3]", "seeds = [3, 3]", &["row `DINO + PASS`, seeds", "[3, 3]"]),
            ("patch.k=8", "patch.k=9", &["row `k = 8`", "patch.k", "1 to 8"]),
            ("patch.k=8", "patch.kk=8", &["row `k = 8`", "did you mean `patch.k`"]),
            ("preset = \"demo\"", "preset = \"demmo\"", &["unknown preset", "demo"]),
            ("name = \"k = 8\"", "name = \"DINO: PASS\"", &["`row.name`", "dino-pass"]),
            ("name = \"k = 8\"", "name = \"+\"", &["`row.name`", "`+`"]),
            ("protocol = \"knn\"", "protocol = \"k-nn\"", &["k-nn", "knn"]),
            ("\"--images\", \"8\"", "\"--json=x\"", &["evaluation `flowers`, arguments", "--json=x"]),
            ("data = \"DATA\"", "data = \"nowhere\"", &["evaluation `flowers`, data", "nowhere"]),
            ("untrained = true", "untrained = true\nset = [\"seed=1\"]", &["row `random`, untrained"]),
            ("seeds = [0, 3]", "seed = [0, 3]", &["seed", "seeds"]),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let message = error(&GOOD.replacen(from, to, 1));
            for part in parts {
                assert!(message.contains(part), "{from} -> {to}: {part} in {message}");
            }
        }
        let untrained = &GOOD[..GOOD.find("        [[row]]\n        name = \"DINO").unwrap()];
        assert!(error(untrained).contains("one that is trained"));
    }

    #[test]
    fn folder_names_are_plain() {
        for (name, folder) in
            [("DINO + PASS", "dino-pass"), ("k = 4", "k-4"), ("w/o Matching", "w-o-matching"), ("..", "")]
        {
            assert_eq!(folder_name(name), folder);
        }
    }
}
