//! From preset, file, `--set` and flags to one configuration; every complaint names where the value came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::error::{ConfigError, Fault, Origin, Problem};
use super::keys::{keys_of, suggest};
use super::{TrainConfig, presets};

/// What a configuration is made of; later fields win over earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// The starting point; `None` = the `preset` named in the file, else `default_preset`.
    pub preset: Option<String>,
    /// Used if neither `preset` nor the file names one; empty = [`presets::DEFAULT`].
    pub default_preset: String,
    /// A TOML file with any of the keys.
    pub file: Option<PathBuf>,
    /// `key=value` texts.
    pub sets: Vec<String>,
    /// Dedicated flags: `(flag, key, value)`.
    pub flags: Vec<(&'static str, &'static str, Value)>,
}

/// A valid configuration and how it came about.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The configuration; it obeys every rule of [`super::validate`].
    pub config: TrainConfig,
    /// The preset it started from.
    pub preset: String,
    /// Where each overridden key was last given.
    pub origins: BTreeMap<String, Origin>,
}

/// A value with its origin, before it is checked.
struct Assignment {
    key: String,
    value: Value,
    origin: Origin,
}

impl Layers {
    /// Puts the layers together.
    ///
    /// # Errors
    /// [`ConfigError`]; unknown keys, wrong types and broken rules are all collected before it is returned.
    pub fn resolve(&self) -> Result<Resolved, ConfigError> {
        let mut assignments = Vec::new();
        let mut problems = Vec::new();
        let mut named = None;
        if let Some(path) = &self.file {
            named = read_file(path, &mut assignments, &mut problems)?;
        }
        for text in &self.sets {
            assignments.push(parse_set(text)?);
        }
        for (flag, key, value) in &self.flags {
            assignments.push(Assignment {
                key: (*key).to_owned(),
                value: value.clone(),
                origin: Origin::Flag(flag),
            });
        }

        let default = if self.default_preset.is_empty() { presets::DEFAULT } else { &self.default_preset };
        let name = self.preset.clone().or(named).unwrap_or_else(|| default.to_owned());
        let mut config = preset(&name)?;
        let mut origins = BTreeMap::new();
        for Assignment { key, value, origin } in assignments {
            match assign(&config, &key, value) {
                Ok(changed) => {
                    config = changed;
                    origins.insert(key, origin);
                }
                Err(fault) => problems.push(Problem { origin, key, fault }),
            }
        }
        if problems.is_empty() {
            let origin_of = |key: &str| origins.get(key).cloned().unwrap_or(Origin::Preset(name.clone()));
            problems.extend(config.violations().into_iter().map(|v| {
                Problem {
                    // a broken rule between two keys is the fault of the one that was overridden
                    origin: v
                        .keys()
                        .map(origin_of)
                        .find(|o| !matches!(o, Origin::Preset(_)))
                        .unwrap_or(origin_of(v.key)),
                    key: v.key.to_owned(),
                    fault: Fault::BadValue { expected: v.expected, found: v.found },
                }
            }));
        }
        if problems.is_empty() {
            Ok(Resolved { config, preset: name, origins })
        } else {
            Err(ConfigError::Invalid { problems })
        }
    }
}

fn preset(name: &str) -> Result<TrainConfig, ConfigError> {
    presets::find(name).map(presets::Preset::config).ok_or_else(|| {
        let nearest = presets::PRESETS
            .iter()
            .map(|p| (strsim::jaro_winkler(name, p.name), p.name))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(score, _)| *score > 0.7);
        ConfigError::UnknownPreset { name: name.to_owned(), suggestion: nearest.map(|(_, n)| n.to_owned()) }
    })
}

