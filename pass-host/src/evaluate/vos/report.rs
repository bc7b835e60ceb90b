//! The figures of an evaluation: as one object for programs, a table for people, rows for spreadsheets.

use std::collections::BTreeMap;
use std::fmt::Write;

use pass_core::segmentation_metrics::Statistics;
use serde::Serialize;

/// Figures of one object over the scored frames.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[expect(non_snake_case, reason = "the names of the published measures, and keys of the JSON object")]
pub struct ObjectScore {
    /// Mean region similarity.
    pub J_mean: f64,
    /// Share of frames with J above 0.5.
    pub J_recall: f64,
    /// Loss of J from the first to the last quarter.
    pub J_decay: f64,
    /// Mean contour accuracy.
    pub F_mean: f64,
    /// Share of frames with F above 0.5.
    pub F_recall: f64,
    /// Loss of F from the first to the last quarter.
    pub F_decay: f64,
}

impl ObjectScore {
    /// From the figures of J and of F.
    pub fn new(j: Statistics, f: Statistics) -> Self {
        Self {
            J_mean: j.mean,
            J_recall: j.recall,
            J_decay: j.decay,
            F_mean: f.mean,
            F_recall: f.recall,
            F_decay: f.decay,
        }
    }
}

/// Figures of one sequence: means over its objects.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(non_snake_case, reason = "the names of the published measures, and keys of the JSON object")]
pub struct SequenceScore {
    /// Scored frames.
    pub frames: usize,
    /// Mean over the objects.
    pub J_mean: f64,
    /// Mean over the objects.
    pub F_mean: f64,
    /// Mean of the two.
    #[serde(rename = "J&F_mean")]
    pub JF_mean: f64,
    /// By label.
    pub objects: BTreeMap<u8, ObjectScore>,
}

impl SequenceScore {
    /// From the figures of the objects.
    pub fn new(frames: usize, objects: BTreeMap<u8, ObjectScore>) -> Self {
        let [j, f] = [mean(objects.values().map(|o| o.J_mean)), mean(objects.values().map(|o| o.F_mean))];
        Self { frames, J_mean: j, F_mean: f, JF_mean: f64::midpoint(j, f), objects }
    }

    /// A line for people, in percent.
    pub fn line(&self) -> String {
        let [both, j, f] = [self.JF_mean, self.J_mean, self.F_mean].map(|value| 100.0 * value);
        format!("J&F {both:.1}, J {j:.1}, F {f:.1}, mean over {} frames", self.frames)
    }
}

/// Figures of a data set: means over the objects of all sequences.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(non_snake_case, reason = "the names of the published measures, and keys of the JSON object")]
pub struct VosReport {
    /// Mean region similarity.
    pub J_mean: f64,
    /// Mean contour accuracy.
    pub F_mean: f64,
    /// Mean of the two.
    #[serde(rename = "J&F_mean")]
    pub JF_mean: f64,
    /// Mean share of frames with J above 0.5.
    pub J_recall: f64,
    /// Mean share of frames with F above 0.5.
    pub F_recall: f64,
    /// Mean loss of J over time.
    pub J_decay: f64,
    /// Mean loss of F over time.
    pub F_decay: f64,
    /// Objects that were scored.
    pub objects: usize,
    /// What was judged.
    pub judged: String,
    /// Frames propagated per second, scoring included; nothing for ready masks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_per_s: Option<f64>,
    /// By name.
    pub sequences: BTreeMap<String, SequenceScore>,
}

impl VosReport {
    /// From the figures of the sequences.
    pub fn new(judged: String, sequences: BTreeMap<String, SequenceScore>) -> Self {
        let objects: Vec<ObjectScore> =
            sequences.values().flat_map(|s| s.objects.values().copied()).collect();
        let mean = |value: fn(&ObjectScore) -> f64| mean(objects.iter().map(value));
        let (j, f) = (mean(|o| o.J_mean), mean(|o| o.F_mean));
        Self {
            J_mean: j,
            F_mean: f,
            JF_mean: f64::midpoint(j, f),
            J_recall: mean(|o| o.J_recall),
            F_recall: mean(|o| o.F_recall),
            J_decay: mean(|o| o.J_decay),
            F_decay: mean(|o| o.F_decay),
            objects: objects.len(),
            judged,
            frames_per_s: None,
            sequences,
        }
    }

