//! `pass-edge track`

mod mask;
mod overlay;
mod sequence;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use pass_edge::core::propagation::{
    Clip, ClipShape, Propagation, one_hot_into, resize_nearest_into, segment_into, segment_scratch_len,
};
use pass_edge::core::shape::{PatchGrid, Tokens};
use pass_edge::format::Architecture;
use pass_edge::kernels::Kernel;
use pass_edge::parallel::Threads;
use pass_edge::resize::Fit;
use pass_edge::tracking::{propagate, propagate_scratch_len};

use super::compute::{ComputeArgs, Engine};
use super::decode::Picture;
use super::draft::write_file;
use super::error::Error;
use super::meter::Meter;
use super::model_file::ModelFile;
use super::output;
use super::pictures::read_picture;
use super::prepare::Preparer;
use mask::Mask;
pub(crate) use mask::MaskError;
use sequence::Sequence;

/// Follow the objects of a first mask through the frames of a video.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct TrackArgs {
    /// The model.
    #[arg(value_name = "M.pass")]
    model: PathBuf,
    /// The frames: a folder (by name, 9 before 10), or @LIST.txt (a path a line).
    #[arg(value_name = "FRAMES")]
    frames: PathBuf,
    /// Mask of the first frame: a PNG with a palette and the frame's size, index 0 the background, every other index an
    /// object.
    #[arg(long, value_name = "FIRST.png")]
    mask: PathBuf,
    /// Where to: a mask a frame, named like the frame, with the palette of the first.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Also write every frame with its mask painted over it.
    #[arg(long, value_name = "DIR")]
    overlay: Option<PathBuf>,
    /// Exit with 1 if any frame could not be used.
    #[arg(long)]
    strict: bool,
    /// Show frames a second and milliseconds a frame on standard error, every second.
    #[arg(long)]
    fps: bool,
    /// Larger frames are refused, in millions of pixels.
    #[arg(long, value_name = "N", default_value_t = 180.0)]
    max_megapixels: f64,
    #[command(flatten)]
    rule: RuleArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// How labels travel; the defaults are those of the published DAVIS 2017 evaluations.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Rule")]
struct RuleArgs {
    /// Frames remembered beside the first one.
    #[arg(long, value_name = "N", default_value_t = Propagation::DAVIS.previous_frames)]
    context: usize,
    /// How far an object may move from a remembered frame, in patches; 0: anywhere.
    #[arg(long, value_name = "PATCHES", default_value_t = Propagation::DAVIS.radius)]
    radius: usize,
    /// Most similar patches that decide about a patch.
    #[arg(long, value_name = "K", default_value_t = Propagation::DAVIS.top_k)]
    topk: usize,
    /// Temperature of the affinity.
    #[arg(long, value_name = "T", default_value_t = Propagation::DAVIS.temperature)]
    temperature: f32,
}

const EXAMPLES: &str = "\
Examples:
  pass-edge track model.pass JPEGImages/480p/bear --mask Annotations/480p/bear/00000.png --out masks/bear
  pass-edge track model.pass frames --mask first.png --out masks --overlay pictures --fps

Frames are stretched to the size of the model; masks have the size of their frames, at the resolution of the patches.
A frame that cannot be read gets the mask of the frame before it.";

