//! The progress line on standard error: a bar on a terminal, one plain line per log step elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Metrics;
use crate::config::derived::ChanceLosses;

/// Redraws per second.
const REDRAW_HZ: u8 = 4;

/// The progress of a run as a person sees it.
pub struct Progress {
    total: u64,
    chance: ChanceLosses,
    start: u64,
    started: Instant,
    /// `None` where standard error is no terminal.
    bar: Option<ProgressBar>,
    /// Whether it says nothing at all: another rank does.
    silent: bool,
    last: String,
    /// The newest result of a probe, which is shown until there is another.
    probe: String,
}

impl Progress {
    /// For a run of `total` steps of which `start` are done; beside each loss stands where one that learned nothing stays.
    pub fn new(total: u64, start: u64, chance: ChanceLosses) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(REDRAW_HZ));
            let style = ProgressStyle::with_template("{bar:20.cyan} {wide_msg}");
            bar.set_style(style.expect("the template is fixed and valid"));
            bar.set_position(start);
            bar
        });
        Self {
            total,
            chance,
            start,
            started: Instant::now(),
            bar,
            silent: false,
            last: String::new(),
            probe: String::new(),
        }
    }

    /// The same, but without a word, for a rank that is not the first.
    pub fn silent(self) -> Self {
        if let Some(bar) = &self.bar {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Self { bar: None, silent: true, ..self }
    }

    /// After every step: moves the bar.
    pub fn step(&mut self, step: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(format!("step {step}/{}{}{}", self.total, self.eta(step), self.last));
        }
    }

    /// After every log step: shows the numbers.
    pub fn log(&mut self, metrics: &Metrics) {
        for (name, score) in [("k-NN", metrics.knn_top1), ("retrieval mIoU", metrics.retrieval_miou)] {
            if let Some(score) = score {
                self.probe = format!("  {name} {:.1} %", 100.0 * score);
            }
        }
        self.last = self.numbers(metrics);
        match &self.bar {
            Some(_) => self.step(metrics.step),
            None => {
                let step = metrics.step;
                let line = format!("step {step}/{}{}{}", self.total, self.eta(step), self.last);
                self.say(&line);
            }
        }
    }

    /// One line of text, above the bar if there is one.
    pub fn say(&self, line: &str) {
        match &self.bar {
            _ if self.silent => {}
            Some(bar) => bar.println(line),
            // a closed standard error is no reason to stop training
            None => drop(writeln!(anstream::stderr().lock(), "{line}")),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn numbers(&self, m: &Metrics) -> String {
        let of_chance = if self.chance.image_is_ln_k { "ln K" } else { "chance" };
        // without a patch objective there is no patch loss
        let patch = match m.loss_patch.is_finite() {
            true => format!("  patch {:.2} (ln K {:.2})", m.loss_patch, self.chance.patch),
            false => String::new(),
        };
        format!(
            "  epoch {:.2}  class {:.2} ({of_chance} {:.2}){patch}{}  {:.1} images/s  data wait {:.0} %",
            m.epoch,
            m.loss_image,
            self.chance.image,
            self.probe,
            m.images_per_s,
            100.0 * m.data_wait
        )
    }

    /// Time left at the mean speed since the start; empty until there is a speed.
    fn eta(&self, step: u64) -> String {
        let done = step.saturating_sub(self.start);
        if done == 0 {
            return String::new();
        }
        let left = self.total.saturating_sub(step);
        let seconds = self.started.elapsed().as_secs_f64() / done as f64 * left as f64;
        format!("  {} left", duration(Duration::from_secs_f64(seconds.min(1e9))))
    }
}

/// `42s`, `3m05s`, `7h20m`, `2d03h`.
fn duration(time: Duration) -> String {
    let s = time.as_secs_f64().round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (61, "1m01s"), (26_400, "7h20m"), (183_600, "2d03h")]
        {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn losses_stand_beside_their_ln_k() {
        let ln = |prototypes: f64| prototypes.ln();
        let chance = ChanceLosses { image: ln(1024.0), patch: ln(512.0), image_is_ln_k: true };
        let mut progress = Progress::new(100, 10, chance);
        let metrics = Metrics {
            step: 20,
            epoch: 1.5,
            loss_image: 5.214,
            loss_patch: 6.0,
            images_per_s: 42.25,
            data_wait: 0.031,
            ..Metrics::default()
        };
        assert_eq!(
            progress.numbers(&metrics),
            "  epoch 1.50  class 5.21 (ln K 6.93)  patch 6.00 (ln K 6.24)  42.2 images/s  data wait 3 %"
        );
        progress.log(&Metrics { knn_top1: Some(0.875), ..metrics });
        progress.log(&metrics);
        assert!(progress.last.contains("(ln K 6.24)  k-NN 87.5 %  42.2 images/s"), "{}", progress.last);
        let plain = progress.numbers(&Metrics { loss_patch: f64::NAN, ..Metrics::default() });
        assert!(!plain.contains("patch"), "{plain}");
        assert_eq!(progress.eta(10), "");
        assert_eq!(progress.eta(100), "  0s left");
    }
}
