//! `pass-host train`: from flags to the settings of one run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Args;
use serde::{Deserialize, Serialize};
use toml::Value;

use super::{ComputeArgs, output, run_folder};
use crate::allocator;
use crate::config::run::{Ending, Outcome, Resume, RunSettings};
use crate::config::{ConfigError, Layers, Resolved, TrainConfig, presets};
use crate::device;
use crate::distributed::{DistributedError, Ranks};
use crate::error::Error;
use crate::train::TrainError;

/// Train on unlabelled images; resume a run.
///
/// Images may be folders (walked recursively), single files, tars (.tar, .tar.gz, .tgz), shards (of `pack`) and lists
/// (@list.txt, one path a line). Without images it trains preset `demo` on the photos that come with the source.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct TrainArgs {
    /// Folders, image files, tars, shards or @lists [default: the bundled photos with preset demo].
    #[arg(value_name = "IMAGES")]
    images: Vec<String>,

    /// Use only the first N images (sorted order).
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Data")]
    limit: Option<i64>,
    /// Decoding and augmentation threads [default: one per core]. The result is the same for any number.
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Data")]
    workers: Option<i64>,
    /// Where crops are made: `cpu`, or `gpu` if the processor cannot feed the GPU; the same pixels.
    #[arg(long, value_name = "WHERE", value_parser = ["cpu", "gpu"], hide_possible_values = true, help_heading = "Data")]
    augment: Option<String>,

    /// Run folder: weights, checkpoints, logs [default: the first free runs/<preset>-<n>].
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: Option<PathBuf>,
    /// Continue: `auto` (the run in --out, or the newest in runs/, if it has a checkpoint), a run or checkpoint folder,
    /// or `none`.
    #[arg(long, value_name = "auto|DIR|none", default_value = "none", help_heading = "Run")]
    resume: String,
    /// Start a new run from these weights (a run, a checkpoint folder or a safetensors file).
    #[arg(long, value_name = "WEIGHTS", help_heading = "Run")]
    init: Option<PathBuf>,
    /// Renew RUN/report.html every N steps and at the end [default: never].
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Run")]
    report_every: Option<i64>,
    /// Check everything and print the plan; train nothing, write nothing.
    #[arg(long, help_heading = "Run")]
    dry_run: bool,
    /// Write the result as one JSON object to standard output; logs stay on standard error.
    #[arg(long, help_heading = "Run")]
    json: bool,

    /// Starting point of the configuration [default: paper-vit-s16; demo without images]. `pass-host config list` lists
    /// all.
    #[arg(long, value_name = "NAME", help_heading = CONFIGURATION)]
    preset: Option<String>,
    /// TOML file with the keys that differ from the preset.
    #[arg(
        long,
        value_name = "F.toml",
        help_heading = CONFIGURATION
    )]
    config: Option<PathBuf>,
    /// Set any key, for example `--set patch.k=8`; may be repeated. `pass-host config show demo` prints all.
    #[arg(
        long = "set",
        value_name = "KEY=VALUE",
        help_heading = CONFIGURATION
    )]
    sets: Vec<String>,

    /// Image-level method: `dino`, `moco_v3` or `moby`. The presets of a method bring its recipe as well.
    #[arg(long, value_name = "METHOD", help_heading = TRAINING)]
    method: Option<String>,
    /// Passes over the images.
    #[arg(long, value_name = "N", value_parser = count, conflicts_with = "steps", help_heading = TRAINING)]
    epochs: Option<i64>,
    /// Optimizer steps, instead of epochs; the schedules stretch over them.
    #[arg(long, value_name = "N", value_parser = count, help_heading = TRAINING)]
    steps: Option<i64>,
    /// Images a step of each rank; the learning rate follows the total linearly.
    #[arg(long, value_name = "N", value_parser = count, help_heading = TRAINING)]
    batch: Option<i64>,
    /// Split each batch into N parts that are computed one after the other, to save memory.
    #[arg(long, value_name = "N", value_parser = count, help_heading = TRAINING)]
    accumulate: Option<i64>,
    /// Seed of everything random.
    #[arg(long, value_name = "N", value_parser = count, help_heading = TRAINING)]
    seed: Option<i64>,
    /// What to do on signs of collapse: `stop` (exit code 3) or `warn`.
    #[arg(long, value_name = "ACTION", value_parser = ["stop", "warn"], hide_possible_values = true, help_heading = TRAINING)]
    on_collapse: Option<String>,
    /// Training operations: `fused`, or the slow plain compositions `reference`.
    #[arg(long, value_name = "KIND", value_parser = ["fused", "reference"], hide_possible_values = true, help_heading = TRAINING)]
    ops: Option<String>,
    /// Save memory: run the student's blocks forward again in the backward pass instead of keeping what they computed.
    #[arg(long, help_heading = TRAINING)]
    recompute: bool,

    /// Measure the teacher's features every N steps and log the result (`knn_top1` or `retrieval_miou`); 0 = never.
    #[arg(long, value_name = "N", value_parser = count, help_heading = TRAINING)]
    eval_every: Option<i64>,
    /// Labelled images for it: DIR/{train,val}/CLASS, or with `--set probe.kind=retrieval` DIR/{images,labels}/{train,val}.
    #[arg(long, value_name = "DIR", help_heading = TRAINING)]
    eval_data: Option<String>,

    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