pub(super) fn run(args: &TrackArgs) -> Result<u8, Error> {
    let kernel = args.compute.kernel()?;
    let sequence = Sequence::find(&args.frames)?;
    sequence.refuse_overwriting(&args.mask, &args.out, args.overlay.as_deref())?;
    let file = ModelFile::open(&args.model)?;
    let model = file.model()?;
    let architecture = *model.architecture();

    let first = read_picture(&sequence.frames[0].path, args.max_megapixels)
        .map_err(|source| Error::Frame { path: sequence.frames[0].path.clone(), source })?;
    let mask = Mask::read(&args.mask, (first.height, first.width))
        .map_err(|source| Error::Mask { path: args.mask.clone(), source })?;
    let objects = Objects::of(&mask, &architecture)?;
    objects.warn_of_lost(&args.mask);
    let rule = Propagation {
        // a sequence cannot remember more frames than it has
        previous_frames: args.rule.context.min(sequence.frames.len() - 1),
        radius: args.rule.radius,
        top_k: args.rule.topk,
        temperature: args.rule.temperature,
    };
    let shape =
        ClipShape::new(rule, objects.grid, architecture.dim(), objects.indices.len()).map_err(|error| {
            Error::usage(format!("the rule is impossible: {error}"), "leave out what was set under `Rule`")
        })?;

    for folder in [Some(&args.out), args.overlay.as_ref()].into_iter().flatten() {
        std::fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.clone(), source })?;
    }
    let threads = args.compute.pool()?;
    let work = Work {
        args,
        engine: Engine::new(model, kernel, Arc::clone(&threads)),
        preparer: Preparer::new(architecture.image_size(), Fit::Stretch, kernel),
        kernel,
        pool: threads,
        shape,
        objects,
        mask,
        meter: Meter::new(args.fps),
        spent: Spent::default(),
    };
    work.run(&sequence, first)
}

/// The objects of a first mask on the grid of a model.
struct Objects {
    grid: PatchGrid,
    /// Index in the mask of every class; the background first.
    indices: Vec<u8>,
    /// Class of every patch.
    patches: Vec<u8>,
}

impl Objects {
    fn of(mask: &Mask, architecture: &Architecture) -> Result<Self, Error> {
        let (height, width) = (architecture.grid.0 as usize, architecture.grid.1 as usize);
        let grid = PatchGrid::new(height, width).map_err(pass_edge::Error::from)?;
        let indices = mask.indices();
        let mut patches = vec![0; grid.n_patches()];
        resize_nearest_into(&mask.labels, mask.size, (height, width), &mut patches)
            .map_err(pass_edge::Error::from)?;
        for patch in &mut patches {
            *patch = indices.binary_search(patch).unwrap_or(0) as u8;
        }
        Ok(Self { grid, indices, patches })
    }

    /// The labels of the first frame, `[N, C]`.
    fn labels(&self) -> Result<Vec<f32>, Error> {
        let mut labels = vec![0.0; self.patches.len() * self.indices.len()];
        one_hot_into(&self.patches, self.indices.len(), &mut labels).map_err(pass_edge::Error::from)?;
        Ok(labels)
    }

    fn warn_of_lost(&self, path: &Path) {
        for (class, index) in self.indices.iter().enumerate().skip(1) {
            if !self.patches.contains(&(class as u8)) {
                output::warn(&format!(
                    "object {index} of `{}` is too small for the {}x{} patches of the model: it cannot be followed",
                    path.display(),
                    self.grid.width(),
                    self.grid.height(),
                ));
            }
        }
    }
}

/// Time spent, summed over the frames.
#[derive(Default)]
struct Spent {
    frames: u32,
    features: Duration,
    labels: Duration,
}

/// From frames to written masks.
struct Work<'a> {
    args: &'a TrackArgs,
    engine: Engine<'a>,
    preparer: Preparer,
    kernel: Kernel,
    pool: Arc<Threads>,
    shape: ClipShape,
    objects: Objects,
    /// The mask of the frame at work.
    mask: Mask,
    meter: Meter,
    spent: Spent,
}

