//! The rules every configuration obeys. All broken rules are reported together.

use std::fmt::Display;

use super::{Arch, Border, ImageMethod, PatchCrops, Positions, TrainConfig, Window};

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The dotted key that should change.
    pub key: &'static str,
    /// Another key the rule ties it to.
    pub other: Option<&'static str>,
    /// What is allowed.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl Violation {
    /// The keys the rule is about.
    pub fn keys(&self) -> impl Iterator<Item = &'static str> + use<> {
        std::iter::once(self.key).chain(self.other)
    }
}

impl TrainConfig {
    /// Every rule this configuration breaks; empty = valid.
    pub fn violations(&self) -> Vec<Violation> {
        let mut check = Check(Vec::new());
        check.that("seed", i64::try_from(self.seed).is_ok(), "a whole number below 2^63", self.seed);
        self.check_data(&mut check);
        self.check_augment(&mut check);
        self.check_model(&mut check);
        self.check_objectives(&mut check);
        self.check_optim(&mut check);
        self.check_bookkeeping(&mut check);
        check.0
    }

    /// Legal but unusual settings worth a line at the start of a run over `images` images.
    pub fn warnings(&self, images: usize, ranks: usize) -> Vec<String> {
        let mut out = Vec::new();
        let (optim, epochs) = (&self.optim, self.total_epochs(images, ranks));
        if optim.min_lr > self.peak_lr(ranks) {
            out.push(format!(
                "optim.min_lr {:e} is above the peak learning rate {:e} (optim.lr_per_256 · batch / 256): the rate will rise",
                optim.min_lr,
                self.peak_lr(ranks)
            ));
        }
        let distributions = self.compares_distributions();
        let within = [
            ("optim.warmup_epochs", optim.warmup_epochs, true),
            ("image.teacher_temp_warmup_epochs", self.image.teacher_temp_warmup_epochs, distributions),
            ("optim.freeze_last_layer_epochs", optim.freeze_last_layer_epochs, distributions),
        ];
        for (key, value, used) in within {
            if used && value > epochs {
                out.push(format!("{key} = {value} is longer than the run of {epochs:.1} epochs"));
            }
        }
        out
    }

    fn check_data(&self, check: &mut Check) {
        let data = &self.data;
        check.that(
            "data.images",
            data.images.iter().all(|i| !i.is_empty()),
            "no empty names",
            "an empty name",
        );
        check.within("data.workers", data.workers, 0, 1024);
        check.within("data.prefetch", data.prefetch, 1, 1024);
        check.share("data.max_bad", data.max_bad);
        check.positive("data.max_megapixels", data.max_megapixels);
    }

    fn check_augment(&self, check: &mut Check) {
        let a = &self.augment;
        // larger crops than this do not fit any machine; the bound keeps products of sizes from overflowing
        check.within("augment.global_size", a.global_size, 1, 4096);
        check.within("augment.local_size", a.local_size, 1, 4096);
        check.within("augment.local_crops", a.local_crops, 0, 64);
        check.ordered("augment.global_scale", a.global_scale, 1.0);
        check.ordered("augment.local_scale", a.local_scale, 1.0);
        check.ordered("augment.ratio", a.ratio, f64::MAX);
        for (key, value) in [
            ("augment.flip", a.flip),
            ("augment.jitter", a.jitter),
            ("augment.brightness", a.brightness),
            ("augment.contrast", a.contrast),
            ("augment.saturation", a.saturation),
            ("augment.gray", a.gray),
            ("augment.solarize", a.solarize),
        ] {
            check.share(key, value);
        }
        let half_turn = 0.5;
        check.that("augment.hue", (0.0..=half_turn).contains(&a.hue), "a number in [0, 0.5]", a.hue);
        let shares = a.blur.iter().all(|p| (0.0..=1.0).contains(p));
        check.that("augment.blur", shares, "3 numbers in [0, 1]", format!("{:?}", a.blur));
        check.ordered("augment.blur_radius", a.blur_radius, 1000.0);
        let means = a.mean.iter().all(|m| m.is_finite());
        check.that("augment.mean", means, "3 finite numbers", format!("{:?}", a.mean));
        let deviations = a.std.iter().all(|s| s.is_finite() && *s > 0.0);
        check.that("augment.std", deviations, "3 numbers above 0", format!("{:?}", a.std));
    }

