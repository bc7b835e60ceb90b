//! `metrics.jsonl` as columns: any numeric keys; lines that are none are counted and told.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Faults that are told in full.
const TOLD: usize = 5;
/// More points than this are thinned.
const MOST_POINTS: usize = 3000;

/// The log of a run. Of several lines with the same step the last counts.
#[derive(Clone, Debug, Default)]
pub struct Log {
    steps: Vec<u64>,
    /// In order of appearance.
    columns: Vec<Column>,
    faults: usize,
    first_faults: Vec<String>,
}

/// One key.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    /// The key.
    pub key: String,
    /// One value a step; `None` where there is none or it was not finite.
    pub values: Vec<Option<f64>>,
}

impl Log {
    /// Reads every line. A last line without its end is a write in progress and no fault.
    pub fn read(bytes: &[u8]) -> Self {
        let mut log = Self::default();
        let mut lines: BTreeMap<u64, Map<String, Value>> = BTreeMap::new();
        let mut keys: Vec<String> = Vec::new();
        for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            match parsed(line) {
                Ok((step, object)) => {
                    for (key, value) in &object {
                        if key != "step" && (value.is_number() || value.is_null()) && !keys.contains(key) {
                            keys.push(key.clone());
                        }
                    }
                    lines.insert(step, object);
                }
                Err(_) if !line.ends_with(b"\n") => {}
                Err(reason) => {
                    log.faults += 1;
                    if log.first_faults.len() < TOLD {
                        log.first_faults.push(format!("line {}: {reason}", index + 1));
                    }
                }
            }
        }
        log.steps = lines.keys().copied().collect();
        let value = |line: &Map<String, Value>, key: &str| line.get(key)?.as_f64().filter(|v| v.is_finite());
        let column = |key: String| {
            let values = lines.values().map(|line| value(line, &key)).collect();
            Column { key, values }
        };
        log.columns = keys.into_iter().map(column).collect();
        log
    }

    /// Log steps.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether nothing was logged.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The steps, ascending.
    pub fn steps(&self) -> &[u64] {
        &self.steps
    }

    /// All columns in order of appearance.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The values of a key.
    pub fn values(&self, key: &str) -> Option<&[Option<f64>]> {
        self.columns.iter().find(|column| column.key == key).map(|column| column.values.as_slice())
    }

    /// The value of a key at log step `index`.
    pub fn at(&self, key: &str, index: usize) -> Option<f64> {
        self.values(key)?.get(index).copied().flatten()
    }

    /// The last finite value of a key.
    pub fn last(&self, key: &str) -> Option<f64> {
        self.values(key)?.iter().rev().copied().flatten().next()
    }

    /// The first finite value of a key.
    pub fn first(&self, key: &str) -> Option<f64> {
        self.values(key)?.iter().copied().flatten().next()
    }

    /// Lines that could not be used.
    pub fn faults(&self) -> usize {
        self.faults
    }

    /// The first of them, with the reason.
    pub fn first_faults(&self) -> &[String] {
        &self.first_faults
    }

    /// The log with at most about 3000 points: of each group of steps every column keeps its smallest and its largest
    /// value, in their order.
    pub fn thinned(&self) -> Self {
        let group = (2 * self.len()).div_ceil(MOST_POINTS);
        if self.len() <= MOST_POINTS {
            return self.clone();
        }
        let groups = self.steps.chunks(group);
        let steps = groups.flat_map(|steps| [steps[0], steps[steps.len() / 2].max(steps[0] + 1)]).collect();
        let column = |column: &Column| {
            let values = column.values.chunks(group).flat_map(extremes).collect();
            Column { key: column.key.clone(), values }
        };
        let columns = self.columns.iter().map(column).collect();
        Self { steps, columns, faults: self.faults, first_faults: self.first_faults.clone() }
    }
}

fn parsed(line: &[u8]) -> Result<(u64, Map<String, Value>), String> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => match object.get("step").and_then(Value::as_u64) {
            Some(step) => Ok((step, object)),
            None => Err("no `step`".into()),
        },
        Ok(_) => Err("not a JSON object".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// The smallest and the largest value in the order in which they come.
fn extremes(values: &[Option<f64>]) -> [Option<f64>; 2] {
    let finite = || values.iter().enumerate().filter_map(|(at, value)| value.map(|value| (value, at)));
    let low = finite().min_by(|a, b| a.0.total_cmp(&b.0));
    let high = finite().max_by(|a, b| a.0.total_cmp(&b.0));
    match (low, high) {
        (Some(low), Some(high)) if low.1 <= high.1 => [Some(low.0), Some(high.0)],
        (Some(low), Some(high)) => [Some(high.0), Some(low.0)],
        _ => [None, None],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_numeric_key_is_a_column_and_broken_lines_are_told() {
        let text = b"{\"step\":1,\"loss\":2.5,\"loss_patch\":null,\"note\":\"x\"}\nnot json\n{\"loss\":3}\n[1]\n\n\
            {\"step\":3,\"loss\":1.5,\"knn_top1\":0.25}\n{\"step\":2,\"loss\":2.0}\n{\"step\":2,\"loss\":1.75}\n{\"step\":4,\"lo";
        let log = Log::read(text);
        assert_eq!(log.steps(), [1, 2, 3]);
        let keys: Vec<&str> = log.columns().iter().map(|column| column.key.as_str()).collect();
        assert_eq!(keys, ["loss", "loss_patch", "knn_top1"]);
        assert_eq!(log.values("loss").unwrap(), [Some(2.5), Some(1.75), Some(1.5)]);
        assert_eq!(log.values("loss_patch").unwrap(), [None, None, None]);
        assert_eq!(
            (log.last("knn_top1"), log.first("loss"), log.at("loss", 1)),
            (Some(0.25), Some(2.5), Some(1.75))
        );
        assert_eq!(log.faults(), 3);
        assert!(log.first_faults()[0].starts_with("line 2: "), "{:?}", log.first_faults());
        assert_eq!(log.first_faults()[1], "line 3: no `step`");
        assert_eq!(log.first_faults()[2], "line 4: not a JSON object");
    }

    #[test]
    fn hostile_bytes_are_only_faults() {
        for bytes in [&b"\xff\xfe\n\x00\n"[..], b"{\"step\":-1}\n{\"step\":1e99}\n", b"", b"\n\n"] {
            let log = Log::read(bytes);
            assert!(log.is_empty() && log.thinned().is_empty());
        }
    }

    #[test]
    fn thinning_keeps_peaks() {
        let mut text = String::new();
        for step in 1..=20_000 {
            let loss = if step == 12_345 { 99.0 } else { (step % 10) as f64 };
            text += &format!("{{\"step\":{step},\"loss\":{loss}}}\n");
        }
        let thin = Log::read(text.as_bytes()).thinned();
        assert!((1000..=MOST_POINTS + 2).contains(&thin.len()), "{}", thin.len());
        assert!(thin.steps().windows(2).all(|pair| pair[0] < pair[1]));
        let peaks = thin.values("loss").unwrap().iter().flatten().filter(|loss| **loss == 99.0).count();
        assert_eq!(peaks, 1);
    }
}
