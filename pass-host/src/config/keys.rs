//! The keys of the configuration, taken from the structs themselves: a key, its documentation and its section are
//! written once, in `config.rs`.

use super::{
    AugmentConfig, CheckpointConfig, DataConfig, GuardConfig, HeadConfig, ImageObjective, LogConfig,
    ModelConfig, OptimConfig, PatchObjective, ProbeConfig, TrainConfig,
};

/// One key of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    /// The documentation of the field, one line of text per line.
    pub(crate) doc: &'static str,
}

/// Declares a section: the struct as written, read strictly by serde, and `KEYS`, its fields with their documentation.
macro_rules! section {
    (
        $(#[doc = $section_doc:literal])*
        pub struct $name:ident {
            $( $(#[doc = $doc:literal])+ pub $field:ident: $kind:ty, )+
        }
    ) => {
        $(#[doc = $section_doc])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $kind, )+
        }

        impl $name {
            pub(crate) const KEYS: &'static [$crate::config::keys::Key] = &[
                $( $crate::config::keys::Key { name: stringify!($field), doc: concat!($($doc, "\n"),+) }, )+
            ];
        }
    };
}

/// The sections (TOML tables) and their keys, in the order of [`TrainConfig`].
pub(crate) const SECTIONS: [(&str, &[Key]); 11] = [
    ("data", DataConfig::KEYS),
    ("augment", AugmentConfig::KEYS),
    ("model", ModelConfig::KEYS),
    ("head", HeadConfig::KEYS),
    ("image", ImageObjective::KEYS),
    ("patch", PatchObjective::KEYS),
    ("optim", OptimConfig::KEYS),
    ("checkpoint", CheckpointConfig::KEYS),
    ("log", LogConfig::KEYS),
    ("probe", ProbeConfig::KEYS),
    ("guard", GuardConfig::KEYS),
];

/// The keys of `section`, or of the top level for `""`.
pub(crate) fn keys_of(section: &str) -> Option<&'static [Key]> {
    if section.is_empty() {
        return Some(TrainConfig::KEYS);
    }
    SECTIONS.iter().find(|(name, _)| *name == section).map(|(_, keys)| *keys)
}

/// The documentation of `key` of `section` (`""` = top level).
pub(crate) fn doc_of(section: &str, key: &str) -> Option<&'static str> {
    keys_of(section)?.iter().find(|k| k.name == key).map(|k| k.doc)
}

/// Every key that holds a value, dotted: `seed`, `ops`, `data.images`, …
pub(crate) fn all_keys() -> impl Iterator<Item = String> {
    let top = TrainConfig::KEYS.iter().filter(|k| keys_of(k.name).is_none()).map(|k| k.name.to_owned());
    let nested = SECTIONS.iter().flat_map(|(s, keys)| keys.iter().map(move |k| format!("{s}.{}", k.name)));
    top.chain(nested)
}

/// The key a person most likely meant by the dotted name `unknown`, if one is near.
pub(crate) fn suggest(unknown: &str) -> Option<String> {
    let last = unknown.rsplit('.').next().unwrap_or(unknown);
    // the right name in the wrong section comes before any likeness of spelling
    if let Some(moved) = all_keys().find(|k| k.rsplit('.').next() == Some(last)) {
        return Some(moved);
    }
    let nearness = |known: &str| {
        let known_last = known.rsplit('.').next().unwrap_or(known);
        let by_name = strsim::jaro_winkler(last, known_last) * if last.len() > 2 { 1.0 } else { 0.5 };
        strsim::jaro_winkler(unknown, known).max(by_name * 0.98)
    };
    let sections = SECTIONS.iter().map(|(s, _)| (*s).to_owned());
    let (score, best) = all_keys()
        .chain(sections)
        .map(|known| (nearness(&known), known))
        .max_by(|a, b| a.0.total_cmp(&b.0))?;
    (score > 0.85).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_match_the_struct() {
        let table = toml::Table::try_from(TrainConfig::default()).unwrap();
        let tables: Vec<&str> =
            TrainConfig::KEYS.iter().map(|k| k.name).filter(|k| table[*k].is_table()).collect();
        assert_eq!(tables, SECTIONS.map(|(name, _)| name));
        for (name, keys) in SECTIONS {
            let written = table[name].as_table().unwrap();
            assert_eq!(written.len(), keys.len(), "[{name}]");
            assert!(keys.iter().all(|k| written.contains_key(k.name) && !k.doc.trim().is_empty()));
        }
    }

    #[test]
    fn suggestions_find_typos_and_wrong_sections() {
        let cases = [
            ("optim.bach", Some("optim.batch")),
            ("batch", Some("optim.batch")),
            ("model.window", Some("patch.window")),
            ("optm.lr_per_265", Some("optim.lr_per_256")),
            ("zzzzzz", None),
        ];
        for (unknown, expected) in cases {
            assert_eq!(suggest(unknown).as_deref(), expected, "{unknown}");
        }
    }
}