    fn check_model(&self, check: &mut Check) {
        let (model, head) = (&self.model, &self.head);
        let patch = model.patch_size;
        check.within("model.patch_size", patch, 1, 1024);
        if patch > 0 {
            let multiple = format!("a multiple of model.patch_size ({patch})");
            for (key, size) in [
                ("augment.global_size", self.augment.global_size),
                ("augment.local_size", self.augment.local_size),
            ] {
                check.tied(key, "model.patch_size", size.is_multiple_of(patch), &multiple, size);
            }
        }
        if model.arch == Arch::Custom {
            check.within("model.dim", model.dim, 1, 1 << 14);
            check.within("model.depth", model.depth, 1, 1 << 10);
            check.within("model.heads", model.heads, 1, 1 << 10);
            let divides = model.heads == 0 || model.dim.is_multiple_of(model.heads);
            let expected = format!("a divisor of model.dim ({})", model.dim);
            check.tied("model.heads", "model.dim", divides, &expected, model.heads);
        }
        let (dim, ..) = self.dims();
        let quarters = model.positions == Positions::Learned || dim.is_multiple_of(4);
        let expected = format!("learned for a width of {dim}, or sin_cos for a multiple of 4");
        check.tied("model.positions", "model.dim", quarters, &expected, "sin_cos");
        let below_one = (0.0..1.0).contains(&model.drop_path);
        check.that("model.drop_path", below_one, "a number in [0, 1)", model.drop_path);
        check.within("head.hidden", head.hidden, 1, 1 << 16);
        check.within("head.bottleneck", head.bottleneck, 1, 1 << 16);
        check.within("head.class_prototypes", head.class_prototypes, 2, 1 << 22);
        check.within("head.patch_prototypes", head.patch_prototypes, 2, 1 << 22);
    }

    fn check_objectives(&self, check: &mut Check) {
        let (image, patch) = (&self.image, &self.patch);
        check.positive("image.student_temp", image.student_temp);
        check.positive("image.teacher_temp_start", image.teacher_temp_start);
        check.positive("image.teacher_temp_end", image.teacher_temp_end);
        check.not_negative("image.teacher_temp_warmup_epochs", image.teacher_temp_warmup_epochs);
        check.share("image.center_momentum", image.center_momentum);
        check.positive("image.temperature", image.temperature);
        check.within("image.hidden", image.hidden, 1, 1 << 16);
        check.within("image.out", image.out, 1, 1 << 16);
        check.within("image.queue", image.queue, 1, 1 << 24);
        self.check_method(check);
        check.not_negative("patch.weight", patch.weight);
        if let Window::Side(side) = patch.window {
            let odd = (3..=1023).contains(&side) && side % 2 == 1;
            check.that("patch.window", odd, "an odd number from 3 to 1023, or \"all\"", side);
            if !odd {
                return;
            }
        }
        let (most, because) = self.most_positives();
        let expected = format!("a whole number from 1 to {most} ({because})");
        check.tied("patch.k", "patch.window", (1..=most).contains(&patch.k), &expected, patch.k);
    }

