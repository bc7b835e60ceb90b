//! `pass-edge features`

mod file;
mod frames;
mod sink;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pass_edge::format::Architecture;
use pass_edge::image::Image;

use super::compute::{ComputeArgs, Engine};
use super::error::Error;
use super::meter::Meter;
use super::model_file::ModelFile;
use super::output;
use super::pictures::Pictures;
use super::prepare::{FitChoice, Preparer};
use frames::{FrameArgs, Frames};
use sink::{Destination, Sink};

/// Compute patch features of images, folders, or raw frames.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct FeaturesArgs {
    /// The model.
    #[arg(value_name = "M.pass")]
    model: PathBuf,
    /// Image files, folders (searched recursively), or `-` for raw frames on standard input.
    #[arg(value_name = "INPUT", required = true)]
    inputs: Vec<PathBuf>,
    /// Where to: F.npy or F.safetensors (image names go to F.images.txt), or `-` for JSON lines on standard output.
    #[arg(long, value_name = "F", default_value = "-")]
    out: PathBuf,
    /// `patch` (one vector a patch), `mean` (their mean, one an image), or `class` (the class token).
    #[arg(
        long,
        value_enum,
        value_name = "TOKENS",
        visible_alias = "pool",
        default_value = "patch",
        hide_possible_values = true
    )]
    tokens: Tokens,
    /// `center` (7/8 of the shorter side, as `pass-host features` does), `cover` (the largest part of the model's shape),
    /// or `stretch` [default: center for images, cover for frames]. Frames of the model's size are not changed by the
    /// last two.
    #[arg(long, value_enum, value_name = "FIT", hide_possible_values = true)]
    fit: Option<FitChoice>,
    /// Larger images are refused, in millions of pixels.
    #[arg(long, value_name = "N", default_value_t = 180.0)]
    max_megapixels: f64,
    /// Exit with 1 if any image or frame could not be used, not only if none could.
    #[arg(long)]
    strict: bool,
    /// Show frames a second and milliseconds a frame on standard error, every second and at the end.
    #[arg(long)]
    fps: bool,
    #[command(flatten)]
    frames: FrameArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

const EXAMPLES: &str = "\
Examples:
  pass-edge features model.pass PHOTOS --out features.npy
  pass-edge features model.pass cat.jpg --tokens mean
  ffmpeg -i film.mp4 -f rawvideo -pix_fmt rgb24 -s 224x224 - \\
      | pass-edge features model.pass - --out film.npy
  gst-launch-1.0 -q nvarguscamerasrc ! nvvidconv ! video/x-raw,format=NV12,width=640,height=480 \\
      ! queue leaky=downstream max-size-buffers=1 ! fdsink \\
      | pass-edge features model.pass - --size 640x480 --format nv12 --fps --tokens mean

A stream is stopped by its end or by Ctrl-C; features up to there are kept.";

/// Which vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tokens {
    Patch,
    Mean,
    Class,
}

impl Tokens {
    /// Axes of the vectors of an image.
    fn shape(self, architecture: &Architecture) -> Vec<usize> {
        match self {
            Self::Patch => vec![architecture.patches(), architecture.dim()],
            Self::Mean | Self::Class => vec![architecture.dim()],
        }
    }

    /// Picks from all tokens of an image; `mean` is working memory.
    fn pick<'a>(self, architecture: &Architecture, all: &'a [f32], mean: &'a mut Vec<f32>) -> &'a [f32] {
        let (patches, prefix) = all.split_at(architecture.patches() * architecture.dim());
        match self {
            Self::Patch => patches,
            Self::Class => &prefix[..architecture.dim()],
            Self::Mean => {
                mean.clear();
                mean.resize(architecture.dim(), 0.0);
                for token in patches.chunks_exact(architecture.dim()) {
                    mean.iter_mut().zip(token).for_each(|(sum, value)| *sum += value);
                }
                mean.iter_mut().for_each(|sum| *sum /= architecture.patches() as f32);
                mean
            }
        }
    }
}