    /// Lines for people, in percent.
    pub fn table(&self) -> String {
        let width = self.sequences.keys().map(|name| name.chars().count()).max().unwrap_or(0).max(8);
        let mut text = format!("{:width$}  object   J&F     J     F\n", "sequence");
        let mut row = |name: &str, object: &str, j: f64, f: f64| {
            let both = f64::midpoint(j, f);
            let [both, j, f] = [both, j, f].map(|value| 100.0 * value);
            writeln!(text, "{name:width$}  {object:>6} {both:5.1} {j:5.1} {f:5.1}").ok();
        };
        for (name, sequence) in &self.sequences {
            for (object, score) in &sequence.objects {
                row(name, &object.to_string(), score.J_mean, score.F_mean);
            }
        }
        row("mean", &self.objects.to_string(), self.J_mean, self.F_mean);
        writeln!(
            text,
            "recall (above 50): J {:.1}, F {:.1}; decay: J {:.1}, F {:.1}",
            100.0 * self.J_recall,
            100.0 * self.F_recall,
            100.0 * self.J_decay,
            100.0 * self.F_decay
        )
        .ok();
        text
    }

    /// A row an object, then their means; values in `[0, 1]`.
    pub fn csv(&self) -> String {
        let mut text =
            String::from("sequence,object,frames,J_mean,J_recall,J_decay,F_mean,F_recall,F_decay\n");
        for (name, sequence) in &self.sequences {
            for (object, score) in &sequence.objects {
                let ObjectScore { J_mean, J_recall, J_decay, F_mean, F_recall, F_decay } = score;
                writeln!(
                    text,
                    "{},{object},{},{J_mean},{J_recall},{J_decay},{F_mean},{F_recall},{F_decay}",
                    quoted(name),
                    sequence.frames
                )
                .ok();
            }
        }
        let Self { J_mean, J_recall, J_decay, F_mean, F_recall, F_decay, .. } = self;
        writeln!(text, "mean,,,{J_mean},{J_recall},{J_decay},{F_mean},{F_recall},{F_decay}").ok();
        text
    }
}

/// A field of a CSV row.
fn quoted(field: &str) -> String {
    match field.contains(['"', ',', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.to_owned(),
    }
}

/// Of no value: 0.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> VosReport {
        let object = |j, f| {
            let statistics = |mean| Statistics { mean, recall: 1.0, decay: 0.25 };
            ObjectScore::new(statistics(j), statistics(f))
        };
        let sequence = |objects: &[(u8, f64, f64)]| {
            SequenceScore::new(9, objects.iter().map(|&(label, j, f)| (label, object(j, f))).collect())
        };
        let sequences = BTreeMap::from([
            ("a,b".to_owned(), sequence(&[(1, 0.5, 0.75), (2, 1.0, 0.75)])),
            ("dog".to_owned(), sequence(&[(1, 0.0, 0.0)])),
        ]);
        VosReport::new("masks".into(), sequences)
    }

    #[test]
    fn objects_count_equally_whatever_their_sequence() {
        let report = report();
        assert_eq!((report.J_mean, report.F_mean, report.JF_mean), (0.5, 0.5, 0.5));
        assert_eq!((report.objects, report.J_recall, report.F_decay), (3, 1.0, 0.25));
        assert_eq!(report.sequences["a,b"].JF_mean, 0.75);
    }

    #[test]
    fn json_keys_are_the_promised_ones() {
        let json = serde_json::to_value(report()).unwrap();
        for key in ["J_mean", "F_mean", "J&F_mean", "J_recall", "F_recall"] {
            assert!(json[key].is_f64(), "{key}");
        }
        assert_eq!(json["sequences"]["a,b"]["objects"]["2"]["J_mean"], 1.0);
        assert_eq!(json["sequences"]["dog"]["J&F_mean"], 0.0);
    }

    #[test]
    fn rows_and_tables_hold_every_object() {
        let csv = report().csv();
        assert_eq!(csv.lines().count(), 5);
        assert!(
            csv.contains("\"a,b\",2,9,1,1,0.25,0.75,1,0.25\n")
                && csv.ends_with("mean,,,0.5,1,0.25,0.5,1,0.25\n")
        );
        let table = report().table();
        assert!(table.contains("a,b            2  87.5 100.0  75.0\n"), "{table}");
        assert!(table.contains("mean           3  50.0  50.0  50.0\n"), "{table}");
    }
}