    /// What contrastive methods have no use for.
    fn check_method(&self, check: &mut Check) {
        if self.image.method == ImageMethod::Dino {
            return;
        }
        let name = self.image.method.name();
        let of_use = self.patch.enabled && self.patch.crops == PatchCrops::All;
        let expected = format!(
            "0: image.method {name} compares the two global crops; local crops serve the patch objective alone, with              patch.enabled and patch.crops = \"all\""
        );
        let locals = self.augment.local_crops;
        check.tied("augment.local_crops", "image.method", locals == 0 || of_use, &expected, locals);
        let expected = format!(
            "1: image.method {name} normalizes over and compares all images of a step, parts of it give another loss"
        );
        let accumulate = self.optim.accumulate;
        check.tied("optim.accumulate", "image.method", accumulate <= 1, &expected, accumulate);
    }

    /// The largest `patch.k`, and why. With border `clip`, patches near the edge take min(k, available), so only the
    /// window counts; with `wrap` a window larger than the grid of the smallest crop meets each patch once.
    fn most_positives(&self) -> (usize, String) {
        let smallest = match self.patch.crops {
            PatchCrops::All if self.augment.local_crops > 0 => {
                self.augment.local_size.min(self.augment.global_size)
            }
            _ => self.augment.global_size,
        };
        let grid = self.grid(smallest);
        let on_grid = (grid * grid).saturating_sub(1);
        match (self.patch.window, self.patch.border) {
            (Window::Side(side), Border::Clip) => {
                (side * side - 1, format!("window {side} x {side}, less the patch"))
            }
            (Window::Side(side), Border::Wrap) if side <= grid => {
                (side * side - 1, format!("window {side} x {side}, less the patch"))
            }
            _ => (on_grid, format!("the grid of a {smallest}-pixel crop is {grid} x {grid}, less the patch")),
        }
    }

    fn check_optim(&self, check: &mut Check) {
        let o = &self.optim;
        check.within("optim.batch", o.batch, 1, 1 << 20);
        check.within("optim.accumulate", o.accumulate, 1, 1 << 20);
        if o.accumulate > 0 {
            let expected = format!("a divisor of optim.batch ({})", o.batch);
            check.tied(
                "optim.accumulate",
                "optim.batch",
                o.batch.is_multiple_of(o.accumulate),
                &expected,
                o.accumulate,
            );
        }
        let some = o.epochs > 0 || o.steps > 0;
        check.tied("optim.epochs", "optim.steps", some, "1 or more, or optim.steps above 0", o.epochs);
        check.within("optim.epochs", o.epochs, 0, 1 << 32);
        check.within("optim.steps", o.steps, 0, 1 << 48);
        check.not_negative("optim.lr_per_256", o.lr_per_256);
        check.not_negative("optim.min_lr", o.min_lr);
        check.not_negative("optim.warmup_epochs", o.warmup_epochs);
        check.not_negative("optim.weight_decay", o.weight_decay);
        check.not_negative("optim.weight_decay_end", o.weight_decay_end);
        check.share("optim.momentum", o.momentum);
        let below_one = o.betas.iter().all(|b| (0.0..1.0).contains(b));
        check.that("optim.betas", below_one, "2 numbers in [0, 1)", format!("{:?}", o.betas));
        check.positive("optim.eps", o.eps);
        check.not_negative("optim.clip", o.clip);
        check.not_negative("optim.freeze_last_layer_epochs", o.freeze_last_layer_epochs);
    }

    fn check_bookkeeping(&self, check: &mut Check) {
        check.within("checkpoint.every_steps", self.checkpoint.every_steps, 0, 1 << 48);
        check.within("checkpoint.keep", self.checkpoint.keep, 1, 1 << 32);
        check.within("checkpoint.keep_every", self.checkpoint.keep_every, 0, 1 << 48);
        check.within("log.every_steps", self.log.every_steps, 1, 1 << 48);
        check.within("log.report_every_steps", self.log.report_every_steps, 0, 1 << 48);
        let probe = &self.probe;
        check.within("probe.every_steps", probe.every_steps, 0, 1 << 48);
        let named = probe.every_steps == 0 || !probe.data.is_empty();
        check.tied(
            "probe.data",
            "probe.every_steps",
            named,
            "a labelled folder, for probe.every_steps above 0",
            "none",
        );
        check.within("probe.images", probe.images, 2, 1 << 20);
        check.within("probe.k", probe.k, 1, 1 << 20);
        check.within("data.limit", self.data.limit, 0, 1 << 48);
        check.within("guard.max_skipped", self.guard.max_skipped, 0, 1 << 32);
        check.within("guard.max_rollbacks", self.guard.max_rollbacks, 0, 1 << 32);
        check.within("guard.collapse_steps", self.guard.collapse_steps, 1, 1 << 48);
    }
}

