//! JSON files of the golden set. Reading a value covers it and everything below it.

use serde_json::Value;

use crate::golden::Golden;

/// One JSON file of the set; values are addressed by JSON pointer (`/paper/lr/first`).
#[derive(Debug)]
pub struct GoldenJson<'a> {
    golden: &'a Golden,
    name: String,
    root: Value,
}

impl<'a> GoldenJson<'a> {
    pub(crate) fn new(golden: &'a Golden, name: &str, root: Value) -> Self {
        Self { golden, name: name.to_owned(), root }
    }

    /// The keys of the object at `pointer` (`""` is the root), sorted. Listing covers nothing.
    ///
    /// # Panics
    /// When there is no object at `pointer`.
    pub fn keys(&self, pointer: &str) -> Vec<String> {
        let value = self.lookup(pointer);
        let object = value.as_object().unwrap_or_else(|| panic!("{}: no object at `{pointer}`", self.name));
        let mut keys: Vec<_> = object.keys().cloned().collect();
        keys.sort();
        keys
    }

    /// The value at `pointer`; it and everything below it count as covered, so the caller must check all of it.
    ///
    /// # Panics
    /// When there is nothing at `pointer`.
    pub fn read(&self, pointer: &str) -> &Value {
        let value = self.lookup(pointer);
        self.golden.touch(&self.name, pointer);
        value
    }

    /// The number at `pointer`.
    ///
    /// # Panics
    /// When there is no number.
    pub fn number(&self, pointer: &str) -> f64 {
        self.read(pointer).as_f64().unwrap_or_else(|| panic!("{}: no number at `{pointer}`", self.name))
    }

    /// The whole number at `pointer`.
    ///
    /// # Panics
    /// When there is no whole number.
    pub fn whole(&self, pointer: &str) -> usize {
        self.read(pointer).as_u64().unwrap_or_else(|| panic!("{}: no whole number at `{pointer}`", self.name))
            as usize
    }

    /// The list of numbers at `pointer`.
    ///
    /// # Panics
    /// When there is no list of numbers.
    pub fn numbers(&self, pointer: &str) -> Vec<f64> {
        let list =
            self.read(pointer).as_array().unwrap_or_else(|| panic!("{}: no list at `{pointer}`", self.name));
        list.iter()
            .map(|item| {
                item.as_f64().unwrap_or_else(|| panic!("{}: `{pointer}`: {item} is no number", self.name))
            })
            .collect()
    }

    /// Fails when any value was never read (see [`Golden::assert_covered`]).
    ///
    /// # Panics
    /// Naming everything that is left.
    pub fn finish(self) {
        self.golden.assert_covered(&self.name);
    }

    /// Pointers of the leaves never read; prose (strings at the root) needs no check.
    pub(crate) fn unread(&self) -> Vec<String> {
        let touched = self.golden.touched(&self.name);
        let covered = |pointer: &str| {
            touched.iter().any(|read| {
                pointer
                    .strip_prefix(read.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
        };
        let mut left = Vec::new();
        let mut open = vec![(String::new(), &self.root)];
        while let Some((pointer, value)) = open.pop() {
            if covered(&pointer) {
                continue;
            }
            match value {
                Value::Object(map) => {
                    open.extend(map.iter().map(|(key, value)| (format!("{pointer}/{}", escape(key)), value)));
                }
                Value::String(_) if pointer.matches('/').count() == 1 => {}
                _ => left.push(pointer),
            }
        }
        left.sort();
        left
    }

    fn lookup(&self, pointer: &str) -> &Value {
        self.root.pointer(pointer).unwrap_or_else(|| panic!("{}: nothing at `{pointer}`", self.name))
    }
}

/// A key as one step of a JSON pointer (RFC 6901).
pub fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