impl Work<'_> {
    fn run(mut self, sequence: &Sequence, first: Picture) -> Result<u8, Error> {
        let start = Instant::now();
        let shape = self.shape;
        let first_labels = self.objects.labels()?;
        let mut features = vec![0.0; shape.features_len()];
        let mut labels = vec![0.0; shape.labels_len()];
        let mut scratch = vec![0.0; propagate_scratch_len(&shape, &*self.pool)];
        let mut segment_scratch = vec![0.0; segment_scratch_len(shape.grid(), shape.classes())];
        let mut soft = vec![0.0; shape.frame_labels_len()];

        self.meter.begin();
        let tokens = self.tokens(&first)?;
        let mut clip = Clip::new(shape, &mut features, &mut labels, tokens, &first_labels)
            .map_err(pass_edge::Error::from)?;
        self.write(&sequence.frames[0].name, Some(&first))?;
        self.meter.end();

        let mut bad = 0;
        for frame in &sequence.frames[1..] {
            self.meter.begin();
            let picture = match read_picture(&frame.path, self.args.max_megapixels) {
                Ok(picture) => picture,
                Err(reason) => {
                    output::warn(&format!(
                        "`{}` gets the mask of the frame before it: {reason}",
                        frame.path.display()
                    ));
                    bad += 1;
                    self.write(&frame.name, None)?;
                    continue;
                }
            };
            clip.set_target(self.tokens(&picture)?).map_err(pass_edge::Error::from)?;
            let begun = Instant::now();
            propagate(&clip, self.kernel, &*self.pool, &mut scratch, &mut soft)?;
            clip.keep_target(&soft).map_err(pass_edge::Error::from)?;
            self.segment(&soft, (picture.height, picture.width), &mut segment_scratch)?;
            self.spent.labels += begun.elapsed();
            self.write(&frame.name, Some(&picture))?;
            self.meter.end();
        }
        self.finish(sequence.frames.len(), bad, start.elapsed())
    }

    /// Features of a frame, `[N, D]`.
    fn tokens(&mut self, picture: &Picture) -> Result<Tokens<'_>, Error> {
        let begun = Instant::now();
        let image = picture.image()?;
        let image = self.preparer.prepare(&image)?;
        let (n, dim) = (self.shape.grid().n_patches(), self.shape.dim());
        let all = self.engine.features(&image)?;
        self.spent.features += begun.elapsed();
        self.spent.frames += 1;
        Ok(Tokens::new(&all[..n * dim], n, dim).map_err(pass_edge::Error::from)?)
    }

    /// Soft labels to the mask of the frame at work.
    fn segment(&mut self, soft: &[f32], size: (usize, usize), scratch: &mut [f32]) -> Result<(), Error> {
        let (grid, classes) = (self.shape.grid(), self.shape.classes());
        let patch = self.engine.model().architecture().patch_size as usize;
        self.mask.size = size;
        self.mask.labels.resize(size.0 * size.1, 0);
        segment_into(soft, grid, classes, patch, size, scratch, &mut self.mask.labels)
            .map_err(pass_edge::Error::from)?;
        for label in &mut self.mask.labels {
            *label = self.objects.indices[usize::from(*label)];
        }
        Ok(())
    }

    /// Writes the mask of the frame at work, and its overlay if there is a picture to lay it over.
    fn write(&self, name: &str, picture: Option<&Picture>) -> Result<(), Error> {
        let write = |folder: &Path, bytes: Result<Vec<u8>, png::EncodingError>| {
            let path = folder.join(format!("{name}.png"));
            let bytes = bytes.map_err(std::io::Error::from);
            bytes.and_then(|bytes| write_file(&path, &bytes)).map_err(|source| Error::Write { path, source })
        };
        write(&self.args.out, self.mask.encode())?;
        if let (Some(folder), Some(picture)) = (&self.args.overlay, picture) {
            write(folder, overlay::encode(picture, &self.mask))?;
        }
        Ok(())
    }

    fn finish(self, frames: usize, bad: usize, elapsed: Duration) -> Result<u8, Error> {
        self.meter.finish();
        let each = |spent: Duration, count: u32| spent.as_secs_f64() * 1e3 / f64::from(count.max(1));
        output::note(&format!(
            "{frames} masks in {}: {:.1} frames/s (features {:.1} ms, labels {:.1} ms a frame)",
            self.args.out.display(),
            frames as f64 / elapsed.as_secs_f64(),
            each(self.spent.features, self.spent.frames),
            each(self.spent.labels, self.spent.frames - 1),
        ));
        if bad > 0 {
            output::note(&format!("{bad} of {frames} frames could not be used"));
        }
        Ok(u8::from(self.args.strict && bad > 0))
    }
}