/// Collects broken rules.
struct Check(Vec<Violation>);

impl Check {
    fn that(&mut self, key: &'static str, ok: bool, expected: &str, found: impl Display) {
        if !ok {
            let (expected, found) = (expected.to_owned(), found.to_string());
            self.0.push(Violation { key, other: None, expected, found });
        }
    }

    fn tied(
        &mut self,
        key: &'static str,
        other: &'static str,
        ok: bool,
        expected: &str,
        found: impl Display,
    ) {
        if !ok {
            let (expected, found) = (expected.to_owned(), found.to_string());
            self.0.push(Violation { key, other: Some(other), expected, found });
        }
    }

    fn within(&mut self, key: &'static str, value: usize, low: usize, high: usize) {
        let expected = format!("a whole number from {low} to {high}");
        self.that(key, (low..=high).contains(&value), &expected, value);
    }

    fn share(&mut self, key: &'static str, value: f64) {
        self.that(key, (0.0..=1.0).contains(&value), "a number in [0, 1]", value);
    }

    fn positive(&mut self, key: &'static str, value: f64) {
        self.that(key, value.is_finite() && value > 0.0, "a number above 0", value);
    }

    fn not_negative(&mut self, key: &'static str, value: f64) {
        self.that(key, value.is_finite() && value >= 0.0, "a number, 0 or more", value);
    }