/// `key=value`; the value is TOML, or plain text where that is no TOML (`patch.window=all`).
fn parse_set(text: &str) -> Result<Assignment, ConfigError> {
    let (key, value) =
        text.split_once('=').ok_or_else(|| ConfigError::Assignment { text: text.to_owned() })?;
    let (key, value) = (key.trim(), value.trim());
    let parsed = toml::from_str::<Table>(&format!("value = {value}")).ok().and_then(|mut t| {
        // a value with a line break could smuggle in further keys
        if t.len() == 1 { t.remove("value") } else { None }
    });
    Ok(Assignment {
        key: key.to_owned(),
        value: parsed.unwrap_or_else(|| Value::String(value.to_owned())),
        origin: Origin::Set(text.to_owned()),
    })
}

/// Reads a file into `assignments`; returns the preset it names. Unknown keys become `problems`.
fn read_file(
    path: &Path,
    assignments: &mut Vec<Assignment>,
    problems: &mut Vec<Problem>,
) -> Result<Option<String>, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let line_of =
        |offset: usize| 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count();
    let table = DeTable::parse(&text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start).min(text.len());
        let line_start = text.as_bytes()[..at].iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
        let message = error.message().lines().next().unwrap_or_default().to_owned();
        let column = String::from_utf8_lossy(&text.as_bytes()[line_start..at]).chars().count() + 1;
        ConfigError::Syntax { path: path.to_owned(), line: line_of(at), column, message }
    })?;

    let mut entries: Vec<(String, usize, Value)> = Vec::new();
    flatten("", table.get_ref(), &mut entries);
    entries.sort_by_key(|(_, offset, _)| *offset);
    let mut named = None;
    for (key, offset, value) in entries {
        let origin = Origin::File(path.to_owned(), line_of(offset));
        match (key.as_str(), value) {
            ("preset", Value::String(name)) => named = Some(name),
            ("preset", other) => problems.push(Problem {
                origin,
                key,
                fault: Fault::BadValue { expected: "the name of a preset".into(), found: describe(&other) },
            }),
            (_, value) => assignments.push(Assignment { key, value, origin }),
        }
    }
    Ok(named)
}

/// Lists the values of `table` with dotted keys and the offset of each key; a table that is no section is a value.
fn flatten(prefix: &str, table: &DeTable<'_>, out: &mut Vec<(String, usize, Value)>) {
    for (key, value) in table {
        let name = key.get_ref();
        match value.get_ref() {
            DeValue::Table(inner) if prefix.is_empty() && keys_of(name).is_some() => {
                flatten(name, inner, out);
            }
            _ => {
                let dotted = if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") };
                out.push((dotted, key.span().start, owned(value)));
            }
        }
    }
}

/// The plain value behind a parsed one; numbers out of range stay as their text and fail the type check.
fn owned(value: &Spanned<DeValue<'_>>) -> Value {
    match value.get_ref() {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::String(number.as_str().to_owned()), Value::Integer),
        DeValue::Float(number) => {
            number.as_str().parse().map_or_else(|_| Value::String(number.as_str().to_owned()), Value::Float)
        }
        DeValue::Boolean(truth) => Value::Boolean(*truth),
        DeValue::Datetime(when) => Value::Datetime(*when),
        DeValue::Array(items) => Value::Array(items.iter().map(owned).collect()),
        DeValue::Table(table) => {
            Value::Table(table.iter().map(|(k, v)| (k.get_ref().to_string(), owned(v))).collect())
        }
    }
}