const CONFIGURATION: &str = "Configuration (later wins: preset, file, --set, flags)";
const TRAINING: &str = "Training (unset: as configured)";
const EXAMPLES: &str = "\
Examples:
  pass-host train                                     demo on the bundled photos, about two minutes
  pass-host train PHOTOS --preset demo --steps 2000   small network, your pictures
  pass-host train PHOTOS --batch 64 --epochs 100 --out runs/mine
  pass-host train --out runs/mine --resume auto       go on after a stop or a crash
  pass-host train PHOTOS --config mine.toml --set patch.weight=0.2 --dry-run
  pass-host train PHOTOS --eval-every 500 --eval-data FLOWERS
  mpirun -np 4 pass-host train PHOTOS --batch 16      four ranks, 64 images a step

Ctrl-C writes a checkpoint and ends with exit code 0; a second Ctrl-C stops at once.
Curves: tensorboard --logdir runs";

/// The folder of run folders when `--out` is not given.
const RUNS: &str = "runs";

fn count(text: &str) -> Result<i64, String> {
    text.parse().ok().filter(|n| *n >= 0).ok_or_else(|| "expected a whole number, 0 or more".to_owned())
}

pub(super) fn run(args: TrainArgs) -> Result<u8, Error> {
    let ranks = Ranks::join(args.compute.device)?;
    match train(&args, &ranks) {
        // it speaks for all
        Err(
            Error::Distributed(DistributedError::OtherRank { .. })
            | Error::Train(TrainError::Distributed(DistributedError::OtherRank { .. })),
        ) => Ok(0),
        Err(error) if ranks.several() && !ranks.fail_together() => {
            output::note(&format!("rank {} of {} ends the job:", ranks.rank(), ranks.size()));
            output::print_error(&error);
            ranks.abort(error.exit_code())
        }
        result => result,
    }
}

/// One of the ranks; the first speaks.
fn train(args: &TrainArgs, ranks: &Ranks) -> Result<u8, Error> {
    let settings = settings(args, ranks)?;
    catch_interrupts(&settings.interrupted, ranks.is_first());
    allocator::keep_memory();
    if ranks.is_first() {
        output::note(&format!(
            "preset {}, {}, {} threads, run folder {}",
            settings.preset,
            settings.compute,
            settings.threads,
            settings.out.display()
        ));
        if ranks.several() {
            let optim = &settings.config.optim;
            let (batch, total) = (optim.batch, optim.total_batch(ranks.size()));
            output::note(&format!("{ranks}, batch {} x {batch} = {total} images a step", ranks.size()));
        }
    }
    let outcome = crate::train::run(&settings)?;
    if ranks.is_first() {
        report(&outcome, args.json)?;
    }
    Ok(outcome.exit_code())
}