pub(super) fn run(args: &FeaturesArgs) -> Result<u8, Error> {
    let destination = Destination::of(&args.out)?;
    if args.max_megapixels.is_nan() || args.max_megapixels <= 0.0 {
        return Err(Error::usage("`--max-megapixels`: expected more than 0", "leave it out"));
    }
    let kernel = args.compute.kernel()?;
    let stream = args.inputs.iter().any(|input| input.as_os_str() == "-");
    if stream && args.inputs.len() > 1 {
        return Err(Error::usage("`-` and other inputs in one call", "start the program once for each"));
    }
    if !stream {
        args.frames.refuse_without_stream()?;
    }
    let file = ModelFile::open(&args.model)?;
    let model = file.model()?;
    let architecture = *model.architecture();
    if args.tokens == Tokens::Class && !architecture.class_token {
        let message = format!("`--tokens class`: `{}` has no class token", args.model.display());
        return Err(Error::usage(message, "use `--tokens mean`"));
    }
    let default_fit = if stream { FitChoice::Cover } else { FitChoice::Center };
    let fit = args.fit.unwrap_or(default_fit).into();
    // inputs are checked before anything is created
    let source = if stream {
        Source::Frames(Frames::new(&args.frames, architecture.image_size(), args.max_megapixels)?)
    } else {
        Source::Pictures(Pictures::find(args.inputs.clone(), args.max_megapixels)?)
    };
    let shape = args.tokens.shape(&architecture);
    let work = Work {
        sink: Sink::create(destination, &shape, stream)?,
        engine: Engine::new(model, kernel, args.compute.pool()?),
        preparer: Preparer::new(architecture.image_size(), fit, kernel),
        tokens: args.tokens,
        mean: Vec::new(),
        meter: Meter::new(args.fps),
        index: 0,
        bad: 0,
        first_bad: None,
    };
    match work.run(source, args.strict) {
        // `pass-edge features … | head` is fine
        Err(Error::ReaderGone) => Ok(0),
        result => result,
    }
}

enum Source {
    Frames(Frames),
    Pictures(Pictures),
}

/// From images to written features.
struct Work<'m> {
    engine: Engine<'m>,
    preparer: Preparer,
    tokens: Tokens,
    mean: Vec<f32>,
    meter: Meter,
    sink: Sink,
    /// Of the image or frame at work; at the end, how many there were.
    index: u64,
    bad: u64,
    /// Name and reason.
    first_bad: Option<(String, String)>,
}

impl Work<'_> {
    fn run(mut self, source: Source, strict: bool) -> Result<u8, Error> {
        match source {
            Source::Frames(mut frames) => {
                while let Some(frame) = frames.next()? {
                    self.meter.begin();
                    match frame {
                        Ok(image) => self.write(&image, None)?,
                        Err(reason) => self.leave_out(&format!("frame {}", self.index), &reason),
                    }
                    self.index += 1;
                }
            }
            Source::Pictures(pictures) => {
                self.meter.begin();
                for (name, picture) in pictures {
                    match picture {
                        Ok(picture) => self.write(&picture.image()?, Some(&name))?,
                        Err(reason) => self.leave_out(&name, &reason),
                    }
                    self.index += 1;
                    self.meter.begin();
                }
            }
        }
        self.finish(strict)
    }

    /// Prepares, computes, writes.
    fn write(&mut self, image: &Image<'_>, name: Option<&str>) -> Result<(), Error> {
        let image = match self.preparer.prepare(image) {
            Ok(image) => image,
            Err(reason) => {
                let name = name.map_or_else(|| format!("frame {}", self.index), str::to_owned);
                self.leave_out(&name, &reason);
                return Ok(());
            }
        };
        let architecture = *self.engine.model().architecture();
        let all = self.engine.features(&image)?;
        let picked = self.tokens.pick(&architecture, all, &mut self.mean);
        self.sink.append(self.index, name, picked)?;
        self.meter.end();
        Ok(())
    }

    fn leave_out(&mut self, name: &str, reason: &dyn std::fmt::Display) {
        output::warn(&format!("left out `{name}`: {reason}"));
        self.bad += 1;
        self.first_bad.get_or_insert_with(|| (name.to_owned(), reason.to_string()));
    }

    fn finish(self, strict: bool) -> Result<u8, Error> {
        if self.bad == self.index {
            return Err(Error::NothingUsable { count: self.bad, first: self.first_bad });
        }
        self.meter.finish();
        if let Some(line) = self.sink.finish()? {
            output::print(&line)?;
        }
        if self.bad > 0 {
            output::note(&format!("left out {} of {}", self.bad, self.index));
        }
        Ok(u8::from(strict && self.bad > 0))
    }
}