    /// `0 < low <= high <= most`.
    fn ordered(&mut self, key: &'static str, [low, high]: [f64; 2], most: f64) {
        let expected = match most {
            f64::MAX => "[low, high] with 0 < low <= high".to_owned(),
            _ => format!("[low, high] with 0 < low <= high <= {most}"),
        };
        self.that(key, low > 0.0 && low <= high && high <= most, &expected, format!("[{low}, {high}]"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Layers, presets};

    #[test]
    fn presets_are_valid() {
        for preset in presets::PRESETS {
            assert_eq!(preset.config().violations(), [], "{}", preset.name);
        }
    }

    #[test]
    fn each_rule_bites() {
        let cases = [
            "data.prefetch=0",
            "data.workers=5000",
            "data.images=[\"\"]",
            "data.max_bad=1.5",
            "data.max_megapixels=0",
            "augment.global_size=100",
            "augment.local_size=100",
            "augment.global_size=8192",
            "augment.local_crops=65",
            "augment.global_scale=[0.5, 0.4]",
            "augment.global_scale=[0.5, 1.1]",
            "augment.local_scale=[0, 0.4]",
            "augment.ratio=[2, 1]",
            "augment.flip=-0.1",
            "augment.jitter=nan",
            "augment.brightness=2",
            "augment.contrast=2",
            "augment.saturation=2",
            "augment.hue=0.6",
            "augment.gray=2",
            "augment.blur=[0, 0, 2]",
            "augment.blur_radius=[0, 1]",
            "augment.solarize=2",
            "augment.mean=[0, 0, inf]",
            "augment.std=[1, 1, 0]",
            "model.patch_size=2048",
            "model.drop_path=1",
            "head.hidden=0",
            "head.bottleneck=0",
            "head.class_prototypes=1",
            "head.patch_prototypes=1",
            "image.student_temp=0",
            "image.teacher_temp_start=-1",
            "image.teacher_temp_end=inf",
            "image.teacher_temp_warmup_epochs=-1",
            "image.center_momentum=1.1",
            "image.temperature=0",
            "image.hidden=0",
            "image.out=0",
            "image.queue=0",
            "patch.weight=-1",
            "patch.window=4",
            "patch.window=1",
            "patch.k=0",
            "patch.k=9",
            "optim.batch=0",
            "optim.accumulate=0",
            "optim.accumulate=3",
            "optim.epochs=0",
            "optim.lr_per_256=-1",
            "optim.min_lr=nan",
            "optim.warmup_epochs=-1",
            "optim.weight_decay=-1",
            "optim.weight_decay_end=-1",
            "optim.momentum=1.1",
            "optim.betas=[0.9, 1]",
            "optim.eps=0",
            "optim.clip=-1",
            "optim.freeze_last_layer_epochs=-1",
            "checkpoint.keep=0",
            "log.every_steps=0",
            "probe.images=1",
            "probe.k=0",
            "guard.collapse_steps=0",
        ];
        for text in cases {
            let key = text.split('=').next().unwrap();
            let layers = Layers { sets: vec![text.to_owned()], ..Layers::default() };
            let error = layers.resolve().expect_err(text).to_string();
            assert!(error.contains(&format!("`{key}`: expected")), "{text}: {error}");
        }
    }

    #[test]
    fn contrastive_methods_refuse_what_they_have_no_use_for() {
        let mut config = presets::find("moby-pass-vit-s16").unwrap().config();
        config.patch.crops = PatchCrops::Global;
        assert_eq!(config.violations()[0].key, "augment.local_crops");
        config.augment.local_crops = 0;
        assert_eq!(config.violations(), []);
        (config.augment.local_crops, config.patch.crops) = (2, PatchCrops::All);
        config.patch.enabled = false;
        let violations = config.violations();
        assert_eq!((violations.len(), violations[0].key), (1, "augment.local_crops"));
        assert!(violations[0].expected.contains("moby compares the two global crops"), "{violations:?}");
        (config.patch.enabled, config.optim.accumulate) = (true, 2);
        assert_eq!(config.violations()[0].key, "optim.accumulate");
        config.optim.accumulate = 1;
        config.model.positions = Positions::SinCos;
        (config.model.arch, config.model.dim, config.model.heads) = (Arch::Custom, 18, 6);
        assert_eq!(config.violations()[0].key, "model.positions");
    }

    #[test]
    fn custom_sizes_are_checked_only_when_used() {
        let mut config = TrainConfig::default();
        (config.model.dim, config.model.heads) = (100, 7);
        assert_eq!(config.violations(), []);
        config.model.arch = Arch::Custom;
        assert_eq!(config.violations().len(), 1);
        config.model.heads = 0;
        assert_eq!(config.violations()[0].key, "model.heads");
    }

    #[test]
    fn the_largest_k_follows_window_border_and_grid() {
        let mut config = TrainConfig::default();
        assert_eq!(config.most_positives().0, 8);
        config.patch.window = Window::Side(7);
        assert_eq!(config.most_positives().0, 35, "6 x 6 local grid, wrapped");
        config.patch.border = Border::Clip;
        assert_eq!(config.most_positives().0, 48);
        config.patch.crops = PatchCrops::Global;
        config.patch.window = Window::All(crate::config::AllPatches::All);
        assert_eq!(config.most_positives().0, 195);
    }

    #[test]
    fn warnings_name_schedules_longer_than_the_run() {
        let mut config = TrainConfig::default();
        config.optim.batch = 4;
        config.optim.epochs = 5;
        let warnings = config.warnings(100, 1);
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[0].contains("optim.min_lr"));
        (config.image.method, config.patch.enabled) = (ImageMethod::Moby, false);
        assert_eq!(
            config.warnings(100, 1).len(),
            2,
            "a contrastive method alone has no temperature to warm up"
        );
    }
}
