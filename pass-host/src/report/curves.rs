//! Which numbers share a chart, and the lines they are read against.

use serde::Serialize;

use super::log::Log;
use crate::config::{ImageMethod, TrainConfig};
use crate::model::Architecture;

/// Everything the script of the page draws.
#[derive(Debug, Serialize)]
pub struct Data {
    steps: Vec<u64>,
    epochs: Option<Vec<Option<f32>>>,
    charts: Vec<Chart>,
    thinned: bool,
}

#[derive(Debug, Serialize)]
struct Chart {
    title: String,
    about: String,
    curves: Vec<Curve>,
    lines: Vec<Line>,
    /// A schedule, which is drawn as it is.
    exact: bool,
}

#[derive(Debug, Serialize)]
struct Curve {
    key: String,
    name: String,
    /// Single precision is more than a chart shows, and half the bytes.
    values: Vec<Option<f32>>,
}

/// A dashed line at a value that means something.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    value: f64,
    /// The curve it belongs to, for its color.
    curve: usize,
}

/// A chart: title, what it says, and the keys with their names.
struct Plan {
    title: &'static str,
    about: &'static str,
    keys: &'static [(&'static str, &'static str)],
}

/// The keys of schedules.
const SCHEDULES: [&str; 4] = ["lr", "weight_decay", "momentum", "teacher_temp"];

/// The charts in the order of the page. Keys that are in none get one of their own behind them.
const PLANS: [Plan; 13] = [
    Plan {
        title: "Loss",
        about: "nats; dashed: ln K, the loss of a blind guess",
        keys: &[("loss", "total"), ("loss_image", "class"), ("loss_patch", "patch")],
    },
    Plan {
        title: "Entropy of the teacher",
        about: "nats; dashed: ln K (uniform); 0 is one prototype for everything",
        keys: &[("teacher_entropy_image", "class"), ("teacher_entropy_patch", "patch")],
    },
    Plan {
        title: "Teacher against student",
        about: "KL divergence, nats",
        keys: &[("kl_image", "class"), ("kl_patch", "patch")],
    },
    Plan {
        title: "Spread of the features",
        about: "standard deviation; dashed: evenly spread, all equal",
        keys: &[("feature_std", "features")],
    },
    Plan {
        title: "Agreement of the positives",
        about: "share of positives with the prototype of their patch",
        keys: &[("positives_agreement", "agreement")],
    },
    Plan {
        title: "Accuracy of the contrast",
        about: "share of the images whose own key is nearest to their query",
        keys: &[("contrast_accuracy", "accuracy")],
    },
    Plan { title: "Gradient", about: "norm before clipping", keys: &[("grad_norm", "norm")] },
    Plan { title: "Learning rate", about: "", keys: &[("lr", "rate")] },
    Plan { title: "Weight decay", about: "", keys: &[("weight_decay", "decay")] },
    Plan { title: "Momentum of the teacher", about: "", keys: &[("momentum", "momentum")] },
    Plan { title: "Temperature of the teacher", about: "", keys: &[("teacher_temp", "temperature")] },
    Plan { title: "Speed", about: "images a second", keys: &[("images_per_s", "images/s")] },
    Plan { title: "Waiting for data", about: "share of the time", keys: &[("data_wait", "waiting")] },
];

/// The data of all charts.
pub fn data(log: &Log, config: Option<&TrainConfig>) -> Data {
    let thin = log.thinned();
    let single =
        |values: &[Option<f64>]| values.iter().map(|value| value.map(|value| value as f32)).collect();
    let mut charts = Vec::new();
    let mut known = vec!["epoch"];
    for plan in &PLANS {
        let mut curves = Vec::new();
        let mut lines = Vec::new();
        for (key, name) in plan.keys {
            known.push(key);
            // a key without a single number (a run without patch objective) would be an empty curve
            let Some(values) = thin.values(key).filter(|values| values.iter().any(Option::is_some)) else {
                continue;
            };
            let reference = config.map(|config| references(key, config)).unwrap_or_default();
            let curve = curves.len();
            lines.extend(reference.into_iter().map(|(name, value)| Line { name, value, curve }));
            curves.push(Curve { key: (*key).into(), name: (*name).into(), values: single(values) });
        }
        if !curves.is_empty() {
            let exact = plan.keys.iter().all(|(key, _)| SCHEDULES.contains(key));
            charts.push(Chart { title: plan.title.into(), about: plan.about.into(), curves, lines, exact });
        }
    }
    for column in thin.columns().iter().filter(|column| !known.contains(&column.key.as_str())) {
        let values = single(&column.values);
        let curve = Curve { key: column.key.clone(), name: column.key.clone(), values };
        charts.push(Chart {
            title: column.key.clone(),
            about: String::new(),
            curves: vec![curve],
            lines: Vec::new(),
            exact: false,
        });
    }
    Data {
        steps: thin.steps().to_vec(),
        epochs: thin.values("epoch").map(single),
        charts,
        thinned: thin.len() < log.len(),
    }
}

/// The values a key is read against.
fn references(key: &str, config: &TrainConfig) -> Vec<(String, f64)> {
    let ln_k = |prototypes: usize| vec![(format!("ln {prototypes}"), (prototypes as f64).ln())];
    match key {
        "loss_image" if config.image.method != ImageMethod::Dino => {
            let chance = config.chance_losses(f64::NAN).image;
            if chance.is_nan() { Vec::new() } else { vec![("chance".into(), chance)] }
        }
        "loss_image" | "teacher_entropy_image" => ln_k(config.head.class_prototypes),
        "loss_patch" | "teacher_entropy_patch" => ln_k(config.head.patch_prototypes),
        "feature_std" => {
            let even = (Architecture::from_config(config).dim as f64).sqrt().recip();
            vec![
                ("evenly spread".into(), even),
                ("all equal".into(), crate::train::guard::DEAD_SPREAD * even),
            ]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_in_one_chart() {
        let text = b"{\"step\":1,\"epoch\":0.5,\"loss\":1,\"loss_image\":1,\"loss_patch\":null,\"lr\":0.1,\"knn_top1\":0.5}\n";
        let data = data(&Log::read(text), Some(&TrainConfig::default()));
        let charts: Vec<(String, usize, usize)> =
            data.charts.iter().map(|c| (c.title.clone(), c.curves.len(), c.lines.len())).collect();
        let expected = [("Loss", 2, 1), ("Learning rate", 1, 0), ("knn_top1", 1, 0)];
        assert_eq!(charts, expected.map(|(title, curves, lines)| (title.to_owned(), curves, lines)));
        assert!((data.charts[0].lines[0].value - 65536_f64.ln()).abs() < 1e-12);
        assert_eq!(data.epochs, Some(vec![Some(0.5)]));
    }
}