/// What the first rank makes of flags, files and run folders; the others have the same.
#[derive(Serialize, Deserialize)]
struct Decision {
    #[serde(with = "as_toml")]
    config: TrainConfig,
    preset: String,
    out: PathBuf,
    resume: Resume,
}

/// A configuration as the text that run folders hold.
mod as_toml {
    use serde::{Deserialize, Deserializer, Serializer, de};

    use crate::config::{TrainConfig, presets};

    pub(super) fn serialize<S: Serializer>(config: &TrainConfig, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&config.to_toml(presets::DEFAULT))
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<TrainConfig, D::Error> {
        TrainConfig::from_toml(&String::deserialize(from)?).map_err(de::Error::custom)
    }
}

/// Resolves every flag; nothing is written.
fn settings(args: &TrainArgs, ranks: &Ranks) -> Result<RunSettings, Error> {
    let Decision { config, preset, out, resume } = ranks.decide(|| decide(args))?;
    let compute = device::choose(args.compute.device.of_rank(ranks.local_rank()), args.compute.precision)?;
    compute.check_augment(config.augment.device)?;
    Ok(RunSettings {
        config,
        preset,
        out,
        resume,
        init: args.init.clone(),
        compute,
        ranks: ranks.clone(),
        threads: rayon::current_num_threads(),
        dry_run: args.dry_run,
        json: args.json,
        interrupted: Arc::default(),
    })
}

fn decide(args: &TrainArgs) -> Result<Decision, Error> {
    let resume = match args.resume.as_str() {
        "none" => Resume::None,
        "auto" => Resume::Auto,
        folder => Resume::From(folder.into()),
    };
    if args.init.is_some() && resume != Resume::None {
        return Err(Error::usage(
            "`--init` starts a new run, `--resume` continues one",
            "leave one of them out; a resumed run takes its weights from the checkpoint",
        ));
    }
    let layers = layers(args);
    let continued = continued_run(args, &resume, &layers)?;
    let Resolved { mut config, preset, .. } = match &continued {
        Some(run) => resolve_continued(run, layers)?,
        None => layers.resolve()?,
    };
    if config.data.images.is_empty() {
        config.data.images = vec![run_folder::bundled_photos()?.to_string_lossy().into_owned()];
    }
    config.data.images.iter_mut().for_each(|image| *image = absolute(image));
    if !config.probe.data.is_empty() {
        config.probe.data = absolute(&config.probe.data);
    }

    let out = args
        .out
        .clone()
        .or_else(|| continued.clone())
        .unwrap_or_else(|| run_folder::next_free(Path::new(RUNS), &preset));
    if run_folder::holds_run(&out) && continued.as_ref() != Some(&out) {
        return Err(Error::usage(
            format!("the run folder `{}` already holds a run", out.display()),
            "`--resume auto` continues it; another `--out` starts a new one",
        ));
    }
    Ok(Decision { config, preset, out, resume })
}