/// `config` with `key` set to `value`.
fn assign(config: &TrainConfig, key: &str, value: Value) -> Result<TrainConfig, Fault> {
    let (section, name) = key.split_once('.').unwrap_or(("", key));
    let Some(keys) = keys_of(section) else {
        let known = TrainConfig::KEYS.iter().map(|k| k.name).collect();
        return Err(Fault::UnknownKey { suggestion: suggest(key), section: String::new(), known });
    };
    if !keys.iter().any(|k| k.name == name) {
        let known = keys.iter().map(|k| k.name).collect();
        return Err(Fault::UnknownKey { suggestion: suggest(key), section: section.to_owned(), known });
    }
    if section.is_empty()
        && let Some(inner) = keys_of(name)
    {
        let keys: Vec<_> = inner.iter().map(|k| k.name).collect();
        return Err(Fault::BadValue {
            expected: format!(
                "a key of that section, such as `{name}.{}` (it holds: {})",
                keys[0],
                keys.join(", ")
            ),
            found: describe(&value),
        });
    }

    let mut table = config.to_table();
    let target = if section.is_empty() { Some(&mut table) } else { table[section].as_table_mut() };
    let target = target.expect("every section is written as a table");
    let before = target.insert(name.to_owned(), value.clone());
    TrainConfig::deserialize_table(table).map_err(|error| {
        let expected = expected(key, before.as_ref(), error.message());
        let found = match nearest_choice(&expected, &value) {
            Some(choice) => format!("{}, did you mean `{choice}`?", describe(&value)),
            None => describe(&value),
        };
        Fault::BadValue { expected, found }
    })
}

/// The one of `choices` (`a | b | c`) that a person most likely meant by a text, if one is near.
fn nearest_choice<'a>(choices: &'a str, found: &Value) -> Option<&'a str> {
    let text = found.as_str()?;
    let choices = choices.split(" | ").filter(|choice| !choice.contains(' '));
    let scored = choices.map(|choice| (strsim::jaro_winkler(&text.to_lowercase(), choice), choice));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.8).map(|(_, choice)| choice)
}

/// What a key takes, in words: from the type of its present value, for a choice from serde's own list.
fn expected(key: &str, present: Option<&Value>, message: &str) -> String {
    if key == "patch.window" {
        return "an odd number of patches, or \"all\"".into();
    }
    if key == "probe.data" {
        return "the path of a folder, as text".into();
    }
    match present {
        Some(Value::Integer(_)) => "a whole number, 0 or more".into(),
        Some(Value::Float(_)) => "a number".into(),
        Some(Value::Boolean(_)) => "true or false".into(),
        Some(Value::Array(_)) if key == "data.images" => "a list of texts, such as [\"photos\"]".into(),
        Some(Value::Array(items)) => format!("a list of {} numbers", items.len()),
        _ => {
            // "unknown variant `x`, expected one of `a`, `b`" or "…, expected `a`"
            let choices: Vec<&str> = message
                .lines()
                .next()
                .and_then(|line| line.split_once("expected "))
                .map(|(_, rest)| rest.split('`').skip(1).step_by(2).collect())
                .unwrap_or_default();
            if choices.is_empty() { "one of its choices, as text".into() } else { choices.join(" | ") }
        }
    }
}

/// A value with its type, for "found …".
fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the text {text:?}"),
        Value::Integer(number) => number.to_string(),
        Value::Float(_) | Value::Boolean(_) => value.to_string(),
        Value::Array(items) => format!("the list {} of length {}", value, items.len()),
        Value::Datetime(_) => format!("the date {value}"),
        Value::Table(_) => "a table".into(),
    }
}

