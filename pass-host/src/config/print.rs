//! The configuration as TOML, each key under its documentation; reading it back gives the same configuration.

use serde::Deserialize;
use toml::Table;

use super::keys::doc_of;
use super::{TrainConfig, presets};

impl TrainConfig {
    /// Every key, without comments, in a fixed order: the form that is hashed.
    pub(crate) fn canonical(&self) -> String {
        toml::to_string(self).expect("a validated configuration has only values TOML can hold")
    }

    /// The configuration as a TOML table.
    pub(crate) fn to_table(&self) -> Table {
        Table::try_from(self).expect("a configuration has only values TOML can hold")
    }

    pub(crate) fn deserialize_table(table: Table) -> Result<Self, toml::de::Error> {
        Self::deserialize(table)
    }

    /// The configuration as TOML with its documentation as comments, under the name of the preset it started from: the
    /// form of `config show` and of `config.toml` in a run folder.
    pub fn to_toml(&self, preset: &str) -> String {
        let mut out = String::new();
        comment(&mut out, presets::find(preset).map_or("", |p| p.about));
        out += &format!("preset = {}\n", toml::Value::String(preset.to_owned()));
        let mut section = String::new();
        for line in self.canonical().lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                section = name.to_owned();
                comment(&mut out, doc_of("", name).unwrap_or_default());
            } else if let Some((key, _)) = line.split_once(" = ") {
                comment(&mut out, doc_of(&section, key).unwrap_or_default());
            }
            out.push_str(line);
            out.push('\n');
        }
        out
    }

    /// Reads a whole configuration written by [`Self::to_toml`], as a checkpoint or a run folder holds it.
    ///
    /// # Errors
    /// The parser's, on unknown keys or wrong types.
    pub fn from_toml(text: &str) -> Result<Self, toml::de::Error> {
        let mut table: Table = toml::from_str(text)?;
        table.remove("preset");
        Self::deserialize_table(table)
    }
}

fn comment(out: &mut String, text: &str) {
    for line in text.lines() {
        out.push_str("# ");
        out.push_str(line.trim());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Layers, presets};

    #[test]
    fn every_preset_survives_printing_and_reading() {
        for preset in presets::PRESETS {
            let config = preset.config();
            let text = config.to_toml(preset.name);
            assert_eq!(TrainConfig::from_toml(&text).unwrap(), config, "{}", preset.name);
            let path = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(path.path(), &text).unwrap();
            let layers = Layers { file: Some(path.path().to_owned()), ..Layers::default() };
            assert_eq!(layers.resolve().unwrap().config, config, "{}", preset.name);
            let undocumented: Vec<&str> = text
                .lines()
                .zip(text.lines().skip(1))
                .filter(|(above, line)| {
                    line.contains(" = ")
                        && !line.starts_with("preset")
                        && !line.starts_with('#')
                        && !above.starts_with('#')
                })
                .map(|(_, line)| line)
                .collect();
            assert!(undocumented.is_empty(), "{undocumented:?}");
        }
    }
}