/// The configuration layers the flags name.
fn layers(args: &TrainArgs) -> Layers {
    let mut flags: Vec<(&'static str, &'static str, Value)> = Vec::new();
    if !args.images.is_empty() {
        let images = args.images.iter().cloned().map(Value::String).collect();
        flags.push(("IMAGES", "data.images", Value::Array(images)));
    }
    if args.epochs.is_some() {
        // epochs count only while steps are 0
        flags.push(("--epochs", "optim.steps", Value::Integer(0)));
    }
    let numbers = [
        ("--limit", "data.limit", args.limit),
        ("--workers", "data.workers", args.workers),
        ("--epochs", "optim.epochs", args.epochs),
        ("--steps", "optim.steps", args.steps),
        ("--batch", "optim.batch", args.batch),
        ("--accumulate", "optim.accumulate", args.accumulate),
        ("--seed", "seed", args.seed),
        ("--report-every", "log.report_every_steps", args.report_every),
        ("--eval-every", "probe.every_steps", args.eval_every),
    ];
    flags.extend(numbers.into_iter().filter_map(|(flag, key, n)| Some((flag, key, Value::Integer(n?)))));
    if args.recompute {
        flags.push(("--recompute", "recompute", Value::Boolean(true)));
    }
    let words = [
        ("--method", "image.method", &args.method),
        ("--on-collapse", "guard.on_collapse", &args.on_collapse),
        ("--augment", "augment.device", &args.augment),
        ("--ops", "ops", &args.ops),
        ("--eval-data", "probe.data", &args.eval_data),
    ];
    flags.extend(
        words.into_iter().filter_map(|(flag, key, word)| Some((flag, key, Value::String(word.clone()?)))),
    );
    let default =
        if args.images.is_empty() && args.config.is_none() { presets::DEMO } else { presets::DEFAULT };
    Layers {
        preset: args.preset.clone(),
        default_preset: default.to_owned(),
        file: args.config.clone(),
        sets: args.sets.clone(),
        flags,
    }
}

/// The run folder that is continued, if there is one.
fn continued_run(args: &TrainArgs, resume: &Resume, layers: &Layers) -> Result<Option<PathBuf>, Error> {
    match resume {
        Resume::None => Ok(None),
        Resume::From(path) => run_folder::run_of(path).map(Some),
        Resume::Auto => {
            let run = match &args.out {
                Some(out) => Some(out.clone()),
                None => run_folder::newest(Path::new(RUNS), &layers.resolve()?.preset),
            };
            Ok(run.filter(|run| run_folder::holds_run(run)))
        }
    }
}

/// The configuration of a continued run: its own, with the given layers on top, as far as they do not change results.
fn resolve_continued(run: &Path, layers: Layers) -> Result<Resolved, Error> {
    let file = run.join(run_folder::CONFIG);
    let stored = Layers { file: Some(file.clone()), ..Layers::default() }.resolve()?;
    let resolved = match layers.file {
        Some(_) => layers.resolve()?,
        None => Layers { file: Some(file), ..layers }.resolve()?,
    };
    let differences = resolved.config.resume_differences(&stored.config);
    if differences.is_empty() { Ok(resolved) } else { Err(ConfigError::Changed { differences }.into()) }
}

/// An absolute name for an entry of `data.images`, so that a resumed run finds it from any folder.
fn absolute(image: &str) -> String {
    let (mark, path) = match image.strip_prefix('@') {
        Some(list) => ("@", list),
        None => ("", image),
    };
    match std::path::absolute(path) {
        Ok(absolute) => format!("{mark}{}", absolute.display()),
        Err(_) => image.to_owned(),
    }
}

/// The first Ctrl-C asks the run to end with a checkpoint, the second ends the program at once.
pub(super) fn catch_interrupts(interrupted: &Arc<AtomicUsize>, speaks: bool) {
    let interrupted = Arc::clone(interrupted);
    let caught = ctrlc::set_handler(move || {
        if interrupted.fetch_add(1, Ordering::SeqCst) > 0 {
            std::process::exit(INTERRUPTED);
        }
        if speaks {
            output::note("stopping after this step with a checkpoint; once more stops at once");
        }
    });
    if let Err(error) = caught {
        output::warn(&format!("Ctrl-C will not write a checkpoint: {error}"));
    }
}