/// The value of a dotted `key` as TOML; empty if there is none.
pub(crate) fn display_value(table: &Table, key: &str) -> String {
    let value = match key.split_once('.') {
        Some((section, name)) => table.get(section).and_then(|s| s.get(name)),
        None => table.get(key),
    };
    value.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn resolve(text: &str, sets: &[&str]) -> Result<Resolved, String> {
        let file = file(text);
        let layers = Layers {
            file: Some(file.path().to_owned()),
            sets: sets.iter().map(|s| (*s).to_owned()).collect(),
            ..Layers::default()
        };
        layers.resolve().map_err(|e| e.to_string().replace(&file.path().display().to_string(), "my.toml"))
    }

    #[test]
    fn later_layers_win() {
        let file = file("preset = \"demo\"\nseed = 3\n[optim]\nbatch = 32\nclip = 2\n");
        let mut layers = Layers { file: Some(file.path().to_owned()), ..Layers::default() };
        let from_file = layers.resolve().unwrap();
        assert_eq!((from_file.preset.as_str(), from_file.config.optim.batch), ("demo", 32));
        assert_eq!(from_file.config.optim.clip, 2.0, "a whole number is a number");

        layers.sets = vec!["optim.batch=64".into(), "patch.window=all".into(), "patch.border = clip".into()];
        let set = layers.resolve().unwrap().config;
        assert_eq!((set.optim.batch, set.seed), (64, 3));
        assert_eq!(set.patch.window, crate::config::Window::All(crate::config::AllPatches::All));

        layers.flags = vec![("--batch", "optim.batch", Value::Integer(128))];
        layers.preset = Some("paper-vit-s16".into());
        let all = layers.resolve().unwrap();
        assert_eq!((all.preset.as_str(), all.config.optim.batch), ("paper-vit-s16", 128));
        assert_eq!(all.origins["optim.batch"], Origin::Flag("--batch"));
    }

    #[test]
    fn every_problem_is_named_with_its_line() {
        let error = resolve(
            "seed = 1\nbatch = 3\n[optim]\nbach = 8\nepochs = \"many\"\n[patch]\nborder = \"torus\"\nk = -1\n[zoo]\na = 1\n",
            &["augment.flip=yes", "augment.ratio=[1, 2, 3]", "patch.window=-3", "image.method=moco-v3"],
        )
        .unwrap_err();
        for expected in [
            "my.toml line 2: unknown key `batch`, did you mean `optim.batch`?",
            "my.toml line 4: unknown key `optim.bach`, did you mean `optim.batch`? ([optim] holds: batch, accumulate,",
            "my.toml line 5: `optim.epochs`: expected a whole number, 0 or more, found the text \"many\"",
            "my.toml line 7: `patch.border`: expected wrap | clip, found the text \"torus\"",
            "my.toml line 8: `patch.k`: expected a whole number, 0 or more, found -1",
            "my.toml line 9: unknown key `zoo`",
            "--set augment.flip=yes: `augment.flip`: expected a number, found the text \"yes\"",
            "`augment.ratio`: expected a list of 2 numbers, found the list [1, 2, 3] of length 3",
            "`image.method`: expected dino | moco_v3 | moby, found the text \"moco-v3\", did you mean `moco_v3`?",
            "`patch.window`: expected an odd number of patches, or \"all\", found -3",
        ] {
            assert!(error.contains(expected), "{expected:?} not in\n{error}");
        }
    }

    #[test]
    fn broken_rules_point_at_the_overridden_key() {
        let error = resolve("[augment]\nlocal_size = 100\n", &[]).unwrap_err();
        assert_eq!(
            error,
            "invalid configuration: my.toml line 2: `augment.local_size`: expected a multiple of model.patch_size (16), found 100"
        );
        let error = resolve("", &["optim.accumulate=3"]).unwrap_err();
        assert!(error.contains("--set optim.accumulate=3: `optim.accumulate`"), "{error}");
    }

    #[test]
    fn syntax_errors_name_line_and_column() {
        let error = resolve("seed = 1\n[optim\n", &[]).unwrap_err();
        assert!(error.starts_with("my.toml line 2, column "), "{error}");
        for text in [
            "preset = 3",
            "preset = \"demoo\"",
            "optim = 3",
            "[[optim]]\nbatch = 1",
            "seed = 99999999999999999999",
            "\u{feff}seed = 0x10",
        ] {
            let result = resolve(text, &[]);
            assert!(result.is_err() || text.starts_with('\u{feff}'), "{text}");
        }
        for set in ["seed", "=1", "seed=1\nops=\"fused\"", ".=1", "optim.=1", "optim.batch.x=1", "optim=1"] {
            assert!(resolve("", &[set]).is_err(), "{set:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(\\PC|\n|[a-z]{1,3}|optim|patch|k|[\\[\\]=\".0-9]){0,40}", set in "\\PC{0,20}=\\PC{0,20}") {
            drop(resolve(&text, &[&set, &text]));
        }
    }
}