/// What shells report for a program ended by Ctrl-C: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// The result, for a person or a program.
fn report(outcome: &Outcome, json: bool) -> Result<(), Error> {
    if json {
        return output::print_json(outcome);
    }
    let run = outcome.run.display();
    let Outcome { step, total_steps, .. } = outcome;
    if let Some(message) = &outcome.message {
        output::warn(message);
    }
    let mut text = match outcome.ending {
        Ending::DryRun => {
            return output::print(&format!("dry run: {total_steps} steps, nothing was written\n"));
        }
        Ending::Done => format!("done: {step} steps in {:.0} s\n", outcome.seconds),
        Ending::Interrupted => format!("interrupted after step {step} of {total_steps}\n"),
        Ending::Guard => format!("stopped by the guard after step {step} of {total_steps}\n"),
    };
    if let Some(checkpoint) = &outcome.checkpoint {
        text += &format!("checkpoint: {}\n", checkpoint.display());
    }
    text += &match outcome.ending {
        Ending::Done => {
            format!("next: pass-host features IMAGES --weights {run} --out features.safetensors\n")
        }
        _ => format!("continue: pass-host train --out {run} --resume auto\n"),
    };
    output::print(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::config::TrainConfig;
    use clap::Parser;

    fn parse(line: &str) -> Result<RunSettings, Error> {
        let words = ["pass-host", "train"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Train(args) => settings(&args, &Ranks::single()),
            other => panic!("{other:?}"),
        }
    }

    /// A run folder as a training run leaves it.
    fn finished_run(config: &TrainConfig) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("checkpoints/step-00000001")).unwrap();
        std::fs::write(dir.path().join("checkpoints/step-00000001/manifest.json"), "{}").unwrap();
        std::fs::write(dir.path().join("config.toml"), config.to_toml("demo")).unwrap();
        dir
    }

    #[test]
    fn images_choose_the_preset() {
        let settings = parse("photos @list.txt --batch 8 --epochs 3 --seed 9 --on-collapse warn").unwrap();
        assert_eq!(settings.preset, presets::DEFAULT);
        let config = &settings.config;
        assert_eq!((config.optim.batch, config.optim.epochs, config.seed), (8, 3, 9));
        assert_eq!(config.data.images.len(), 2);
        assert!(Path::new(&config.data.images[0]).is_absolute());
        assert!(
            config.data.images[1].starts_with('@') && Path::new(&config.data.images[1][1..]).is_absolute()
        );
        let probed = parse("photos --eval-every 50 --eval-data flowers").unwrap().config.probe;
        assert_eq!(probed.every_steps, 50);
        assert!(Path::new(&probed.data).is_absolute() && probed.data.ends_with("flowers"));
        let demo = parse("photos --preset demo --epochs 3").unwrap();
        assert_eq!((demo.config.optim.steps, demo.config.optim.epochs), (0, 3));
    }

    #[test]
    fn a_run_folder_is_not_overwritten() {
        let run = finished_run(&presets::find("demo").unwrap().config());
        let error = parse(&format!("photos --out {}", run.path().display())).unwrap_err();
        assert!(error.to_string().contains("already holds a run"), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert!(error.hint().unwrap().contains("--resume auto"));
    }

    #[test]
    fn a_resumed_run_keeps_its_configuration() {
        let mut config = presets::find("demo").unwrap().config();
        config.optim.batch = 24;
        config.data.images = vec!["/photos".into()];
        let run = finished_run(&config);
        let path = run.path().display();
        for line in [format!("--out {path} --resume auto"), format!("--resume {path} --workers 3")] {
            let settings = parse(&line).unwrap();
            assert_eq!((settings.config.optim.batch, settings.preset.as_str()), (24, "demo"), "{line}");
            assert_eq!(settings.config.data.images, ["/photos"]);
            assert_eq!(settings.out, run.path());
        }
        let checkpoint = format!("--resume {path}/checkpoints/step-00000001");
        assert_eq!(parse(&checkpoint).unwrap().out, run.path());
        let error = parse(&format!("--out {path} --resume auto --seed 8")).unwrap_err();
        assert!(error.to_string().contains("`seed` was 0, is now 8"), "{error}");
    }

    #[test]
    fn contradictions_are_usage_errors() {
        for line in [
            "photos --init w --resume auto",
            "photos --resume /nowhere",
            "photos --batch 0",
            "photos --preset x",
            "photos --eval-every 5",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
        let empty = tempfile::tempdir().unwrap();
        let fresh = parse(&format!("photos --out {} --resume auto", empty.path().display())).unwrap();
        assert_eq!((fresh.resume, fresh.out.as_path()), (Resume::Auto, empty.path()));
    }
}
